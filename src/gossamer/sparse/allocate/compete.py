"""Scores of all layers compete."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError, ScoreError
from gossamer.sparse.allocate.method import ALLOCATIONS, OF_METHOD, Allocation, LayerInfo
from gossamer.sparse.masks import count_pruned


@ALLOCATIONS.register("global", cite="Blalock et al. 2020, What is the State of Neural Network Pruning?")
@dataclass(frozen=True)
class Global(Allocation):
    """Scores of all layers compete: the lowest go, wherever they lie.

    Exactly ``floor(sparsity * n + 0.5)`` of all n units are pruned (ties: earlier layer, lower index
    first), save that every layer keeps its best unit. Reads one layer's scores at a time: the k-th
    smallest is found digit by digit on the bits of the scores, which for numbers >= 0 sort as integers.
    """

    needs = (OF_METHOD,)
    group = "model"
    claim = Claim(
        says="Magnitudes that compete over the whole model prune better than within each layer.",
        experiment=Experiment(
            against=("random",), compressed={"global": {"method": "magnitude", "allocation": "global"}}
        ),
        metric="perplexity",
        than="magnitude",
    )

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
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
