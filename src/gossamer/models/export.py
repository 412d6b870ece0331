"""Export: a Hugging Face folder that transformers loads, zeros where pruned or none of them stored."""

from __future__ import annotations

import json
from collections.abc import Iterable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError, OutputError
from gossamer.matrices.atomic import atomic_file, atomic_folder, check_free
from gossamer.matrices.storage import LazyTensor, nbytes, write_tensors
from gossamer.matrices.values import overflows
from gossamer.models.bitmask import FORMATS, config_of, squeezed
from gossamer.models.checkpoint import load_checkpoint
from gossamer.models.checkpoint_writer import copy_companions
from gossamer.models.naming import state_of
from gossamer.nn import StructuredEmbedding, StructuredLinear
from gossamer.nn.experts import Experts, is_fused
from gossamer.nn.views import is_conv1d
from gossamer.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARD_BYTES = 5_000_000_000
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_dense(
    source: str | Path | PreTrainedModel,
    out: str | Path,
    dtype: str = "bfloat16",
    *,
    base: str | Path | None = None,
    sparse: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Path:
    """Writes the model as plain dense weights that ``AutoModelForCausalLM.from_pretrained`` loads.

    ``source``: the folder of a checkpoint, or a model in memory, structured or not; ``dtype``: float32,
    bfloat16 or float16, of every floating tensor; ``base``: where tokenizer files come from (the checkpoint
    by default); ``sparse``: linear layers with zeros are stored in one of compressed-tensors' formats
    (`models.bitmask`), "sparse-bitmask" or "sparse-24-bitmask", for versions 0.9 to 0.14 of that library:
    transformers beside a later one starts such layers with random weights. One matrix is unpacked at a time.
    Files past ``shard_bytes`` are split as transformers splits them. Nothing is left under ``out`` unless all
    is there. Returns ``out``. Raises OutputError where ``out`` is taken or cannot be written, a weight is
    past what ``dtype`` holds, weights are not 2:4 that should be, or no linear layer has zeros that a sparse
    format is asked for, CheckpointError where the checkpoint is damaged.
    """
    out = Path(out)
    check_free(out)
    if dtype not in _DTYPES:
        raise OutputError(f"the dtype of an export is one of {', '.join(_DTYPES)}, not {dtype!r}")
    if sparse is not None and sparse not in FORMATS:
        raise OutputError(f"the sparse format of an export is one of {', '.join(FORMATS)}, not {sparse!r}")
    if isinstance(source, (str, Path)):
        model, base = load_checkpoint(source), base or source
    else:
        model = source
    tensors, tied = _dense_tensors(model, _DTYPES[dtype])
    compression = None
    if sparse is not None:
        tensors, compression = _squeezed(model, tensors, sparse)
    with atomic_folder(out) as folder:
        if base is not None:
            copy_companions(Path(base), folder, without=("config.json",))
        _write_config(model, folder, dtype, tied, compression)
        write_shards(folder, tensors, shard_bytes, progress)
    return out


def _dense_tensors(model: PreTrainedModel, dtype: torch.dtype) -> tuple[dict[str, LazyTensor], bool]:
    """Every tensor of the dense model by its name there, tied ones once; and whether ties hold: not where
    parameters that the configuration ties have become different matrices."""
    sketch = _dense_twin(model)
    owners: dict[int, int] = {}  # the sketch's tensor -> what the model holds in its place
    state = [(name, tensor, _held(model, name)) for name, tensor in state_of(sketch)]
    tied = all(owners.setdefault(id(tensor), id(held)) == id(held) for _, tensor, held in state)
    tensors: dict[str, LazyTensor] = {}
    seen: set[int] = set()
    for name, tensor, held in state:
        if tied and id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner = sketch.get_submodule(name.rpartition(".")[0])
        turned = owner.is_transposed if is_fused(owner) else is_conv1d(owner)
        shape = tuple(tensor.shape)
        kind = dtype if tensor.dtype.is_floating_point else tensor.dtype
        tensors[name] = LazyTensor(kind, shape, partial(_load, name, held, turned, kind))
    return tensors, tied


def _squeezed(
    model: PreTrainedModel, tensors: dict[str, LazyTensor], kind: str
) -> tuple[dict[str, LazyTensor], dict[str, Any]]:
    """The tensors with the weights of linear layers that have zeros in a format of compressed-tensors, and
    what ``config.json`` says of it."""
    found: dict[str, LazyTensor] = {}
    # what the library looks for by this class: not GPT-2's Conv1D, nor experts, which transformers fuses
    whole = {name for name, module in _dense_twin(model).named_modules() if isinstance(module, nn.Linear)}
    zeros = places = 0
    for name, tensor in tensors.items():
        module = name.removesuffix(".weight")
        weight = tensor.load() if module in whole and module != name else None
        missing = 0 if weight is None else int((weight == 0).sum())
        places += 0 if weight is None else weight.numel()
        if weight is None or not missing:
            found[name] = tensor
            continue
        zeros += missing
        whole.remove(module)
        try:
            parts = squeezed(weight, kind)
        except OutputError as error:
            raise OutputError(f"{name} {error}") from error
        for part, value in parts.items():
            load = partial(_part, tensor, kind, part)
            found[f"{module}.{part}"] = LazyTensor(value.dtype, tuple(value.shape), load)
    if not zeros:
        raise OutputError(f"no linear layer has zeros that {kind} could leave out: export it dense")
    return found, config_of(kind, zeros / places, sorted(whole))


def _part(weight: LazyTensor, kind: str, part: str) -> Tensor:
    return squeezed(weight.load(), kind)[part]


def _dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            twin = AutoModelForCausalLM.from_config(deepcopy(model.config), trust_remote_code=False)
    except Exception as error:  # whatever a foreign configuration does
        raise ModelError(f"transformers makes no model of this configuration: {error}") from error
    twin.tie_weights()
    return twin


def _held(model: nn.Module, name: str) -> Any:
    """The tensor, or the matrix, that stands for the dense parameter ``name``."""
    module_name, _, last = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        module = None
    if isinstance(module, Experts):
        return [_held(*part) for part in module.parts(last)]
    if isinstance(module, (StructuredLinear, StructuredEmbedding)) and last == "weight":
        return module.matrix
    held = getattr(module, last, None)
    if not isinstance(held, Tensor):
        raise ModelError(f"the model has no parameter {name}, which its configuration asks for")
    return held


def _load(name: str, held: Any, turned: bool, dtype: torch.dtype) -> Tensor:
    if isinstance(held, list):
        parts = [_load(name, one, False, dtype) for one in held]
        return torch.stack([part.T if turned and part.dim() == 2 else part for part in parts])
    if isinstance(held, Tensor):
        return _rounded(name, held.detach(), dtype)
    dense: Tensor = held.to_dense().detach()
    return _rounded(name, dense.T if turned else dense, dtype)


def _rounded(name: str, dense: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = dense.to(dtype)
    if overflows(dense, rounded):
        kind, most = str(dtype).removeprefix("torch."), float(dense[dense.isfinite()].abs().max())
        raise OutputError(
            f"{name} has numbers up to {most:g}, and {kind} holds none past {torch.finfo(dtype).max:g}: "
            "export the model in another dtype"
        )
    return rounded


def _write_config(
    model: PreTrainedModel, folder: Path, dtype: str, tied: bool, compression: dict[str, Any] | None
) -> None:
    config = deepcopy(model.config)
    config.dtype = _DTYPES[dtype]
    config.architectures = [type(model).__name__]
    if not tied:
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):  # of the weights that the model was read from
        del config.quantization_config
    if compression is not None:
        config.quantization_config = compression
    config.save_pretrained(folder)
    if not (folder / "generation_config.json").exists() and model.generation_config is not None:
        model.generation_config.save_pretrained(folder)


def write_shards(folder: Path, tensors: dict[str, LazyTensor], shard_bytes: int, progress: Progress) -> None:
    """Writes ``tensors`` as transformers' weight files into ``folder``, one in memory at a time; past
    ``shard_bytes`` they are split, with an index beside."""
    shards = list(_shards(tensors, shard_bytes))
    total = sum(nbytes(tensor) for tensor in tensors.values())
    places: dict[str, str] = {}
    done = 0

    def count(written: int) -> None:
        progress("exporting", done + written, total)

    for index, names in enumerate(shards, 1):
        single = len(shards) == 1
        file = "model.safetensors" if single else f"model-{index:05}-of-{len(shards):05}.safetensors"
        part = {name: tensors[name] for name in names}
        write_tensors(folder / file, part, metadata={"format": "pt"}, progress=count)
        places.update(dict.fromkeys(names, file))
        done += sum(nbytes(tensor) for tensor in part.values())
    if len(shards) > 1:
        index_table = {"metadata": {"total_size": total}, "weight_map": places}
        text = json.dumps(index_table, indent=2, sort_keys=True).encode() + b"\n"
        with atomic_file(folder / "model.safetensors.index.json", needed=len(text)) as writer:
            writer.write(text)


def _shards(tensors: dict[str, LazyTensor], limit: int) -> Iterable[list[str]]:
    """Names in order, cut before the tensor that would pass ``limit`` bytes."""
    names: list[str] = []
    size = 0
    for name, tensor in tensors.items():
        if names and size + nbytes(tensor) > limit:
            yield names
            names, size = [], 0
        names.append(name)
        size += nbytes(tensor)
    yield names
