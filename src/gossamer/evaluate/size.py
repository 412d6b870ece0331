"""How large a model is: bytes on disk and in memory, bits per weight, and how many weights are kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import EvaluationError
from gossamer.evaluate.layers import linear_layers
from gossamer.matrices.matrix import Matrix
from gossamer.models.checkpoint import sketch_of
from gossamer.models.contents import open_checkpoint
from gossamer.models.manifest import MANIFEST
from gossamer.models.skeleton import WeightFiles, materialize, release, skeleton
from gossamer.models.walk import weight_of
from gossamer.nn import StructuredLinear


@dataclass(frozen=True)
class Size:
    """What a model weighs.

    ``parameters``: of the whole model, as its architecture has them: pruned ones counted, tied ones once,
    padding not. ``linear_parameters``: the weights of linear layers inside the blocks (the prunable ones);
    ``linear_kept``: those that masks keep, or, in plain layers, that are not zero; ``linear_bytes``: as
    stored, with masks, scales, offsets and padding.
    ``memory_bytes``: parameters and buffers of a model in memory. ``file_bytes``: of all files in a folder;
    ``weight_file_bytes``: of its safetensors files. Each None where there is no such thing.
    """

    parameters: int
    linear_parameters: int
    linear_kept: int
    linear_bytes: int
    memory_bytes: int | None = None
    file_bytes: int | None = None
    weight_file_bytes: int | None = None

    @property
    def sparsity(self) -> float:
        """Fraction of pruned weights among ``linear_parameters``. (A sum or product of matrices may keep more
        values than it has weights: below 0.)"""
        return 1.0 - self.linear_kept / self.linear_parameters if self.linear_parameters else 0.0

    @property
    def linear_bits(self) -> float:
        """Bits per weight, linear layers only: all that is stored for them over ``linear_parameters``."""
        return 8 * self.linear_bytes / self.linear_parameters if self.linear_parameters else 0.0

    @property
    def all_bits(self) -> float:
        """Bits per weight, all in: the weight files (or the model in memory) over all ``parameters``."""
        held = self.memory_bytes if self.weight_file_bytes is None else self.weight_file_bytes
        return 8 * (held or 0) / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        derived = {"sparsity": self.sparsity, "linear_bits": self.linear_bits, "all_bits": self.all_bits}
        return {**asdict(self), **derived}


def size_of(model: nn.Module | Path | str) -> Size:
    """`size_of_folder` of a path, `size_of_model` of a module."""
    return size_of_model(model) if isinstance(model, nn.Module) else size_of_folder(Path(model))


def size_of_model(model: nn.Module) -> Size:
    """The size of a model in memory."""
    roots, rest = _stored(model)
    counts = [_layer_counts(layer) for layer in linear_layers(model).values()]
    return Size(
        parameters=sum(r.shape[0] * r.shape[1] for r in roots) + sum(p.numel() for p in rest),
        linear_parameters=sum(count[0] for count in counts),
        linear_kept=sum(count[1] for count in counts),
        linear_bytes=sum(count[2] for count in counts),
        memory_bytes=memory_bytes(model),
    )


def memory_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, each piece of memory once, none for those on the meta device."""
    seen: dict[tuple[int, int], int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        if not tensor.is_meta:
            seen[tensor.data_ptr(), tensor.nbytes] = tensor.nbytes
    return sum(seen.values())


def size_of_folder(folder: Path) -> Size:
    """The size of a Hugging Face model folder or of a Gossamer checkpoint, read one layer at a time.

    A checkpoint's structure is checked, its content is not (that is what `gossamer verify` is for).
    Raises EvaluationError where there is no such folder, ModelError and CheckpointError as loading it would.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise EvaluationError(f"{folder} is no folder")
    measure = _checkpoint_counts if (folder / MANIFEST).is_file() else _plain_counts
    parameters, counts = measure(folder)
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    weights = [path for path in files if path.suffix == ".safetensors"]
    return Size(
        parameters=parameters,
        linear_parameters=sum(count[0] for count in counts),
        linear_kept=sum(count[1] for count in counts),
        linear_bytes=sum(count[2] for count in counts),
        file_bytes=sum(path.stat().st_size for path in files),
        weight_file_bytes=sum(path.stat().st_size for path in weights),
    )


_Counts = tuple[int, int, int]  # weights, kept, bytes


def _plain_counts(folder: Path) -> tuple[int, list[_Counts]]:
    model, files = skeleton(folder), WeightFiles(folder)
    counts = []
    for name, layer in linear_layers(model).items():
        materialize(layer, name, files)
        counts.append(_layer_counts(layer))
        release(layer)
    return _parameters(model), counts


def _checkpoint_counts(folder: Path) -> tuple[int, list[_Counts]]:
    contents = open_checkpoint(folder, verify="none")
    model = sketch_of(contents)
    counts = []
    for layer in linear_layers(model):
        name = f"{layer}.weight"
        name = contents.manifest.ties.get(name, name)
        if name in contents.manifest.matrices:
            counts.append(_matrix_counts(contents.matrix(name)))
        else:
            counts.append(_tensor_counts(contents.weights.tensor(name)))
    return _parameters(model), counts


def _layer_counts(layer: nn.Module) -> _Counts:
    return (
        _matrix_counts(layer.matrix)
        if isinstance(layer, StructuredLinear)
        else _tensor_counts(weight_of(layer))
    )


def _matrix_counts(matrix: Matrix) -> _Counts:
    return matrix.shape[0] * matrix.shape[1], matrix.kept, matrix.nbytes


def _tensor_counts(weight: Tensor) -> _Counts:
    return weight.numel(), int(torch.count_nonzero(weight)), weight.nbytes


def _parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _stored(model: nn.Module) -> tuple[list[Matrix], list[Tensor]]:
    """The structured matrices of a model, outermost only, and all parameters outside them; each once."""
    roots: dict[int, Matrix] = {}
    rest: dict[int, Tensor] = {}

    def visit(modules: Iterator[nn.Module]) -> None:
        for module in modules:
            if isinstance(module, Matrix):
                roots[id(module)] = module
            else:
                rest.update((id(p), p) for p in module.parameters(recurse=False))
                visit(module.children())

    visit(iter([model]))
    return list(roots.values()), list(rest.values())
