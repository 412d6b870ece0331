"""What a method of activation sparsity is: its sites, and what an activation weighs besides its size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from gossamer.claim import Claim, Experiment
from gossamer.dynamic.activations.sites import Site, linear_sites
from gossamer.errors import MethodError
from gossamer.registry import Registry, with_options

SELECTIONS = ("threshold", "top_k")


@dataclass
class ActivationMethod:
    """Base of all: activations are scored by ``importance_j * |x_j|``, and the lowest are dropped.

    ``selection``: ``threshold`` drops scores up to one number a site, which calibration finds (tokens differ
    in how many they keep; cheap at run time); ``top_k`` drops the same number for every token, without
    calibration. Raises MethodError for any other.
    """

    name: ClassVar[str] = ""
    gates: ClassVar[str] = "inputs of all linear layers"
    claim: ClassVar[Claim | None] = None

    selection: str = "threshold"

    def __post_init__(self) -> None:
        if self.selection not in SELECTIONS:
            raise MethodError(
                f"unknown selection {self.selection!r} (there are: {', '.join(sorted(SELECTIONS))})"
            )

    def sites(self, model: nn.Module) -> dict[str, Site]:
        """Where ``model`` is gated."""
        return linear_sites(model)

    def importance(self, site: Site, partner_mean: Tensor | None) -> Tensor | None:
        """One factor >= 0 a feature, float32 ``(features,)``; None: all 1. ``partner_mean``: the mean
        absolute output of the site's partner on the calibration text, where it has one."""
        return None


METHODS: Registry[ActivationMethod] = Registry(
    "method of activation sparsity",
    {
        "chess": "gossamer.dynamic.activations.chess",
        "teal": "gossamer.dynamic.activations.teal",
        "topk": "gossamer.dynamic.activations.topk",
        "wina": "gossamer.dynamic.activations.wina",
    },
)


HALF = Experiment(
    sparsity=0.0,
    start="magnitude",
    gated={
        "teal": {"method": "teal", "sparsity": 0.4, "allocation": "greedy"},
        **{
            label: {"method": name, "sparsity": 0.5}
            for label, name in (("half", "teal"), ("topk", "topk"), ("wina", "wina"), ("chess", "chess"))
        },
    },
    against=("half",),
)


def method(name: str, **options: Any) -> ActivationMethod:
    """The method called ``name`` with its options; raises MethodError for an unknown name or option."""
    found = METHODS[name]
    return with_options(found, options, f"the method {name}")
