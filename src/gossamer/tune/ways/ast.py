"""AST: masks may still move while the model is tuned, within the pattern, and stand still at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.matrices.values import Quantized
from gossamer.sparse import mask_from_scores, parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.sparse.patterns import NM
from gossamer.tune.weights import WEIGHTS, TunedWeight, check_kept

BOOSTED = {"method": "ast", "options": {"pattern": "2:4"}, "beside": {"sums": 16}}
"""AST-Boosted: with one more weight for each output and 16 inputs."""


@dataclass(frozen=True)
class AstOptions:
    """``pattern``: the N:M that masks stay within; ``every``: steps between two choices of masks; ``decay``:
    λ of what is pruned, which rises to this over the first half of the run; ``freeze``: the share of the run
    after which masks stand still (ours; in the paper a falling rate ends their moves); ``begin``: what was
    pruned begins as ``dense`` weights, as in the paper, which goes with masks of the largest weights that are
    still the dense ones, or at ``zero``, where kept weights were updated for what was pruned (OBS)."""

    pattern: str = "2:4"
    every: int = 10
    decay: float = 6e-5
    freeze: float = 0.75
    begin: str = "zero"

    def __post_init__(self) -> None:
        if not isinstance(parse_pattern(self.pattern), NM):
            raise MethodError(f"ast moves masks within N:M patterns such as 2:4, not {self.pattern}")
        if self.begin not in ("dense", "zero"):
            raise MethodError(f"ast begins what was pruned as dense or zero, not {self.begin!r}")
        if self.every < 1 or self.decay < 0 or not 0 <= self.freeze <= 1:
            raise MethodError(
                "ast takes every of at least 1, a decay of at least 0 and a freeze in 0 to 1, got "
                f"{self.every}, {self.decay}, {self.freeze}"
            )


@WEIGHTS.register(
    "ast",
    cite="Huang et al. 2025, Pruning Large Language Models with Semi-Structural Adaptive Sparse Training",
)
class AstWeight(TunedWeight):
    """The forward pass sees ``mask ⊙ W``, and gradients reach all of W, what is pruned included (STE), which
    also decays: ``g + λ (1 - mask) ⊙ W`` (SR-STE, Zhou et al. 2021), λ annealed. Masks keep the largest
    ``|W|`` of each group of the pattern.

    The paper's extra parameters lie beside the weights: ``beside={"sums": 16}`` (`gossamer.tune.beside`).
    What was pruned starts at zero, or as the dense model's weights (``begin``, `fill`). The paper
    adds the decay behind Adam's mean of gradients; here it is part of the gradient, as in SR-STE.
    """

    Options: ClassVar[type[Any]] = AstOptions
    accepts = "N:M, moving"
    needs_masks = True
    claim = Claim(
        says="Distillation in which 2:4 masks may still move ends below distillation with fixed ones.",
        experiment=Experiment(
            pattern="2:4",
            sparsity=None,
            against=("obs", "boosted"),
            tuning={"tokens": 65_536, "seqlen": 256, "losses": {"kl": 1}},
            tuned={"ast": {"method": "ast", "options": {"pattern": "2:4"}}, "full": {}, "boosted": BOOSTED},
        ),
        metric="perplexity",
        than="full",
    )
    steps: Tensor

    @classmethod
    def brings_back(cls, options: AstOptions) -> bool:
        return options.begin == "dense"

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None,
        quantized: Quantized | None = None,
        options: AstOptions | None = None,
    ) -> None:
        super().__init__(weight, mask, quantized, options)
        if mask is None:
            raise MethodError("ast moves masks, and this weight has none")
        self._pattern = parse_pattern(self.options.pattern)
        check_mask(mask, self._pattern)
        asked = mask_from_scores(self.latent.detach().abs(), self._pattern)
        check_kept(mask, int(asked.sum()), self._pattern)
        self.register_buffer("mask", mask.clone())  # in the state now, since it moves
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._decay, self._frozen = 0.0, False

    @torch.no_grad()
    def fill(self, dense: Tensor) -> None:
        assert self.mask is not None
        if self.options.begin == "zero":
            return
        self.latent.copy_(torch.where(self.mask, self.latent, dense.float()))

    def before_step(self, fraction: float) -> None:
        self._decay = self.options.decay * min(1.0, 2 * fraction)
        self._frozen = fraction >= self.options.freeze

    def gradients(self, grad: Tensor, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        kept, to_scales = super().gradients(grad, latent)
        if self._frozen or self.mask is None:
            return kept, to_scales
        pruned = 1.0 - self.mask.float()
        return kept.addcmul_(pruned, grad.float().add(latent, alpha=self.added(self._decay))), to_scales

    @torch.no_grad()
    def after_step(self, fraction: float) -> None:
        self.steps += 1
        if not self._frozen and int(self.steps) % self.options.every == 0 and self.mask is not None:
            self.mask.copy_(mask_from_scores(self.latent.abs(), self._pattern))
