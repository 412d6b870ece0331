"""One sparsity for all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gossamer.sparse.allocate.method import ALLOCATIONS, Allocation, LayerInfo
from gossamer.sparse.masks import check_sparsity


@ALLOCATIONS.register("uniform", cite="Zhu & Gupta 2017, To Prune, or Not to Prune")
@dataclass(frozen=True)
class Uniform(Allocation):
    """Every layer gets the same sparsity."""

    accepts = (*Allocation.accepts, "N:M")

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
        check_sparsity(sparsity)
        return {layer.name: sparsity for layer in layers}


UNIFORM = Uniform()
