"""CHESS: a threshold for each channel of the MLPs, and only some layers of the attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from gossamer.claim import Claim
from gossamer.dynamic.activations.method import HALF, METHODS, ActivationMethod
from gossamer.dynamic.activations.sites import Site, linear_sites, weight_bytes
from gossamer.errors import MethodError


@METHODS.register(
    "chess", cite="He et al. 2024, CHESS: Channel-Wise Thresholding and Selective Sparsification"
)
@dataclass
class Chess(ActivationMethod):
    """Drops a_j of an MLP's activated gate where |a_j| * E|u_j| is small, u being the up projection's output:
    one threshold t / E|u_j| a channel. In attention, inputs of ``attention`` layers are dropped by size.

    A dropped a_j makes the product a_j u_j zero, so that row j of the up and column j of the down projection
    are not needed; the gate projection stays dense. Needs MLPs ``down(act_fn(gate(x)) * up(x))`` under the
    names that transformers' Llama gives them: MethodError where there are none.
    """

    gates: ClassVar[str] = "activated gates of MLPs, inputs of q and o"

    claim = Claim(
        says="Half of what its thresholds and layers touch can be dropped with little loss.",
        experiment=HALF,
        metric="perplexity",
        than="dense",
        factor=1.1,
    )

    attention: tuple[str, ...] = ("q_proj", "o_proj")

    def sites(self, model: nn.Module) -> dict[str, Site]:
        found = {}
        linears = linear_sites(model)
        for name, site in linears.items():
            parent, _, last = name.rpartition(".")
            if last in self.attention:
                found[name] = site
            elif last == "down_proj":
                up = linears.get(f"{parent}.up_proj")
                activation = getattr(model.get_submodule(parent), "act_fn", None)
                if up is not None and isinstance(activation, nn.Module):
                    act_fn = f"{parent}.act_fn"
                    read = site.bytes + weight_bytes(up.module)
                    found[act_fn] = Site(act_fn, activation, site.features, read, partner=up.module)
        if not any(site.partner for site in found.values()):
            raise MethodError(
                f"{type(model).__name__} has no gated MLP (gate_proj, act_fn, up_proj, down_proj)"
            )
        return found

    def importance(self, site: Site, partner_mean: Tensor | None) -> Tensor | None:
        return partner_mean
