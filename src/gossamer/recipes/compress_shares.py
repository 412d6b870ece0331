"""How a compression's layers share its sparsity: measured in a walk of its own where they compete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer.calibrate import Gradient, Gram, InputNorm, Statistic, WorkFolder
from gossamer.calibrate.stream import Visit
from gossamer.errors import OutputError
from gossamer.matrices.values import value_type
from gossamer.models.walk import ModelParts, prunable, weight_of
from gossamer.prune import Combination, Layer
from gossamer.prune.method import check_finite
from gossamer.recipes.compress_budget import Prices
from gossamer.recipes.side_by_side import side_by_side
from gossamer.sparse import NM
from gossamer.sparse.allocate import LayerInfo, allocation, least_error, outlier_share
from gossamer.sparse.masks import unit_scores

Needs = tuple[type[Statistic], ...]
LayerOf = Callable[[Visit, str], Layer]


class Walk(Protocol):
    """Visits the blocks of the dense model, with statistics of ``needs``."""

    def __call__(self, work: WorkFolder, stage: str, needs: Needs) -> Iterator[Visit]: ...


def allocation_needs(combination: Combination) -> Needs:
    """The statistics that the allocation's own walk gathers, none where there is no such walk."""
    method = combination.method.needs
    found: dict[str, Needs] = {
        "global": method,
        "owl": (InputNorm,),
        "sensitivity": tuple(dict.fromkeys((*method, Gram, Gradient))),
    }
    return found.get(combination.allocation, ()) if combination.prunes else ()


def allocate(
    parts: ModelParts,
    combination: Combination,
    work: WorkFolder,
    walk: Walk,
    layer_of: LayerOf,
    prices: Prices | None = None,
) -> dict[str, float | None]:
    """Each layer's sparsity; what the allocation needs to know is measured first and kept in ``work``.
    ``prices``: what layers cost, where there is a budget."""
    done = work.path / "allocation.json"
    if done.exists():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    layers = list(layers_of(parts))
    if prices is not None:
        combination = replace(combination, sparsity=prices.sparsity())
    measure = _MEASURES.get(combination.allocation)
    if measure is not None and combination.prunes:
        folder = WorkFolder(work.path / "scores", work.fingerprint)
        visits = walk(folder, "scoring", allocation_needs(combination))
        layers = measure(layers, combination, folder, visits, layer_of)
    if prices is None:
        shares = allocation(combination.allocation)(layers, combination.sparsity)
    else:
        priced = [replace(layer, costs=prices.costs[layer.shape]) for layer in layers]
        shares = least_error(priced, prices.left)
    work.write(done.name, json.dumps(shares).encode())
    return shares


def layers_of(parts: ModelParts) -> Iterator[LayerInfo]:
    """The prunable layers, by name, shape and block."""
    for block in parts.blocks:
        for inner, module in prunable(block).items():
            yield LayerInfo(f"{block.name}.{inner}", tuple(weight_of(module).shape), block=block.name)


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
            layer = layer_of(visit, name)
            check_finite(layer)
            units = unit_scores(combination.method.scores(layer), combination.pattern).contiguous()
            work.write(f"{name}.scores", units.float().numpy().tobytes())
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
        for name in visit.layers:
            layer = layer_of(visit, name)
            check_finite(layer)
            yield layer.weight.abs() * layer[InputNorm].norm

    for visit in visits:
        work.write(f"{visit.name}.outliers", json.dumps(outlier_share(partial(scores, visit))).encode())
    return [replace(layer, outliers=_read_json(work.path / f"{layer.block}.outliers")) for layer in layers]


def _curves(
    layers: list[LayerInfo],
    combination: Combination,
    work: WorkFolder,
    visits: Iterator[Visit],
    layer_of: LayerOf,
) -> list[LayerInfo]:
    """The layers with what the method costs each at sparsities around the one asked for."""

    def curve(visit: Visit, name: str) -> tuple[str, list[tuple[float, float]]]:
        layer = layer_of(visit, name)
        check_finite(layer)
        return name, [(s, loss_change(layer, combination, s)) for s in levels(combination)]

    for visit in visits:
        for name, found in side_by_side(partial(curve, visit), visit):
            work.write(f"{name}.curve", json.dumps(found).encode())
    return [
        replace(layer, curve=tuple(map(tuple, _read_json(work.path / f"{layer.name}.curve"))))
        for layer in layers
    ]


def levels(combination: Combination) -> list[float]:
    """Sparsities at which layers are tried: around the one asked for, or N:M's own."""
    sparsity = combination.sparsity
    if isinstance(combination.pattern, NM):
        return [sparsity]
    less = [sparsity * share for share in (0.4, 0.7, 0.85, 1.0)]
    return less + [1 - (1 - sparsity) * share for share in (0.8, 0.6, 0.4)]


def loss_change(layer: Layer, combination: Combination, sparsity: float) -> float:
    """What pruning the layer to ``sparsity`` adds to the loss, to second order: outputs that move by d cost
    sum_i g_i^2 d_i^2 / 2 a token, g the gradient of the loss by outputs, taken as independent of d and of
    each other (as in K-FAC, Martens & Grosse 2015). The method's own updates included, rounding left out.

    Sums of relative output errors, all layers alike, would let layers that matter little to the loss count
    as much as those that matter most."""
    pruned = combination.method.prune(
        layer, combination.pattern, sparsity, value_type("float32"), combination.group
    )
    change, gram = layer.weight - pruned.weight, layer[Gram]
    moved = ((change @ gram.matrix) * change).sum(dim=1) / gram.tokens
    return float((layer[Gradient].outputs.double() * moved.double()).sum() / 2)


_MEASURES = {"global": _scores, "owl": _outliers, "sensitivity": _curves}
