"""Allocations: one budget split over layers. All functions of a budget of sparsity have one signature.

``(layers, sparsity) -> {name: sparsity}``, where None leaves a layer dense. A budget of anything else that
layers cost (bytes, time) is split by `least_error`, of which `sensitivity` is the case of kept weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import MethodError, ScoreError
from gossamer.registry import with_options
from gossamer.sparse.masks import check_sparsity, count_pruned

Allocation = Callable[["Sequence[LayerInfo]", float], "dict[str, float | None]"]


@dataclass(frozen=True)
class LayerInfo:
    """What an allocation may know of a layer.

    ``shape``: (out, in), or (out, in, height, width) of a kernel. ``scores`` gives the layer's scores, one
    for each unit that the pattern keeps or prunes whole (weights, blocks or channels), as a flat float32
    tensor; it is called as often as needed, so that scores may lie on disk. ``outliers``: the share of
    outliers in the layer's ``block``. ``curve``: (sparsity, error) as measured, errors comparable between
    layers. ``formats``: in place of a curve, (name, error) of each number format that it may have, dense.
    ``costs``: what the layer costs at a sparsity, or in a format, in whatever a budget is of; never rising
    with sparsity, perhaps falling in steps (None: the weights that it keeps). ``reached``: the share of
    tokens that it reads.
    """

    name: str
    shape: tuple[int, ...]
    scores: Callable[[], Tensor] | None = None
    block: str = ""
    outliers: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    formats: tuple[tuple[str, float], ...] = ()
    costs: Callable[[Any], float] | None = None
    reached: float = 1.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def cost(self, choice: Any) -> float:
        """What the layer costs at a sparsity, or in a format."""
        return (1 - choice) * self.size if self.costs is None else self.costs(choice)


def uniform(layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
    """Every layer gets the same sparsity."""
    check_sparsity(sparsity)
    return {layer.name: sparsity for layer in layers}


def global_(layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
    """Scores of all layers compete: the lowest go, wherever they lie.

    Exactly ``floor(sparsity * n + 0.5)`` of all n units are pruned (ties: earlier layer, lower index
    first), save that every layer keeps its best unit. Reads one layer's scores at a time: the k-th
    smallest is found digit by digit on the bits of the scores, which for numbers >= 0 sort as integers.
    """
    missing = [layer.name for layer in layers if layer.scores is None]
    if missing:
        raise MethodError(f"the global allocation needs scores, and {missing[0]} has none")
    sizes = {layer.name: len(_bits(layer)) + 1 for layer in layers}
    wanted = count_pruned(sum(sizes.values()), sparsity)
    wanted = min(wanted, sum(sizes.values()) - len(sizes))
    if wanted == 0:
        return {layer.name: 0.0 for layer in layers}
    high, left = _kth_digit(layers, wanted, lambda bits: bits >> 16)
    low, left = _kth_digit(layers, left, lambda bits: (bits & 0xFFFF)[bits >> 16 == high])
    threshold = (high << 16) | low
    pruned = {}
    for layer in layers:
        bits = _bits(layer)
        ties = min(left, int((bits == threshold).sum()))
        left -= ties
        pruned[layer.name] = int((bits < threshold).sum()) + ties
    return {name: pruned[name] / sizes[name] for name in pruned}


def _bits(layer: LayerInfo) -> np.ndarray:
    """The layer's scores as sortable integers, its best one left out."""
    assert layer.scores is not None
    scores = layer.scores().detach().float().flatten().numpy()
    if np.isnan(scores).any() or (scores < 0).any():
        raise ScoreError(f"the scores of {layer.name} are NaN or negative: they cannot compete globally")
    return np.delete(np.abs(scores).view(np.uint32), scores.argmax()).astype(np.int64)


def _kth_digit(
    layers: Sequence[LayerInfo], k: int, digit: Callable[[np.ndarray], np.ndarray]
) -> tuple[int, int]:
    """The 16-bit digit of the k-th smallest (1-based), and its rank among those that share the digit."""
    counts = np.zeros(1 << 16, dtype=np.int64)
    for layer in layers:
        counts += np.bincount(digit(_bits(layer)), minlength=1 << 16)
    below = np.cumsum(counts)
    found = int(np.searchsorted(below, k))
    return found, k - int(below[found] - counts[found])


