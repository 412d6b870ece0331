"""Erdos-Renyi with kernels: `er` in which the size of a convolution's kernel counts, too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.claim import Claim, Experiment
from gossamer.sparse.allocate.er import in_proportion
from gossamer.sparse.allocate.method import ALLOCATIONS, Allocation, LayerInfo


@ALLOCATIONS.register("erk", cite="Evci et al. 2020, Rigging the Lottery: Making All Tickets Winners")
@dataclass(frozen=True)
class Erk(Allocation):
    """Erdos-Renyi with kernels: densities in proportion to (out + in + height + width) over their product.

    Of linear layers they are those of `er`."""

    claim = Claim(
        says="Densities by shape and kernel beat one for all layers (ResNet-50 at 90 %, trained so: 73.0 % "
        "of ImageNet beside 72.0 %; here: pruned by Wanda in one shot).",
        experiment=Experiment(sparsity=0.7, compressed={"erk": {"method": "wanda", "allocation": "erk"}}),
        metric="perplexity",
        than="wanda",
    )

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
        return in_proportion(layers, sparsity, [sum(layer.shape) / layer.size for layer in layers])
