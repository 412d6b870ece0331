"""The least sum of what the pruning of each layer costs the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.sparse.allocate.knapsack import least_error, levels_of
from gossamer.sparse.allocate.method import ALLOCATIONS, OF_METHOD, Allocation, LayerInfo
from gossamer.sparse.masks import check_sparsity


@ALLOCATIONS.register(
    "sensitivity",
    cite="Frantar & Alistarh 2022, SPDY: Accurate Pruning with Speedup Guarantees; Dong et al. 2020, HAWQ-V2 "
    "(bits in place of weights); Martens & Grosse 2015, K-FAC; Sinha & Zoltners 1979, The Multiple-Choice "
    "Knapsack Problem",
)
@dataclass(frozen=True)
class Sensitivity(Allocation):
    """The least sum of what the pruning of each layer costs the loss: the method is tried on every layer.

    Shares come from each layer's ``curve`` by `least_error`, under a budget of kept weights."""

    needs = ("Gram", "Gradient", OF_METHOD)
    accepts = (*Allocation.accepts, "N:M under a budget")
    claim = Claim(
        says="A profile found from the errors measured layer by layer beats one sparsity for all; here by a "
        "tenth of the perplexity at 60 %, in no more bytes.",
        experiment=Experiment(
            sparsity=0.6,
            compressed={
                "sensitivity": {
                    "method": "obs",
                    "allocation": "sensitivity",
                    "sparsity": None,
                    "budget": "7.4bits",  # 60 % of bfloat16 in a bitmap
                },
            },
        ),
        metric="perplexity",
        than="obs",
        factor=0.9,
    )

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
        check_sparsity(sparsity)
        plain = [replace(layer, costs=None) for layer in layers]
        kept = (1 - sparsity) * sum(layer.size for layer in plain)
        if sum(min(level.cost for level in levels_of(layer)) for layer in plain) > kept + 0.5:
            raise MethodError(f"the error curves end below the sparsity {sparsity:g} that was asked for")
        return least_error(plain, kept)
