"""Erdos-Renyi: layers of few inputs and outputs keep more."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.claim import Claim, Experiment
from gossamer.sparse.allocate.method import ALLOCATIONS, Allocation, LayerInfo
from gossamer.sparse.masks import check_sparsity


@ALLOCATIONS.register(
    "er",
    cite="Mocanu et al. 2018, Scalable Training of Artificial Neural Networks with Adaptive Sparse "
    "Connectivity",
)
@dataclass(frozen=True)
class Er(Allocation):
    """Erdos-Renyi: densities in proportion to (out + in) / (out * in), so that small layers keep more."""

    claim = Claim(
        says="Networks that are sparse by Erdos-Renyi from the start, with quadratically fewer weights, lose "
        "no accuracy (trained so; here: pruned by Wanda in one shot, no worse than one sparsity for all).",
        experiment=Experiment(sparsity=0.7, compressed={"er": {"method": "wanda", "allocation": "er"}}),
        metric="perplexity",
        than="wanda",
    )

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
        # a kernel's height and width count for nothing
        ratios = [sum(layer.shape[:2]) / math.prod(layer.shape[:2]) for layer in layers]
        return in_proportion(layers, sparsity, ratios)


def in_proportion(
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