def er(layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
    """Erdos-Renyi: densities in proportion to (out + in) / (out * in), whatever the kernel (Mocanu et al.
    2018, Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity)."""
    return _in_proportion(layers, sparsity, [sum(la.shape[:2]) / math.prod(la.shape[:2]) for la in layers])


def erk(layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
    """Erdos-Renyi with kernels: densities in proportion to (out + in + height + width) over their product; of
    linear layers the same as `er` (Evci et al. 2020, Rigging the Lottery)."""
    return _in_proportion(layers, sparsity, [sum(la.shape) / la.size for la in layers])


def _in_proportion(
    layers: Sequence[LayerInfo], sparsity: float, ratios: Sequence[float]
) -> dict[str, float | None]:
    """Densities ``epsilon * ratio``; layers that would exceed 1 are dense, and the others bear the rest."""
    check_sparsity(sparsity)
    full: set[int] = set()
    while True:
        # kept weights: (1 - sparsity) of all = those of dense layers + epsilon * sum of ratio * size
        kept = (1 - sparsity) * sum(la.size for la in layers) - sum(layers[i].size for i in full)
        thin = [i for i in range(len(layers)) if i not in full]
        epsilon = kept / sum(ratios[i] * layers[i].size for i in thin) if thin else 0.0
        over = {i for i in thin if epsilon * ratios[i] > 1}
        if not over:
            break
        full |= over
    return {la.name: 0.0 if i in full else 1 - epsilon * ratios[i] for i, la in enumerate(layers)}


@dataclass(frozen=True)
class OWL:
    """Blocks with more outliers among |W_ij| ||x_j|| keep more: densities rise with their share, at most
    2 * ``spread`` from least to most (Yin et al. 2024, Outlier Weighed Layerwise Sparsity).

    ``outlier``: times the mean of a block's scores, over which one is an outlier (M); ``spread``: λ. Both are
    by default the authors' choice for LLaMA. Raises MethodError where they are none.
    """

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if self.outlier <= 0:
            raise MethodError(f"owl's outlier is a multiple of the mean above 0, got {self.outlier:g}")
        if not 0 < self.spread <= 0.5:
            raise MethodError(f"owl's spread of sparsities is above 0 and at most 0.5, got {self.spread:g}")

    def outlier_share(self, scores: Callable[[], Iterable[Tensor]]) -> float:
        """The share of outliers among a block's scores; ``scores`` gives those of one layer after the other,
        and is called twice."""
        total = count = over = 0.0
        for part in scores():
            total, count = total + float(part.sum(dtype=torch.float64)), count + part.numel()
        for part in scores():
            over += int((part > self.outlier * total / count).sum())
        return over / count

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
        check_sparsity(sparsity)
        found = [layer.outliers for layer in layers if layer.outliers is not None]
        if len(found) < len(layers):
            raise MethodError("the allocation owl needs the share of outliers in every block")
        shares, sizes = np.array(found), np.array([layer.size for layer in layers], dtype=float)
        span = float(shares.max() - shares.min())
        if span == 0:
            return uniform(layers, sparsity)
        more = (shares - shares.min()) / span * 2 * self.spread
        more -= (more * sizes).sum() / sizes.sum()
        # near sparsity 0 or 1 there is less room than the spread
        more *= min(1.0, sparsity / more.max(), 0.99 * (1 - sparsity) / -more.min())
        # where the room is all used, rounding may pass it
        return {la.name: max(0.0, float(sparsity - m)) for la, m in zip(layers, more, strict=True)}


def sensitivity(layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
    """The split with the least sum of errors, by the ``curve`` of each layer: `least_error` under a budget of
    kept weights."""
    check_sparsity(sparsity)
    plain = [replace(layer, costs=None) for layer in layers]
    kept = (1 - sparsity) * sum(layer.size for layer in plain)
    if sum(min(level.cost for level in _levels(layer)) for layer in plain) > kept + 0.5:
        raise MethodError(f"the error curves end below the sparsity {sparsity:g} that was asked for")
    return least_error(plain, kept)


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
    hulls = [_hull(_levels(layer)) for layer in layers]
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
    return _buy_back([_levels(layer) for layer in layers], chosen, -over)


def _levels(layer: LayerInfo) -> list[Level]:
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


ALLOCATIONS: dict[str, Callable[..., Allocation]] = {
    "uniform": lambda: uniform,
    "global": lambda: global_,
    "er": lambda: er,
    "erk": lambda: erk,
    "owl": OWL,
    "sensitivity": lambda: sensitivity,
}


def allocation(name: str, options: Mapping[str, Any] | None = None) -> Allocation:
    """The allocation called ``name`` with its options; raises MethodError for an unknown name or option."""
    if name not in ALLOCATIONS:
        raise MethodError(f"unknown allocation {name!r} (there are: {', '.join(sorted(ALLOCATIONS))})")
    return with_options(ALLOCATIONS[name], options or {}, f"the allocation {name}")
