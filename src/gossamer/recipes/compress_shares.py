"""How a compression's layers share its sparsity: measured in a walk of its own where they compete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer.calibrate import WorkFolder
from gossamer.calibrate.stream import Visit
from gossamer.errors import OutputError, ResumeError
from gossamer.models.walk import ModelParts, prunable, weight_of
from gossamer.nn.experts import inside_experts, share_of_tokens
from gossamer.prune import Combination, Layer
from gossamer.recipes.compress_budget import Prices
from gossamer.recipes.layer_shares import (
    Needs,
    allocation_needs,
    competing_scores,
    curve,
    format_errors,
    outlier_scores,
)
from gossamer.recipes.side_by_side import side_by_side
from gossamer.sparse.allocate import LayerInfo, least_error, least_error_formats
from gossamer.sparse.allocate.owl import OWL

LayerOf = Callable[[Visit, str], Layer]


@dataclass(frozen=True)
class Allocated:
    """By the layer's name its sparsity (None: dense), and where several number formats compete its format."""

    shares: dict[str, float | None]
    formats: dict[str, str] = field(default_factory=dict)


class Walk(Protocol):
    """Visits the blocks of the dense model, with statistics of ``needs``."""

    def __call__(self, work: WorkFolder, stage: str, needs: Needs) -> Iterator[Visit]: ...


def allocate(
    layers: list[LayerInfo],
    combination: Combination,
    work: WorkFolder,
    walk: Walk,
    layer_of: LayerOf,
    prices: Prices | None = None,
) -> Allocated:
    """What each of ``layers`` becomes; what the allocation needs to know is measured first and kept in
    ``work``. ``prices``: what layers cost, where there is a budget."""
    done = work.path / "allocation.json"
    if done.exists():
        return _read_allocated(done)
    if prices is not None:
        combination = replace(combination, sparsity=prices.sparsity())
    measure = _MEASURES.get(combination.allocation)
    if measure is not None:
        folder = WorkFolder(work.path / "scores", work.fingerprint)
        visits = walk(folder, "scoring", allocation_needs(combination))
        layers = measure(layers, combination, folder, visits, layer_of)
    if prices is None:
        found = Allocated(combination.split(layers, combination.sparsity))
        if measure is None:
            return found
    else:
        priced = [replace(layer, costs=partial(prices.cost, layer)) for layer in layers]
        if combination.formats:
            formats = least_error_formats(priced, prices.left)
            found = Allocated(dict.fromkeys(formats, 0.0), formats)
        else:
            found = Allocated(least_error(priced, prices.left))
    work.write(done.name, json.dumps(asdict(found)).encode())
    return found


def _read_allocated(path: Path) -> Allocated:
    try:
        return Allocated(**_read_json(path))
    except (ValueError, TypeError) as error:
        raise ResumeError(f"{path.name} in the work folder is damaged; delete it to decide anew") from error


def layers_of(parts: ModelParts, config: object) -> Iterator[LayerInfo]:
    """The prunable layers, by name, shape and block, and by the share of tokens that a model of this
    ``config`` sends them."""
    for block in parts.blocks:
        holders = inside_experts(block.module)
        for inner, module in prunable(block).items():
            reached = share_of_tokens(holders.get(module, module), config)
            shape = tuple(weight_of(module).shape)
            yield LayerInfo(f"{block.name}.{inner}", shape, block=block.name, reached=reached)


def _scores(
    layers: list[LayerInfo],
    combination: Combination,
    work: WorkFolder,
    visits: Iterator[Visit],
    layer_of: LayerOf,
) -> list[LayerInfo]:
    """The layers with the method's scores, which lie on disk."""
    for visit in visits:
        for name in visit.layers:
            units = competing_scores(layer_of(visit, name), combination)
            work.write(f"{name}.scores", units.numpy().tobytes())
    return [
        replace(layer, scores=partial(_read_scores, work.path / f"{layer.name}.scores")) for layer in layers
    ]


def _read_scores(path: Path) -> Tensor:
    return torch.frombuffer(bytearray(_read(path)), dtype=torch.float32)


def _read_json(path: Path) -> Any:
    return json.loads(_read(path))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise OutputError(f"the scores {path.name} vanished from the work folder") from error


def _outliers(
    layers: list[LayerInfo],
    combination: Combination,
    work: WorkFolder,
    visits: Iterator[Visit],
    layer_of: LayerOf,
) -> list[LayerInfo]:
    """The layers with the share of outliers among their block's |W_ij| ||x_j||."""

    def scores(visit: Visit) -> Iterator[Tensor]:
        return (outlier_scores(layer_of(visit, name)) for name in visit.layers)

    assert isinstance(combination.split, OWL)
    for visit in visits:
        found = combination.split.outlier_share(partial(scores, visit))
        work.write(f"{visit.name}.outliers", json.dumps(found).encode())
    return [replace(layer, outliers=_read_json(work.path / f"{layer.block}.outliers")) for layer in layers]


def _curves(
    layers: list[LayerInfo],
    combination: Combination,
    work: WorkFolder,
    visits: Iterator[Visit],
    layer_of: LayerOf,
) -> list[LayerInfo]:
    """The layers with what the method costs each at sparsities around the one asked for, or in each of the
    formats that compete."""
    ask, kind = (format_errors, "formats") if combination.formats else (curve, "curve")

    def measured(visit: Visit, name: str) -> tuple[str, Any]:
        return name, ask(layer_of(visit, name), combination)

    for visit in visits:
        for name, found in side_by_side(partial(measured, visit), visit):
            work.write(f"{name}.curve", json.dumps(found).encode())

    def told(layer: LayerInfo) -> Any:
        return tuple(map(tuple, _read_json(work.path / f"{layer.name}.curve")))

    return [replace(layer, **{kind: told(layer)}) for layer in layers]


_MEASURES = {"global": _scores, "owl": _outliers, "sensitivity": _curves}
