"""DSnoT: masks fine-tuned by pruning and growing, no weight changed and nothing trained."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.calibrate import InputMoments, InputNorm
from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.matrices.values import ValueType, value_type
from gossamer.prune.method import METHODS, Layer, Method, Pruned, round_values, seeded
from gossamer.sparse import NM, Pattern, Unstructured, mask_from_scores

CYCLES = 50 / 4096  # swaps for each input of a row


@METHODS.register(
    "dsnot", cite="Zhang et al. 2024, Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse LLMs"
)
@dataclass
class DSnoT(Method):
    """Swaps pruned and kept weights of a mask until each output's mean is that of the dense layer.

    An output's mean error is the sum of W_ij E[x_j] over its pruned weights. Each cycle grows the pruned
    weight that lowers it most by its size over the variance of its input, and prunes the kept weight of the
    least |W_ij| ||x_j|| that lowers it too (in N:M: of the same group, whatever its sign, as long as the
    error's sign stays). A weight is swapped once. ``start``: the method of the first mask, that of its scores
    for the dense layer where it has any, else the one that it finds, whatever it does to kept weights;
    ``cycles``: swaps a row at most, by default as large a share of it as the authors' 50 are of the 4,096
    inputs of LLaMA-7B, since so many do harm in narrow rows; ``threshold``: mean error at which a row is
    done, by default the authors' 0.1 for sums over windows of 2,048 tokens; ``skip``: layers within a module
    of this name keep their first mask, by default ``mlp`` as in the authors' code; ``skip=`` swaps in all;
    ``seed``: of a start that draws.
    """

    start: str = "wanda"
    cycles: int | None = None
    threshold: float = 0.1 / 2048
    skip: str = "mlp"
    seed: int = 0
    needs = (InputNorm, InputMoments)
    accepts = (Unstructured, NM)
    comparison_group = "row"
    claim = Claim(
        says="LLaMA-7B at 70 %: perplexity 26.79 lower than that of Wanda, whose masks it starts from.",
        experiment=Experiment(
            sparsity=0.7,
            against=("random", "magnitude", "wanda", "50 swaps"),
            compressed={"50 swaps": {"method": "dsnot", "options": {"cycles": 50}}},
        ),
        metric="perplexity",
        than="wanda",
    )

    def __post_init__(self) -> None:
        self.first = seeded(self.start, self.seed, {})
        if isinstance(self.first, DSnoT):
            raise MethodError("dsnot starts from another method's masks")
        if (self.cycles or 0) < 0 or self.threshold < 0:
            raise MethodError(
                f"cycles and threshold are not negative, got {self.cycles} and {self.threshold}"
            )
        # of this object: its class does not know where it starts
        vars(self)["needs"] = tuple(dict.fromkeys((*DSnoT.needs, *self.first.needs)))

    @property
    def has_scores(self) -> bool:
        return self.first.has_scores

    def scores(self, layer: Layer) -> Tensor:
        return self.first.scores(layer)

    def start_mask(self, layer: Layer, pattern: Pattern, sparsity: float, group: int) -> Tensor:
        """The mask before any swap."""
        if self.first.has_scores:
            return mask_from_scores(self.first.scores(layer), pattern, sparsity)
        mask = self.first.prune(layer, pattern, sparsity, value_type("float32"), group).mask
        assert mask is not None
        return mask

    def prune(self, layer: Layer, pattern: Pattern, sparsity: float, values: ValueType, group: int) -> Pruned:
        importance = layer[InputNorm].norm.square()
        if sparsity == 0:
            return round_values(layer.weight, None, values, group, importance)
        start = self.start_mask(layer, pattern, sparsity, group)
        mask = start
        if self.skip not in layer.name.split("."):
            mask = self.swap(layer, start, cell_width(pattern, layer.weight.shape[1]))
        pruned = round_values(layer.weight, mask, values, group, importance)
        pruned.record["swapped"] = int((start & ~mask).sum())
        return pruned

    def swap(self, layer: Layer, start: Tensor, width: int) -> Tensor:
        """The mask after its swaps, each within ``width`` neighbouring inputs."""
        share_of_row = max(1, round(CYCLES * layer.weight.shape[1]))
        cycles = share_of_row if self.cycles is None else self.cycles
        weight, moments = layer.weight, layer[InputMoments]
        share = weight * moments.mean  # of each weight in its output's mean
        gain = share / moments.variance.clamp_min(torch.finfo(torch.float32).tiny)
        cost = weight.abs() * layer[InputNorm].norm
        whole = width >= weight.shape[1]
        cells = torch.arange(weight.shape[1]) // width
        mask, rows = start.clone(), torch.arange(len(weight))
        can_grow, can_prune = ~start, start.clone()
        error = (share * can_grow).sum(dim=1)
        first, active = error.sign(), torch.ones(len(weight), dtype=torch.bool)
        for _ in range(cycles):
            sign = error.sign()[:, None]
            helps = can_grow & (share * sign > 0)
            grown = torch.where(helps, gain * sign, -torch.inf).argmax(dim=1)
            losable = can_prune & (share * sign < 0 if whole else cells == cells[grown][:, None])
            pruned = torch.where(losable, cost, torch.inf).argmin(dim=1)
            after = error + share[rows, pruned] - share[rows, grown]
            active &= (error.abs() > self.threshold) & helps.any(dim=1) & losable.any(dim=1)
            if not whole:
                active &= after.sign() == first
            if not active.any():
                break
            at = rows[active]
            mask[at, grown[at]], mask[at, pruned[at]] = True, False
            can_grow[at, grown[at]] = can_prune[at, pruned[at]] = False
            error = torch.where(active, after, error)
        return mask


def cell_width(pattern: Pattern, features: int) -> int:
    """How many neighbouring inputs a swap may not leave, so that ``pattern`` still allows the mask."""
    if isinstance(pattern, NM):
        return pattern.m
    assert isinstance(pattern, Unstructured)
    if pattern.group.startswith("columns:"):
        return int(pattern.group.removeprefix("columns:"))
    return features
