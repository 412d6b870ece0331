"""What a loss is: of a token's logits, or of hidden states, with or without a teacher's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gossamer.claim import Claim, Experiment
from gossamer.registry import Registry, with_options


@dataclass(frozen=True)
class Loss:
    """Base of all; options are fields."""

    name: ClassVar[str] = ""
    needs_teacher: ClassVar[bool] = True
    claim: ClassVar[Claim | None] = None


class LogitLoss(Loss):
    """A loss of logits, token by token, so that no more than a few tokens' logits are ever in memory."""

    def of(self, logits: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
        """float32 ``(tokens,)`` from logits ``(tokens, vocabulary)``, the teacher's, and the next tokens."""
        raise NotImplementedError


class StateLoss(Loss):
    """A loss of the hidden states behind every block."""

    def of(self, states: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """A float32 scalar from states ``(tokens, width)``, one for each block."""
        raise NotImplementedError


LOSSES: Registry[Loss] = Registry(
    "loss", {name: f"gossamer.tune.losses.{name}" for name in ("kl", "squarehead", "task")}
)


DRAWN = Experiment(
    sparsity=0.75,
    against=("obs", "task"),
    tuning={"tokens": 65_536, "seqlen": 256},
    tuned={
        "squarehead": {"losses": {"task": 1, "squarehead": 1}},
        "task": {"losses": {"task": 1}},
        "kl": {"losses": {"kl": 1}},
    },
)


def loss(name: str, **options: Any) -> Loss:
    """The loss called ``name`` with its options; raises MethodError for an unknown name or option."""
    found = LOSSES[name]
    return with_options(found, options, f"the loss {name}")
