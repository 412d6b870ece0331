"""A model without its weights, and its weights one module at a time: a walk holds one block in memory."""

from __future__ import annotations

import ctypes
import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import CheckpointError, ModelError
from gossamer.matrices.storage import open_tensors
from gossamer.models.manifest import is_checkpoint
from gossamer.models.naming import Source, join, sources, state_of
from gossamer.nn.experts import take_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PIECE = 1 << 22  # elements converted at once, so that a change of dtype needs no second copy of a tensor
SINGLE_FILE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ONE_AT_A_TIME = threading.Lock()  # of the swap of a method of all modules
# buffers that older releases of transformers saved and that are computed today
_OLD_BUFFERS = re.compile(r"(^|\.)(inv_freq|masked_bias|rotary_emb\..*|(attn|attention)\.bias)$")


class WeightFiles:
    """The tensors of a Hugging Face folder, one safetensors file or else a sharded set, read one at a time.

    Only headers are read when it is made. A tensor is read into memory of its own, not mapped, so that
    resident memory counts it once and only while somebody holds it. Raises ModelError where files are
    missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self._places: dict[str, tuple[Path, int, torch.dtype, tuple[int, ...]]] = {}
        self.paths = self._files()
        for path in self.paths:
            try:
                entries = open_tensors(path).entries
            except CheckpointError as error:
                raise ModelError(f"a weight file is damaged or missing: {error}") from error
            for name, entry in entries.items():
                if name in self._places:
                    raise ModelError(f"the tensor {name} is in two weight files of {self.folder.name}")
                self._places[name] = (path, entry.begin, entry.dtype, entry.shape)

    def _files(self) -> list[Path]:
        index, single = self.folder / _INDEX, self.folder / SINGLE_FILE
        if single.is_file():
            return [single]
        if not index.is_file():
            raise ModelError(f"{self.folder.name} holds neither {SINGLE_FILE} nor {_INDEX}")
        try:
            names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{_INDEX} of {self.folder.name} is damaged: {error}") from error
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ModelError(f"{_INDEX} in {self.folder.name} names {name!r}, which is no file beside it")
            if not (self.folder / name).exists():
                raise ModelError(f"the weight file {name} of {self.folder.name} is missing")
        return [self.folder / name for name in sorted(names)]

    def names(self) -> list[str]:
        """All tensors' names, sorted."""
        return sorted(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def _place(self, name: str) -> tuple[Path, int, torch.dtype, tuple[int, ...]]:
        if name not in self._places:
            raise ModelError(f"{self.folder.name} has no tensor {name}")
        return self._places[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor; raises ModelError where there is none of that name."""
        return self._place(name)[3]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype in which a tensor is stored."""
        return self._place(name)[2]

    def tensor(self, name: str, dtype: torch.dtype | None = None, index: int | None = None) -> Tensor:
        """A tensor in memory of its own, converted piece by piece to ``dtype`` where given; of one that is a
        stack, the member at ``index`` alone."""
        path, begin, stored, shape = self._place(name)
        if index is not None:
            shape = shape[1:]
            begin += index * math.prod(shape) * stored.itemsize
        out = torch.empty(shape, dtype=dtype or stored)
        flat = out.reshape(-1)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(begin)
                if out.dtype == stored:
                    _read_into(file, flat)
                else:
                    piece = torch.empty(min(PIECE, flat.numel()), dtype=stored)
                    for part in torch.split(flat, PIECE):
                        _read_into(file, piece[: part.numel()])
                        part.copy_(piece[: part.numel()])
        except (OSError, EOFError) as error:
            raise ModelError(f"cannot read the tensor {name} from {path.name}: {error}") from error
        return out


def _read_into(file: Any, flat: Tensor) -> None:
    if flat.numel() == 0:
        return
    room = flat.view(torch.uint8).numpy().data
    while room:
        count = file.readinto(room)
        if not count:
            raise EOFError("the file ends before the tensor does")
        room = room[count:]


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, every parameter that a module registers in this thread goes to the meta device, while buffers
    stay real: rotary frequencies are computed by constructors and are in no file."""
    owner = threading.get_ident()
    with _ONE_AT_A_TIME:
        original = nn.Module.register_parameter

        def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
            if threading.get_ident() == owner and param is not None and param.device.type != "meta":
                param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
            original(self, name, param)

        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def empty_model(folder: Path) -> PreTrainedModel:
    """The causal language model that ``config.json`` in ``folder`` describes: parameters on the meta device,
    tied ones tied; buffers real; evaluation mode. Weights are not looked at. Raises ModelError."""
    from transformers import AutoConfig, AutoModelForCausalLM

    name = Path(folder).name
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with _parameters_on_meta():
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # a damaged configuration may break transformers anywhere
        raise ModelError(
            f"transformers makes no causal language model of {name}: {_first_line(error)}"
        ) from error
    if unknown := [key for key, value in _numbers(config.to_dict()) if value != value]:
        raise ModelError(f"the config of {name} is damaged: {unknown[0]} is no number (NaN)")
    decodes = {module.is_decoder for module in model.modules() if hasattr(module, "is_decoder")}
    if False in decodes and not getattr(model.config, "is_decoder", True):
        raise ModelError(
            f"{name} is no causal language model: {type(model).__name__} reads a text in both directions "
            "(is_decoder is false in config.json); gossamer.sparsify takes any PyTorch model"
        )
    for module in model.modules():
        if hasattr(module, "scalar_embed_scale"):  # made in the config's dtype, but meant for the weight's
            module.embed_scale = torch.tensor(module.scalar_embed_scale, dtype=torch.float32)
    model.tie_weights()
    model.eval()
    return model


def skeleton(folder: Path, *, apart: bool = True) -> PreTrainedModel:
    """`empty_model` of ``folder``, checked against its weight files: ready for `materialize`. With ``apart``
    fused experts are taken apart (`gossamer.nn.experts`), and its layers are those of a checkpoint.

    Every parameter must be in the files with its shape (a tied one under any of its names), and the files
    may hold nothing else, else ModelError names the tensor: before any work, not after hours of it.
    """
    if is_checkpoint(folder):
        raise ModelError(
            f"{Path(folder).name} is a packed checkpoint, whose weights are no plain tensors: open it with "
            "gossamer.load, or make a dense folder of it with gossamer.export_dense"
        )
    model = empty_model(folder)
    _bind(model, WeightFiles(folder))
    if apart:
        take_apart(model, note=_note_expert)
    return model


def _note_expert(parameter: Tensor, stack: Tensor, index: int, turned: bool) -> None:
    source: Source = stack.gossamer_source  # type: ignore[attr-defined]
    parameter.gossamer_source = source.of_expert(index, turned)  # type: ignore[attr-defined]


def _bind(model: PreTrainedModel, files: WeightFiles) -> None:
    """Notes on every parameter and saved buffer what it is made of: attribute ``gossamer_source``."""
    found = sources(model, files.names())
    tensors: dict[int, Tensor] = {}
    names: dict[int, list[str]] = {}
    for name, tensor in state_of(model):
        tensors[id(tensor)] = tensor
        names.setdefault(id(tensor), []).append(name)
    claimed: set[str] = set()
    for key, tensor in tensors.items():
        known = [found[name] for name in names[key] if name in found]
        if not known:
            raise ModelError(
                f"the tensor {names[key][0]} of {type(model).__name__} is missing from the weight files of "
                f"{files.folder.name}"
            )
        source = known[0]
        if source.convert is None:
            _check_shape(source.names[0], files.shape(source.names[0]), tensor)
        tensor.gossamer_source = source  # type: ignore[attr-defined]
        claimed.update(name for source in known for name in source.names)
    buffers = {name for name, _ in model.named_buffers()}
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    for name, source in found.items():
        unknown = [stored for stored in source.names if stored not in claimed]
        if not unknown or name in buffers or _OLD_BUFFERS.search(name):
            continue
        if not any(pattern.search(name) for pattern in ignored):
            raise ModelError(
                f"{files.folder.name} holds the tensor {unknown[0]}, for which {type(model).__name__} has no "
                "place: its config does not describe these weights"
            )


def _check_shape(name: str, shape: tuple[int, ...], tensor: Tensor) -> None:
    if shape != tuple(tensor.shape):
        raise ModelError(
            f"the tensor {name} has shape {shape} in the weight files, but the model's config asks for "
            f"{tuple(tensor.shape)}"
        )


def materialize(
    module: nn.Module,
    prefix: str,
    files: WeightFiles,
    dtype: torch.dtype | None = None,
    *,
    check_finite: bool = False,
) -> None:
    """Loads the parameters under ``module`` that are on the meta device, and its saved buffers.

    ``prefix``: the module's name in the model ("" for the model itself). ``dtype``: of floating parameters
    in memory; None keeps that of the file. Parameters that are in memory already stay as they are. A
    parameter stays the same object, so tied ones stay tied and load once. Raises ModelError, naming the
    tensor, where one is missing, has another shape or, with ``check_finite``, holds NaN or infinity.
    """
    for name, parameter in module.named_parameters():
        if parameter.device.type == "meta":
            loaded = read_parameter(parameter, join(prefix, name), files, dtype, check_finite)
            fresh = nn.Parameter(loaded, requires_grad=parameter.requires_grad)
            _swap(parameter, fresh)
    buffers = dict(module.named_buffers())
    for name, tensor in state_of(module):
        if name in buffers and (join(prefix, name) in files or hasattr(tensor, "gossamer_source")):
            tensor.copy_(read_parameter(tensor, join(prefix, name), files, tensor.dtype, check_finite))


def release(module: nn.Module) -> None:
    """Puts the parameters under ``module`` back on the meta device: their memory is free. A parameter tied to
    one elsewhere goes there too."""
    for parameter in module.parameters():
        if parameter.device.type != "meta":
            empty = torch.empty_like(parameter, device="meta")
            _swap(parameter, nn.Parameter(empty, requires_grad=parameter.requires_grad))
    if (trim := _malloc_trim()) is not None:
        trim(0)


def load_model(
    source: str | Path, dtype: torch.dtype | str = "auto", *, apart: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The whole model of ``source`` (see `resolve`) in memory, in evaluation mode, and its tokenizer.

    ``dtype``: of its floating parameters; "auto" takes the one in which they are stored. Rotary
    frequencies stay in float32 in any case. ``apart``: with fused experts taken apart, so that its layers are
    those of a checkpoint; else they are as transformers runs them. Raises ModelError.
    """
    from gossamer.models.sources import resolve
    from gossamer.models.tokenizer import load_tokenizer

    folder = resolve(source).folder
    model = skeleton(folder, apart=apart)
    target = None if dtype == "auto" else _dtype(dtype)
    materialize(model, "", WeightFiles(folder), target)
    model.config.dtype = model.dtype
    if (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # a damaged file may break transformers anywhere
            raise ModelError(
                f"generation_config.json in {folder.name} is damaged: {_first_line(error)}"
            ) from error
    return model, load_tokenizer(folder)


def read_parameter(
    tensor: Tensor,
    name: str,
    files: WeightFiles,
    dtype: torch.dtype | None = None,
    check_finite: bool = False,
) -> Tensor:
    """A parameter or saved buffer of a skeleton, read from ``files`` as `materialize` reads it; the model is
    not changed. ``name``: its full name in the model. Raises ModelError as `materialize` does."""
    source: Source = getattr(tensor, "gossamer_source", Source((name,)))

    def read(stored: str, index: int | None = None) -> Tensor:
        return files.tensor(stored, dtype if files.dtype(stored).is_floating_point else None, index)

    if source.convert is None:
        _check_shape(source.names[0], files.shape(source.names[0]), tensor)
    loaded = source.read(read)
    _check_shape(name, tuple(loaded.shape), tensor)
    # the extremes of a tensor that holds NaN are NaN, and need no mask of its size
    extremes = torch.aminmax(loaded) if check_finite and loaded.is_floating_point() and loaded.numel() else ()
    if not all(torch.isfinite(extreme) for extreme in extremes):
        raise ModelError(f"the tensor {name} holds NaN or infinity: these weights are damaged")
    return loaded


def stored_dtype(tensor: Tensor, name: str, files: WeightFiles) -> torch.dtype:
    """The dtype that `read_parameter` gives a parameter or saved buffer where none is asked for."""
    source: Source = getattr(tensor, "gossamer_source", Source((name,)))
    return files.dtype(source.names[0])


@lru_cache(maxsize=1)
def _malloc_trim() -> Callable[[int], int] | None:
    """The C library's call that gives freed memory back. Without it freed blocks and activations
    stay resident: a walk over SmolLM2 (bf16, 2 x 1,024 tokens) peaked at 880 MiB, with it at 510."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # other C libraries have no such call
        return None
    return found


def _swap(parameter: Tensor, fresh: Tensor) -> None:
    """Gives the object ``parameter`` the memory of ``fresh``, wherever it is registered; its notes stay."""
    notes = dict(parameter.__dict__)
    torch.utils.swap_tensors(parameter, fresh)  # type: ignore[no-untyped-call]
    parameter.__dict__.update(notes)


def _dtype(name: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, name, None) if isinstance(name, str) else name
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ModelError(f"{name!r} is no floating dtype; use float32, bfloat16, float16 or auto")
    return found


def _first_line(error: BaseException) -> str:
    """What an error says first: its first line, and the next where that only announces it."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """The numbers in a configuration, each with the key that it, or the list that it is in, lies under."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, str(name))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, (int, float)):
        yield key, value
