"""Divergence of the next token's distribution from the teacher's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.claim import Claim
from gossamer.errors import MethodError
from gossamer.tune.losses.loss import DRAWN, LOSSES, LogitLoss


@LOSSES.register("kl", cite="Hinton et al. 2015, Distilling the Knowledge in a Neural Network")
@dataclass(frozen=True)
class KL(LogitLoss):
    """T² KL(p_teacher || p), both softmax(logits / T), in nats a token."""

    claim: ClassVar[Claim | None] = Claim(
        says="The teacher's whole distribution teaches more than the text's own next tokens.",
        experiment=DRAWN,
        metric="perplexity",
        than="task",
    )

    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise MethodError(f"the temperature of kl is above 0, got {self.temperature}")

    def of(self, logits: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        assert teacher is not None
        if self.temperature != 1.0:
            logits, teacher = logits / self.temperature, teacher / self.temperature
        log_p, log_q = logits.log_softmax(-1), teacher.log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1) * self.temperature**2
