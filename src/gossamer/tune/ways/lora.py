"""LoRA under masks: low-rank deltas whose merge keeps every zero."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.claim import Claim
from gossamer.errors import MethodError
from gossamer.matrices.values import Quantized
from gossamer.tune.weights import WAYS, WEIGHTS, TunedWeight, seed_of


@dataclass(frozen=True)
class LoraOptions:
    """``rank`` of the deltas, which count ``alpha / rank`` times."""

    rank: int = 16
    alpha: float = 16.0

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise MethodError(
                f"lora takes a rank of at least 1 and an alpha above 0, got {self.rank}, {self.alpha}"
            )


@WEIGHTS.register("lora", cite="Hu et al. 2022, LoRA: Low-Rank Adaptation of Large Language Models")
class LoraWeight(TunedWeight):
    """``W = mask ⊙ (W0 + alpha / rank · B A)``, rounded where values are integers; only ``A`` ``(rank, in)``,
    ``B`` ``(out, rank)`` and the scales are trained. B starts at zero. The mask around the sum is what the
    paper has not."""

    Options: ClassVar[type[Any]] = LoraOptions
    claim = Claim(
        says="Low-rank deltas do as well as tuning all weights.",
        experiment=WAYS,
        metric="perplexity",
        than="full",
        factor=1.02,
    )

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None,
        quantized: Quantized | None = None,
        options: LoraOptions | None = None,
    ) -> None:
        super().__init__(weight, mask, quantized, options)
        first = self.freeze()
        out, width = first.shape
        rank = min(self.options.rank, out, width)
        generator = torch.Generator().manual_seed(seed_of(first))
        self.A = nn.Parameter(torch.randn(rank, width, generator=generator) / width**0.5)
        self.B = nn.Parameter(torch.zeros(out, rank))

    @classmethod
    def state_bytes(cls, shape: tuple[int, int], options: LoraOptions) -> float:
        """W0, the gradient of W and the mask; of A and B what AdamW keeps."""
        return 9 * math.prod(shape) + 16 * min(options.rank, *shape) * sum(shape)

    def size(self) -> float:
        """Steps of B as large as those of W itself. Larger ones, which move single weights as far as tuning
        all of them does, move outputs much further: all weights of a row go together."""
        return float(super().size() * self.options.rank / self.options.alpha)

    def dense(self) -> Tensor:
        share: float = self.options.alpha / self.options.rank
        return torch.addmm(self.latent, self.B, self.A, alpha=share)
