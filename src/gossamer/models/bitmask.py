"""compressed-tensors' sparse formats, read and written: what is kept in a row, and a bit for every place.

Of a weight ``(R, C)`` of the linear layer NAME, versions 0.9 to 0.14 of that library store

- sparse-bitmask: ``NAME.shape`` int64 (2,), ``NAME.compressed`` the numbers that are not zero, by rows,
  ``NAME.bitmask`` uint8 (R, ceil(C / 8)), whose bit j % 8 of byte j // 8 is column j, and
  ``NAME.row_offsets`` int64 (R,), how many numbers lie before each row;
- sparse-24-bitmask: ``NAME.shape`` (2, 1), ``NAME.compressed`` (R, C / 2), two numbers of each four columns
  (zeros among them where fewer are not zero), ``NAME.bitmask`` as above.

Versions before wrote ``NAME.weight.bitmask`` and so on. `config.json` tells of it in ``quantization_config``,
at first in ``compression_config``. Nothing of the library is needed here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import ModelError, OutputError
from gossamer.matrices.storage import LazyTensor, write_tensors
from gossamer.models.skeleton import SINGLE_FILE, WeightFiles
from gossamer.progress import Progress, silent

FORMATS = ("sparse-bitmask", "sparse-24-bitmask")
VERSION = "0.14.0"  # of the library whose files these are like
_KEYS = ("quantization_config", "compression_config")
_PARTS = ("shape", "compressed", "bitmask", "row_offsets")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


# ---- one weight


def squeezed(weight: Tensor, kind: str) -> dict[str, Tensor]:
    """The parts of ``weight (R, C)`` in one of the `FORMATS`. Raises OutputError for sparse-24-bitmask where
    four columns hold more than two numbers that are not zero, or C is no multiple of four."""
    kept = weight != 0
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    if kind == FORMATS[0]:
        counts = kept.sum(1)
        offsets = counts.cumsum(0) - counts
        return {"shape": shape, "compressed": weight[kept], "bitmask": _bits(kept), "row_offsets": offsets}
    if weight.shape[1] % 4 or int(kept.reshape(-1, 4).sum(1).max()) > 2:
        raise OutputError("is not 2:4: sparse-24-bitmask takes at most two of each four columns")
    # the first two of four, those that are not zero before all others
    places = kept.reshape(-1, 4).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :2]
    kept = torch.zeros_like(kept.reshape(-1, 4)).scatter_(1, places, True).reshape(weight.shape)
    return {
        "shape": shape[:, None],
        "compressed": weight[kept].reshape(len(weight), -1),
        "bitmask": _bits(kept),
    }


def expanded(parts: Mapping[str, Tensor]) -> Tensor:
    """The weight ``(R, C)`` whose parts these are. Raises ModelError where they do not fit each other."""
    missing = [part for part in _PARTS[:3] if part not in parts]
    if missing:
        raise ModelError(f"its {missing[0]} is missing")
    shape, numbers, bitmask = parts["shape"].flatten().tolist(), parts["compressed"], parts["bitmask"]
    if len(shape) != 2 or min(shape) < 1 or parts["shape"].dtype != torch.int64:
        raise ModelError(f"its shape {shape} is none of a matrix")
    if numbers.dtype not in _FLOATS:
        raise ModelError(f"its numbers are {str(numbers.dtype).removeprefix('torch.')}")
    rows, columns = shape
    if bitmask.dtype != torch.uint8 or tuple(bitmask.shape) != (rows, -(-columns // 8)):
        raise ModelError(f"its bitmask {tuple(bitmask.shape)} is none of {rows} x {columns} weights")
    bits = np.unpackbits(bitmask.numpy(), axis=1, bitorder="little").astype(bool)
    kept = torch.from_numpy(bits[:, :columns])
    counts = kept.sum(1)
    if bits[:, columns:].any() or int(counts.sum()) != numbers.numel():
        raise ModelError(f"its bitmask has {int(bits.sum()):,} bits for {numbers.numel():,} numbers")
    if "row_offsets" in parts and not torch.equal(parts["row_offsets"], counts.cumsum(0) - counts):
        raise ModelError("its row offsets are not those of its bitmask")
    weight = torch.zeros((rows, columns), dtype=numbers.dtype)
    weight[kept] = numbers.flatten()
    return weight


def _bits(kept: Tensor) -> Tensor:
    return torch.from_numpy(np.packbits(kept.numpy(), axis=1, bitorder="little"))


# ---- a model


def told(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a ``config.json`` says of compressed-tensors; None where it says nothing."""
    for key in _KEYS:
        found = config.get(key)
        if isinstance(found, dict) and (
            found.get("quant_method") == "compressed-tensors" or "sparsity_config" in found
        ):
            return found
    return None


