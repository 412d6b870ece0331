"""Gates for a finished model: calibrated on text, and saved with it in a checkpoint of layers that suit."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

from gossamer.dynamic.activations import Gates, calibrate, greedy, settle
from gossamer.dynamic.activations import method as activation_method
from gossamer.dynamic.activations.gates import FILE
from gossamer.errors import MethodError
from gossamer.kernels.native import native, native_available
from gossamer.matrices import Matrix, Packed
from gossamer.matrices.atomic import check_free
from gossamer.matrices.geometry import holds, parse_layout
from gossamer.models.checkpoint import is_checkpoint, load_checkpoint
from gossamer.models.checkpoint_writer import CheckpointWriter
from gossamer.models.contents import open_checkpoint
from gossamer.models.place import takes_matrix
from gossamer.models.skeleton import load_model
from gossamer.models.sources import resolve
from gossamer.models.text import TextSource, calibration_windows, read_text
from gossamer.models.tokenizer import load_tokenizer
from gossamer.models.walk import find_parts, prunable, weight_of
from gossamer.paths import expanded
from gossamer.progress import Progress, silent
from gossamer.recipes.load import check_context
from gossamer.sparse.masks import check_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Allocation = Literal["uniform", "greedy"]
GREEDY_TOKENS = 512  # of the first window, that the search for each layer's share runs on


@dataclass(frozen=True)
class Gated:
    """The checkpoint that was made, its gates, names of the weights that lie in ``columns``, and how many
    matrices the blocks have (``weights``); ``smoke_test``: calibrated on the prose inside Python."""

    path: Path
    gates: Gates
    columns: tuple[str, ...]
    weights: int
    smoke_test: bool

    @property
    def dropped(self) -> float:
        """The mean share of activations that gates are set to drop, over sites."""
        return statistics.mean(gate.sparsity for gate in self.gates.gates.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "out": str(self.path),
            "method": self.gates.method,
            "sites": len(self.gates.gates),
            "dropped": self.dropped,
            "weights": self.weights,
            "weights_in_columns": len(self.columns),
            "smoke_test": self.smoke_test,
        }


@dataclass(frozen=True)
class _Source:
    """A model in memory and what it is written from again."""

    model: PreTrainedModel
    folder: Path
    label: str
    matrices: dict[str, Matrix]
    plain: dict[str, Tensor]
    ties: dict[str, str]
    made: dict[str, Any]


def gate(
    model: str | Path,
    out: str | Path,
    *,
    method: str = "teal",
    sparsity: float = 0.4,
    allocation: Allocation = "uniform",
    text: TextSource = None,
    seqlen: int = 1024,
    windows: int = 8,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Gated:
    """Calibrates gates for ``model`` (a checkpoint, or any other source, whose linear layers are then packed
    as bfloat16, or else float32) and writes both as the new checkpoint ``out``, which `load` runs gated.

    ``sparsity``: the share of the activations that every site drops, or, with ``greedy``, of the bytes of
    every block that are skipped. Values of weights stay exactly; those whose inputs are dropped past the
    break-even of the layout ``columns`` are laid out so. ``text``: as for `compress`. Raises a GossamerError
    for whatever a person can mend; nothing of ``out`` exists then.
    """
    chosen = activation_method(method, **(options or {}))
    check_sparsity(sparsity)
    if allocation not in get_args(Allocation):
        raise MethodError(f"unknown allocation {allocation!r}; there are: {', '.join(get_args(Allocation))}")
    out = Path(out)
    check_free(out)
    read = read_text(text)
    source = _open(model, progress)
    check_context(source.model.config, seqlen, source.label)
    ids = calibration_windows(read, load_tokenizer(source.folder), seqlen, windows, seed)
    progress("calibrating gates", 0, 2)
    calibrated = calibrate(source.model, chosen, ids)
    levels: Any = sparsity
    if allocation == "greedy":
        levels = greedy(source.model, calibrated, sparsity, ids[:1, :GREEDY_TOKENS], progress=progress)
    progress("calibrating gates", 1, 2)
    gates = settle(source.model, calibrated.gates(levels), ids)
    progress("calibrating gates", 2, 2)
    columns = _columns(source, gates)
    made = {
        "method": chosen.name,
        "selection": chosen.selection,
        "sparsity_requested": sparsity,
        "allocation": allocation,
        "calibration": {
            "text": read.label, "smoke_test": read.smoke, "windows": windows, "seqlen": seqlen, "seed": seed,
        },
        "columns": list(columns),
    }  # fmt: skip
    _write(source, out, gates, columns, {**source.made, "activations": made}, progress)
    inside = tuple(f"{block.name}." for block in find_parts(source.model).blocks)
    count = sum(name.startswith(inside) for name in source.matrices)
    return Gated(out, gates, columns, count, read.smoke)


def _open(model: str | Path, progress: Progress) -> _Source:
    path = expanded(model)
    if is_checkpoint(path):
        progress(f"loading {path.resolve().name}", 0, 1)
        contents = open_checkpoint(path, "none")  # loading checks the bytes
        found = load_checkpoint(path)
        progress(f"loading {path.resolve().name}", 1, 1)
        matrices = {name: contents.matrix(name) for name in contents.manifest.matrices}
        plain = {name: contents.weights.tensor(name) for name in contents.plain}
        manifest = contents.manifest
        return _Source(found, path, path.resolve().name, matrices, plain, manifest.ties, manifest.made)
    folder = resolve(str(model), progress=progress)
    loaded, _ = load_model(folder.folder, "auto", apart=True)
    packed: dict[str, Matrix] = {}
    for block in find_parts(loaded).blocks:
        for inner, module in prunable(block).items():
            if takes_matrix(module):
                weight = weight_of(module).detach()
                values = "bfloat16" if weight.dtype == torch.bfloat16 else "float32"
                packed[f"{block.name}.{inner}.weight"] = Packed.pack(weight, values, "dense")
    plain = {name: t for name, t in loaded.state_dict(keep_vars=True).items() if name not in packed}
    made = {"job": "gate", "model": folder.label}
    return _Source(loaded, folder.folder, folder.label, packed, plain, {}, made)


def _columns(source: _Source, gates: Gates) -> tuple[str, ...]:
    """Names of weights to lay out as columns (not all values can; without native kernels none)."""
    if not native_available():
        return ()
    past = past_break_even(gates)
    columns = parse_layout("columns")
    leaves = ((n, m) for n, m in source.matrices.items() if isinstance(m, Packed))
    fitting = (n for n, m in leaves if holds(columns, m.value_type))
    return tuple(name for name in fitting if name.removesuffix(".weight") in past)


def past_break_even(gates: Gates) -> set[str]:
    """Linear layers whose inputs are dropped past the break-even of the layout columns. The two that an MLP
    multiplies side by side are laid out alike, by the mean of both."""
    shares: dict[str, float] = {}
    for site, found in gates.gates.items():
        parent, _, last = site.rpartition(".")
        reader = f"{parent}.down_proj" if last == "act_fn" else site
        shares[reader] = max(shares.get(reader, 0.0), found.sparsity)
    for name in list(shares):
        parent, _, last = name.rpartition(".")
        if last in ("gate_proj", "up_proj"):
            pair = [f"{parent}.gate_proj", f"{parent}.up_proj"]
            shares |= dict.fromkeys(pair, statistics.mean(shares.get(one, 0.0) for one in pair))
    return {name for name, share in shares.items() if share > 1 - native().most_active}


def _write(
    source: _Source,
    out: Path,
    gates: Gates,
    columns: tuple[str, ...],
    made: dict[str, Any],
    progress: Progress,
) -> None:
    writer = CheckpointWriter(out, source.folder, progress=progress)
    stored: dict[str, Any] = dict(source.plain)
    for index, (name, matrix) in enumerate(source.matrices.items()):
        progress("packing", index, len(source.matrices))
        pays = name in columns and isinstance(matrix, Packed)
        stored[name] = cast("Packed", matrix).repack("columns") if pays else matrix
    progress("packing", len(source.matrices), len(source.matrices))
    for name, value in stored.items():
        writer.add_matrix(name, value) if isinstance(value, Matrix) else writer.add_tensor(name, value)
    for name, target in source.ties.items():
        value = stored[target]
        writer.add_matrix(name, value) if isinstance(value, Matrix) else writer.add_tensor(name, value)
    writer.add_file(FILE, (json.dumps(gates.to_dict()) + "\n").encode())
    writer.finish(made)
