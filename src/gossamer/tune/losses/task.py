"""Cross-entropy of the next token: what the model was trained on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import cross_entropy

from gossamer.claim import Claim
from gossamer.tune.losses.loss import DRAWN, LOSSES, LogitLoss


@LOSSES.register("task", cite="cross-entropy of the next token")
@dataclass(frozen=True)
class Task(LogitLoss):
    """-log p(next token)."""

    needs_teacher: ClassVar[bool] = False
    claim: ClassVar[Claim | None] = Claim(
        says="Weights that one shot kept, tuned on the text alone, win most of its perplexity back.",
        experiment=DRAWN,
        metric="perplexity",
        than="obs",
        factor=0.5,
    )

    def of(self, logits: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, reduction="none")