def config_of(kind: str, sparsity: float, ignore: list[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a model whose linear layers, but for ``ignore``, are so stored."""
    structure = "2:4" if kind == FORMATS[1] else "unstructured"
    return {
        "quant_method": "compressed-tensors",
        "version": VERSION,
        "format": "dense",
        "sparsity_config": {
            "format": kind,
            "global_sparsity": sparsity,
            "sparsity_structure": structure,
            "targets": ["Linear"],
            "ignore": sorted(ignore),
            "registry_requires_subclass": False,
        },
    }


def convert(source: Path, folder: Path, progress: Progress = silent) -> None:
    """Writes the model in the folder ``source`` into the existing ``folder`` as plain weights with zeros, one
    tensor at a time. ``progress``: stage "convert", in tensors.

    Raises ModelError where weights are quantized besides (this reads the sparse formats alone), in another
    format, or damaged.
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    compression = told(config) or {}
    sparse = compression.get("sparsity_config") or {}
    kind = sparse.get("format", "dense") if isinstance(sparse, dict) else str(sparse)
    if compression.get("config_groups"):
        raise ModelError(
            f"{source.name} is quantized by compressed-tensors ({compression.get('format')}): only its "
            "sparse formats are read, of weights that are floats"
        )
    if kind not in (*FORMATS, "dense"):
        raise ModelError(f"{source.name} is in compressed-tensors' format {kind!r}, which is not read")
    tensors = dict(_plain(WeightFiles(source), progress))
    write_tensors(folder / SINGLE_FILE, tensors, metadata={"format": "pt"})
    for key in _KEYS:
        config.pop(key, None)
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def _plain(files: WeightFiles, progress: Progress) -> Iterator[tuple[str, LazyTensor]]:
    """Every tensor of the dense model by name."""
    names = files.names()
    modules = [name.removesuffix(".bitmask") for name in names if name.endswith(".bitmask")]
    parts = {f"{module}.{part}" for module in modules for part in _PARTS}
    others = [name for name in names if name not in parts]
    total, done = len(modules) + len(others), 0

    def counted(load: Callable[[], Tensor]) -> Tensor:
        nonlocal done
        done += 1
        progress("convert", done, total)
        return load()

    for name in others:
        load = partial(counted, partial(files.tensor, name))
        yield name, LazyTensor(files.dtype(name), files.shape(name), load)
    for module in modules:
        weight = module if module.endswith(".weight") else f"{module}.weight"
        some = {part: f"{module}.{part}" for part in _PARTS if f"{module}.{part}" in files}
        if "shape" not in some or "compressed" not in some:
            raise ModelError(f"{weight} has a bitmask, and no shape or numbers")
        shape = tuple(files.tensor(some["shape"]).flatten().tolist())
        load = partial(counted, partial(_weight, files, weight, some))
        yield weight, LazyTensor(files.dtype(some["compressed"]), shape, load)


def _weight(files: WeightFiles, weight: str, names: Mapping[str, str]) -> Tensor:
    try:
        return expanded({part: files.tensor(name) for part, name in names.items()})
    except ModelError as error:
        raise ModelError(f"{weight} is damaged: {error}") from error
