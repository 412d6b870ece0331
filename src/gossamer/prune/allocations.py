"""Allocations as methods: of each function of `sparse/allocate` the paper, what it reads, and the claim."""

from __future__ import annotations

from typing import Any, ClassVar

from gossamer.claim import Claim, Experiment
from gossamer.registry import Registry
from gossamer.sparse import allocate

ANY_SPARSITY = ("unstructured", "RxC blocks", "channels")
OF_METHOD = "what the method needs"


class Shares:
    """A way to share one sparsity out over layers. ``split``: the function that does it; ``needs``: what is
    measured beforehand; ``accepts``: patterns; ``group``: where scores compete."""

    name: ClassVar[str]
    split: ClassVar[Any]
    needs: ClassVar[tuple[str, ...]] = ()
    accepts: ClassVar[tuple[str, ...]] = ANY_SPARSITY
    group: ClassVar[str] = "the method's own"
    claim: ClassVar[Claim]


ALLOCATIONS: Registry[Shares] = Registry(
    "allocation",
    dict.fromkeys(("er", "erk", "global", "owl", "sensitivity"), "gossamer.prune.allocations"),
)


@ALLOCATIONS.register(
    "er",
    cite="Mocanu et al. 2018, Scalable Training of Artificial Neural Networks with Adaptive Sparse "
    "Connectivity",
)
class Er(Shares):
    """Erdos-Renyi: densities in proportion to (out + in) / (out * in), so that small layers keep more."""

    split = staticmethod(allocate.er)
    claim = Claim(
        says="Networks that are sparse by Erdos-Renyi from the start, with quadratically fewer weights, lose "
        "no accuracy (trained so; here: pruned by Wanda in one shot, no worse than one sparsity for all).",
        experiment=Experiment(sparsity=0.7, compressed={"er": {"method": "wanda", "allocation": "er"}}),
        metric="perplexity",
        than="wanda",
    )


@ALLOCATIONS.register("erk", cite="Evci et al. 2020, Rigging the Lottery: Making All Tickets Winners")
class Erk(Shares):
    """Erdos-Renyi with kernels: densities in proportion to (out + in + height + width) over their product."""

    split = staticmethod(allocate.erk)
    claim = Claim(
        says="Densities by shape and kernel beat one for all layers (ResNet-50 at 90 %, trained so: 73.0 % "
        "of ImageNet beside 72.0 %; here: pruned by Wanda in one shot).",
        experiment=Experiment(sparsity=0.7, compressed={"erk": {"method": "wanda", "allocation": "erk"}}),
        metric="perplexity",
        than="wanda",
    )


@ALLOCATIONS.register("global", cite="Blalock et al. 2020, What is the State of Neural Network Pruning?")
class Global(Shares):
    """Scores of all layers compete: the lowest go, wherever they lie."""

    split = staticmethod(allocate.global_)
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


@ALLOCATIONS.register(
    "owl",
    cite="Yin et al. 2024, Outlier Weighed Layerwise Sparsity: A Missing Secret Sauce for Pruning LLMs to "
    "High Sparsity",
)
class Owl(Shares):
    """Blocks with more outliers among |W_ij| ||x_j|| keep more weights."""

    split = allocate.OWL
    needs = ("InputNorm",)
    claim = Claim(
        says="LLaMA-7B at 70 %: perplexity 61.22 lower than that of Wanda with one sparsity for all blocks.",
        experiment=Experiment(sparsity=0.7, compressed={"owl": {"method": "wanda", "allocation": "owl"}}),
        metric="perplexity",
        than="wanda",
    )


@ALLOCATIONS.register(
    "sensitivity",
    cite="Frantar & Alistarh 2022, SPDY: Accurate Pruning with Speedup Guarantees; Dong et al. 2020, HAWQ-V2 "
    "(bits in place of weights); Martens & Grosse 2015, K-FAC",
)
class Sensitivity(Shares):
    """The least sum of what the pruning of each layer costs the loss: the method is tried on every layer."""

    split = staticmethod(allocate.sensitivity)
    needs = ("Gram", "Gradient", OF_METHOD)
    accepts = (*ANY_SPARSITY, "N:M under a budget")
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
