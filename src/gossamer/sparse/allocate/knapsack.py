"""Any budget split over layers, so that the least is lost: a knapsack over their levels."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from gossamer.errors import MethodError
from gossamer.sparse.allocate.method import LayerInfo


@dataclass(frozen=True)
class Level:
    """A sparsity that a layer may have, or a format, what it then costs, and the error."""

    sparsity: float
    cost: float
    error: float
    values: str = ""


def least_error(layers: Sequence[LayerInfo], budget: float) -> dict[str, float | None]:
    """The split with the least sum of errors, by the ``curve`` of each layer, whose costs sum to at most
    ``budget``; see `_split`."""
    found = _split(layers, budget)
    return {layer.name: level.sparsity for layer, level in zip(layers, found, strict=True)}


def least_error_formats(layers: Sequence[LayerInfo], budget: float) -> dict[str, str]:
    """Of each layer's ``formats`` the one in the split with the least sum of errors whose costs sum to at
    most ``budget`` (so bits are shared out in Dong et al. 2020, HAWQ-V2); see `_split`."""
    found = _split(layers, budget)
    return {layer.name: level.values for layer, level in zip(layers, found, strict=True)}


def _split(layers: Sequence[LayerInfo], budget: float) -> list[Level]:
    """A level of each layer, so that costs sum to at most ``budget`` and errors to little.

    A multiple-choice knapsack over each layer's levels (dense and those of its ``curve``, or its formats),
    solved by its relaxation (Sinha & Zoltners 1979, The Multiple-Choice Knapsack Problem): all layers begin
    at the dearest and walk down the lower convex hull of their (cost, error), the least error for what it
    saves first, until the budget is kept. The last step goes only as far as it must (to a format: all the
    way), and what it leaves buys errors back. The sum is within the error of that one step of the least there
    is; SPDY (Frantar & Alistarh 2022), which solves the same by dynamic programming, rounds costs to do so.
    Raises MethodError where the budget cannot be kept.
    """
    hulls = [_hull(levels_of(layer)) for layer in layers]
    chosen = [hull[0] for hull in hulls]
    steps = [
        ((below.error - above.error) / (above.cost - below.cost), index, place)
        for index, hull in enumerate(hulls)
        for place, (above, below) in enumerate(pairwise(hull))
    ]
    over, rounding = math.fsum(level.cost for level in chosen) - budget, 1e-12 * budget
    for _, index, place in sorted(steps):
        if over <= rounding:
            break
        above, below = chosen[index], hulls[index][place + 1]
        if above.cost - below.cost > over and not layers[index].formats:
            part = _as_far(layers[index], above, below, above.cost - over)
            if layers[index].costs is None or part.error < below.error:  # a sparsity is met exactly
                below = part
        over -= above.cost - below.cost
        chosen[index] = below
    if over > 1e-9 * budget:
        least = math.fsum(hull[-1].cost for hull in hulls)
        raise MethodError(f"the layers cost at least {least:.6g}, and the budget is {budget:.6g}")
    return _buy_back([levels_of(layer) for layer in layers], chosen, -over)


def levels_of(layer: LayerInfo) -> list[Level]:
    """The dearest first."""
    if layer.formats:
        assert layer.costs is not None
        found = (Level(0.0, layer.costs(values), error, values) for values, error in layer.formats)
        return sorted(found, key=lambda level: (-level.cost, level.error))
    if not layer.curve:
        raise MethodError(f"the allocation sensitivity needs error curves, and {layer.name} has none")
    return [Level(s, layer.cost(s), error) for s, error in [(0.0, 0.0), *layer.curve]]


def _hull(levels: Sequence[Level]) -> list[Level]:
    """The corners of the convex function below ``levels``, the dearest first, by falling cost."""
    dearest, *others = levels
    hull = [dearest]
    for level in sorted(others, key=lambda level: (-level.cost, level.error)):
        if level.cost >= hull[-1].cost:
            continue  # pruned for nothing
        while len(hull) > 1:
            a, b = hull[-2:]
            if (b.error - a.error) * (a.cost - level.cost) < (level.error - a.error) * (a.cost - b.cost):
                break
            hull.pop()
        hull.append(level)
    return hull


def _as_far(layer: LayerInfo, above: Level, below: Level, cost: float) -> Level:
    """The level between two that comes down to ``cost`` with the least sparsity, its error between those
    measured."""
    low, high = above.sparsity, below.sparsity
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if layer.cost(middle) <= cost else (middle, high)
    measured = sorted([(0.0, 0.0), *layer.curve])
    at, errors = [s for s, _ in measured], [error for _, error in measured]
    return Level(high, layer.cost(high), float(np.interp(high, at, errors)))


def _buy_back(choices: Sequence[Sequence[Level]], chosen: list[Level], left: float) -> list[Level]:
    """``chosen`` with what is ``left`` of the budget spent on the levels that take away most error."""
    while True:
        gains = [
            (chosen[index].error - level.error, index, level)
            for index, levels in enumerate(choices)
            for level in levels
            if level.error < chosen[index].error and 0 < level.cost - chosen[index].cost <= left
        ]
        if not gains:
            return chosen
        _, index, level = max(gains, key=lambda gain: gain[0])
        left -= level.cost - chosen[index].cost
        chosen[index] = level
