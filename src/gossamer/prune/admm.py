"""ADMM: mask and weights of a layer found together, each step exact for all weights at once.

The layer's problem min_Z ||(W - Z) X||^2, Z in the pattern, is split into X̂ (close to W in outputs) and Z (in
the pattern), which a scaled dual U pulls together (Boyd et al. 2011):

    X̂ = (W H + rho (Z - U)) (H + rho I)^-1        Z = mask * (X̂ + U)        U = U + X̂ - Z

with H = X Xᵀ, inputs scaled to norm 1 so that one rho fits all and the largest |X̂ + U| are those worth
keeping. The mask is chosen anew each step while sparsity rises along a cubic; then it is fixed, and some
steps more take the kept weights close to their least-squares optimum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.calibrate import Gram
from gossamer.claim import Claim, Experiment
from gossamer.errors import CalibrationError, MethodError
from gossamer.matrices.values import Quantized, ValueType
from gossamer.prune.method import METHODS, Layer, Method, Pruned, round_values
from gossamer.prune.obs import OBS, Rounder, inverse_factor, invert, sweep
from gossamer.sparse import NM, Block, Pattern, Unstructured, mask_from_scores


@METHODS.register("admm", cite="Boza 2024, Fast and Effective Weight Update for Pruned Large Language Models")
@dataclass
class ADMM(Method):
    """Mask and weights found together by alternating directions, under a sparsity that rises.

    ``rising``: steps in which the mask is chosen anew; ``settling``: steps after it with the mask fixed;
    ``damping``: added to the scaled Gram matrix, whose diagonal is 1; ``rho``: how hard both are pulled
    together. Integer values are rounded by the OBS sweep with the mask fixed. The paper's settings, but that
    plain ``unstructured`` compares within rows: the authors' code compares over the whole layer, and does so
    at the final sparsity in every step.
    """

    rising: int = 15
    settling: int = 5
    damping: float = 0.1
    rho: float = 1.0
    needs = (Gram,)
    accepts = (Unstructured, NM, Block)
    comparison_group = "row"
    claim = Claim(
        says="A better solution of SparseGPT's own problem, and so the best perplexity of pruned LLMs.",
        experiment=Experiment(sparsity=0.7, against=("random", "magnitude", "wanda", "obs")),
        metric="perplexity",
        than="obs",
        factor=0.95,
    )

    def __post_init__(self) -> None:
        if self.rising < 1 or self.settling < 0:
            raise MethodError("steps are counted: rising at least 1, settling at least 0")
        if not (0 < self.damping < 10 and 0 < self.rho < 1000):
            raise MethodError(f"damping and rho are positive numbers, got {self.damping} and {self.rho}")

    def prune(self, layer: Layer, pattern: Pattern, sparsity: float, values: ValueType, group: int) -> Pruned:
        if sparsity == 0:
            return OBS().prune(layer, pattern, sparsity, values, group)
        problem = _problem(layer[Gram], self.damping, self.rho)
        target = layer.weight.masked_fill(problem.dead, 0.0) * problem.norm
        solved, mask = self._solve(target, problem, pattern, sparsity)
        weight = solved / problem.norm
        if not values.is_integer:
            return round_values(weight, mask, values, group)
        factor = inverse_factor(layer[Gram], 0.01, "natural")
        rounder = Rounder(values, group, weight, mask, factor)
        swept = sweep(weight, factor, mask, None, rounder)
        codes = Quantized(swept.codes, rounder.scales, group, values, rounder.clamped)
        return Pruned(codes.to_dense(), mask, codes, {"clamped_scales": rounder.clamped})

    def _solve(
        self, target: Tensor, problem: Problem, pattern: Pattern, sparsity: float
    ) -> tuple[Tensor, Tensor]:
        """The pruned weight (of scaled inputs) and its mask."""
        pull = target @ problem.gram
        found, dual = target, torch.zeros_like(target)
        mask = torch.ones_like(target, dtype=torch.bool)
        for step in range(self.rising + self.settling):
            wanted = found + dual
            if step < self.rising:
                share = 1 - (1 - (step + 1) / self.rising) ** 3
                mask = rising_mask(wanted.square(), pattern, sparsity, share)
            kept = wanted * mask
            dual = wanted - kept
            found = (pull + self.rho * (kept - dual)) @ problem.inverse
        return (found + dual) * mask, mask


@dataclass(frozen=True)
class Problem:
    """A layer's problem with its inputs scaled to norm 1: ``norm`` of each input, ``gram`` of the scaled ones
    with damping, ``inverse`` of ``gram + rho I``; ``dead``: inputs that were always zero."""

    norm: Tensor
    gram: Tensor
    inverse: Tensor
    dead: Tensor


def _problem(gram: Gram, damping: float, rho: float) -> Problem:
    """Made once, shared by all layers with these inputs. Raises CalibrationError where ``gram`` cannot be a
    Gram matrix."""
    key = ("admm", damping, rho)
    if key not in gram.factors:
        norm = gram.matrix.diagonal().clamp_min(0).sqrt()
        dead = norm == 0
        norm = norm.masked_fill(dead, 1.0)
        scaled = gram.matrix / norm
        scaled /= norm[:, None]
        scaled.diagonal()[dead] = 1.0
        scaled.diagonal().add_(damping)
        inverse = scaled.new_empty(scaled.shape).T.copy_(scaled)
        inverse.diagonal().add_(rho)
        if not invert(inverse):
            raise CalibrationError(
                "the Gram matrix of the inputs is not positive definite: the calibration inputs are damaged"
            )
        gram.factors[key] = Problem(norm, scaled, inverse, dead)
    found: Problem = gram.factors[key]
    return found


def rising_mask(scores: Tensor, pattern: Pattern, sparsity: float, share: float) -> Tensor:
    """The mask at ``share`` of the way to ``sparsity``: that of ``pattern``, or of N:M the weights that it
    prunes, lowest first."""
    if share >= 1:
        return mask_from_scores(scores, pattern, sparsity)
    if not isinstance(pattern, NM):
        return mask_from_scores(scores, pattern, sparsity * share)
    kept = mask_from_scores(scores, pattern, sparsity)
    pruned = 1 - int(kept.sum()) / kept.numel()
    return mask_from_scores(scores.masked_fill(kept, torch.inf), Unstructured("tensor"), pruned * share)
