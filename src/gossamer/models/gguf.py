"""A GGUF file made into a Hugging Face folder, once: float32 safetensors, config and tokenizer.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Config and tokenizer are read by
transformers, blocks are dequantized by the ``gguf`` package. Weights of common architectures pass one tensor
at a time; others are loaded whole by transformers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import GossamerError, ModelError
from gossamer.matrices.storage import LazyTensor, write_tensors
from gossamer.models.naming import state_of
from gossamer.models.skeleton import SINGLE_FILE, empty_model
from gossamer.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_Array = np.ndarray[Any, np.dtype[Any]]
_MAGIC = b"GGUF"


def license_of(path: Path) -> str | None:
    """The license that a GGUF file states for its model."""
    from gguf import GGUFReader

    field = GGUFReader(path).fields.get("general.license")
    return None if field is None else str(field.contents())


def convert(path: Path, folder: Path, progress: Progress = silent) -> None:
    """Writes the model in the GGUF file ``path`` into the existing ``folder``.

    The weights are what the file's blocks stand for, in float32; a head that is tied to the embedding is
    not stored twice. ``progress``: stage "convert", in tensors. Raises ModelError where the file is damaged,
    its architecture is unknown to transformers, it holds tensors that transformers would leave out, or it
    stretches rotary positions in a way that is neither ``linear`` nor ``yarn``.
    """
    with open(path, "rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelError(f"{path.name} is no GGUF file: it does not begin with {_MAGIC.decode()}")
    try:
        _convert(path, folder, progress)
    except GossamerError:
        raise
    except Exception as error:  # readers of damaged files raise whatever they stumble over
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{path.name} cannot be converted: {type(error).__name__}: {reason}") from error


def _convert(path: Path, folder: Path, progress: Progress) -> None:
    from gguf import GGUFReader
    from transformers import AutoConfig, AutoTokenizer

    place: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config = AutoConfig.from_pretrained(path.parent, **place)
    # what the file's quantization was says nothing about the float weights that are written here
    for stale in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        if stale in config.__dict__:
            delattr(config, stale)
    config.dtype = torch.float32
    reader = GGUFReader(path)
    architecture = str(reader.fields["general.architecture"].contents())
    _read_rotary(config, reader, architecture)
    config.save_pretrained(folder)
    model = empty_model(folder)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if model.generation_config is not None:
        ends = _ends(reader)
        if len(ends) > 1:
            model.generation_config.eos_token_id = ends
        model.generation_config.save_pretrained(folder)

    if architecture in _FROM_GGUF:
        tensors: Mapping[str, Tensor | LazyTensor] = _lazy_tensors(model, reader, architecture, progress)
    else:
        tensors = _whole(path, model)
    write_tensors(folder / SINGLE_FILE, tensors, metadata={"format": "pt"})
    AutoTokenizer.from_pretrained(path.parent, **place).save_pretrained(folder)
    _forget_how_loaded(folder / "tokenizer_config.json")


def _ends(reader: Any) -> list[int]:
    """The tokens that end a text, a turn and a message, each once, of which transformers reads the first."""
    fields = [reader.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    return list(dict.fromkeys(int(field.contents()) for field in fields if field is not None))


def _read_rotary(config: Any, reader: Any, architecture: str) -> None:
    """Puts into ``config`` the base of rotary frequencies and how they are stretched, of which transformers
    leaves out some or all. Defaults are llama.cpp's."""
    told = {
        name.removeprefix(f"{architecture}.rope."): field.contents()
        for name, field in reader.fields.items()
        if name.startswith(f"{architecture}.rope.")
    }
    found = {"rope_theta": told["freq_base"]} if "freq_base" in told else {}
    kind = told.get("scaling.type", "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelError(f"the GGUF file stretches rotary positions by {kind!r}, not linearly or by yarn")
    factor = told.get("scaling.factor", told.get("scale_linear", 1.0))
    known = {"type", "factor", "original_context_length", "finetuned"}
    if kind == "yarn":
        known |= {"yarn_beta_fast", "yarn_beta_slow"}
    unknown = {name.removeprefix("scaling.") for name in told if name.startswith("scaling.")} - known
    if unknown and kind != "none":
        raise ModelError(f"the GGUF file sets rope.scaling.{min(unknown)}, which transformers does not know")
    if kind != "none" and factor not in (0, 1):  # both leave positions as they are
        found |= {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            original = told.get("scaling.original_context_length", config.max_position_embeddings)
            found["original_max_position_embeddings"] = original
            betas = {name: told.get(f"scaling.yarn_{name}") for name in ("beta_fast", "beta_slow")}
            found |= {name: value for name, value in betas.items() if value is not None}
    parameters = getattr(config, "rope_parameters", None)
    if parameters is not None:
        # by kinds of layers: those of sliding windows have their own base, and are not stretched
        parameters.get("full_attention", parameters).update(found)
    elif "factor" in found:
        raise ModelError(
            f"the GGUF file stretches rotary positions, of which {architecture} models have none"
        )


def _forget_how_loaded(path: Path) -> None:
    """Tokenizers save the settings that they were loaded with, which are none of theirs."""
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in ("is_local", "local_files_only", "name_or_path"):
        settings.pop(key, None)
    path.write_text(
        json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def _lazy_tensors(
    model: PreTrainedModel, reader: Any, architecture: str, progress: Progress
) -> dict[str, LazyTensor]:
    """Every tensor of ``model`` under one name, dequantized when its turn comes to be written."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    key = next(arch for arch in MODEL_ARCH if MODEL_ARCH_NAMES.get(arch) == architecture)
    names = get_tensor_name_map(key, model.config.num_hidden_layers)
    there = {tensor.name: tensor for tensor in reader.tensors}
    fix = _FROM_GGUF[architecture]
    total, done = len(there), 0

    def lazy(stored: Any, tensor: Tensor) -> LazyTensor:
        def load() -> Tensor:
            nonlocal done
            from gguf import dequantize

            array = fix(stored.name, dequantize(stored.data, stored.tensor_type), model.config)
            if array.shape != tuple(tensor.shape):
                raise ModelError(
                    f"the tensor {stored.name} of the GGUF file has shape {array.shape}, but the config that "
                    f"transformers reads from the file asks for {tuple(tensor.shape)}"
                )
            done += 1
            progress("convert", done, total)
            return torch.from_numpy(np.array(array, dtype=np.float32, order="C"))

        return LazyTensor(torch.float32, tuple(tensor.shape), load)

    lazies: dict[str, LazyTensor] = {}
    seen: set[int] = set()
    missing: dict[int, str] = {}
    for name, tensor in state_of(model):
        if id(tensor) in seen:
            continue
        base, _, kind = name.rpartition(".")
        stored = there.pop(f"{names.get_name(base)}.{kind}", None)
        if stored is None:
            missing.setdefault(id(tensor), name)
            continue
        seen.add(id(tensor))
        lazies[name] = lazy(stored, tensor)
    absent = [name for key, name in missing.items() if key not in seen]
    if absent:
        raise ModelError(f"the GGUF file has no tensor for {absent[0]} of {type(model).__name__}")
    if there:
        raise ModelError(
            f"the GGUF file holds the tensor {min(there)}, which transformers would leave out: "
            "use this model's safetensors release"
        )
    return lazies


def _whole(path: Path, model: PreTrainedModel) -> dict[str, Tensor]:
    """Every tensor, loaded at once by transformers."""
    import transformers

    settings: dict[str, Any] = {"gguf_file": path.name, "dtype": torch.float32, "local_files_only": True}
    # releases that keep blocks packed need to be told not to
    if hasattr(transformers, "GgufConfig"):
        settings["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = type(model).from_pretrained(path.parent, **settings)
    once: dict[int, tuple[str, Tensor]] = {}
    for name, tensor in state_of(loaded):
        once.setdefault(id(tensor), (name, tensor))
    return {name: tensor.detach().contiguous() for name, tensor in once.values()}


# How llama.cpp changes weights when it writes GGUF, undone. Each takes the tensor's GGUF name, the array
# and the model's config.


def _same(name: str, array: _Array, config: Any) -> _Array:
    return array


def _unpermuted(name: str, array: _Array, config: Any) -> _Array:
    """llama.cpp interleaves the halves of each head's rotary dimensions; transformers keeps them apart."""
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    layer = name.split(".")[-2]
    if layer not in heads:
        return array
    pairs = array.reshape(heads[layer], -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)


def _norms_less_one(name: str, array: _Array, config: Any) -> _Array:
    """Gemma's norms multiply by 1 + weight, llama.cpp stores that sum."""
    return array - 1 if name.endswith("norm.weight") else array


def _conv1d(name: str, array: _Array, config: Any) -> _Array:
    """GPT-2's own layout of linear layers is (in, out)."""
    linear = {"attn_qkv", "attn_output", "ffn_up", "ffn_down"}
    return array.T if array.ndim == 2 and name.split(".")[-2] in linear else array


_FROM_GGUF: dict[str, Callable[[str, _Array, Any], _Array]] = {
    "llama": _unpermuted,
    "qwen2": _same,
    "qwen3": _same,
    "phi3": _same,
    "gemma2": _norms_less_one,
    "gemma3": _norms_less_one,
    "gpt2": _conv1d,
}
