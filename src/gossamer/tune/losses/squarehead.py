"""SquareHead: hidden states of every block drawn to the dense model's, all blocks counting alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.claim import Claim
from gossamer.tune.losses.loss import DRAWN, LOSSES, StateLoss


@LOSSES.register(
    "squarehead",
    cite="Kurtic et al. 2023, Sparse Finetuning for Inference Acceleration of Large Language Models",
)
@dataclass(frozen=True)
class SquareHead(StateLoss):
    """Σ over blocks of mse(f, f_teacher) / mse(f_teacher, 0).

    ``per_token`` (ours) divides token by token: the first token of a text often has hidden states a hundred
    times as large as others', and is otherwise most of the loss.
    """

    claim: ClassVar[Claim | None] = Claim(
        says="Fine-tuning that follows the dense model block by block recovers highly sparse models where "
        "the task loss alone does not.",
        experiment=DRAWN,
        metric="perplexity",
        than="task",
    )

    per_token: bool = False

    def of(self, states: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        total = torch.zeros(())
        for f, want in zip(states, teacher, strict=True):
            error = (f.float() - want.float()).square().mean(-1)
            size = want.float().square().mean(-1)
            least = torch.finfo(torch.float32).tiny
            ratio = (
                error / size.clamp_min(least)
                if self.per_token
                else error.mean() / size.mean().clamp_min(least)
            )
            total = total + ratio.mean()
        return total
