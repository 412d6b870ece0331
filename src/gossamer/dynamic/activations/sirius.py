"""Sirius: the dense model corrects the gated one every few tokens.

Zhou et al. 2024, Sirius: Contextual Sparsity with Correction for Efficient LLMs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from gossamer.claim import Unclaimed
from gossamer.dynamic.activations.gates import Gates
from gossamer.errors import MethodError
from gossamer.models.session import DecodingSession, ScoringSession, Session

UNCLAIMED = Unclaimed(
    name="Sirius",
    cite="Zhou et al. 2024, Sirius: Contextual Sparsity with Correction for Efficient LLMs",
    figures="Dropped activations",
    why="It is of written answers and the time that they take, and claims hold perplexity and KL alone.",
)


class DenseSession(ScoringSession, Protocol):
    """A session that can go back."""

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""


@dataclass(frozen=True)
class Corrected:
    """A continuation, token ids, and by how many tokens each correction advanced it."""

    tokens: tuple[int, ...]
    advances: tuple[int, ...]

    @property
    def mean_advance(self) -> float:
        """The paper's average advance length; it cannot pass the period."""
        return sum(self.advances) / len(self.advances) if self.advances else 0.0


@dataclass(frozen=True)
class Sirius:
    """Every ``period`` tokens the dense model reads what the gated one wrote, in one pass over one cache.

    It keeps the tokens up to the first one that it gives a probability (at ``temperature``) below
    ``threshold``, writes the next token itself, and its keys and values take the place of the gated model's.
    A threshold above 1 keeps none: dense greedy decoding. Period, threshold and temperature are those of the
    paper's code. Raises MethodError for a period below 1, or a temperature or threshold that is not positive.
    """

    period: int = 16
    threshold: float = 0.1
    temperature: float = 0.6

    def __post_init__(self) -> None:
        if self.period < 1 or not self.temperature > 0 or not self.threshold > 0:
            raise MethodError(
                "Sirius needs a period of at least 1, a temperature and a threshold above 0, got "
                f"{self.period!r}, {self.temperature!r} and {self.threshold!r}"
            )

    def generate(
        self,
        dense: DenseSession,
        sparse: DecodingSession,
        ids: Sequence[int],
        max_new_tokens: int,
        stop: Collection[int] = (),
    ) -> Corrected:
        """At most ``max_new_tokens`` greedy tokens after ``ids``, until one of ``stop``.

        ``dense`` and ``sparse`` run one sequence, over one cache: the first must be empty and reads the
        prompt, the second is asked to append tokens alone.
        """
        if max_new_tokens < 1:
            return Corrected((), ())
        tokens = [int(dense.prompt(torch.tensor(ids)).argmax())]
        advances: list[int] = []
        while len(tokens) < max_new_tokens and tokens[-1] not in stop:
            start, before = dense.length, len(tokens)  # all tokens but the last are in the cache
            written = [tokens[-1]]
            while len(written) < min(self.period, max_new_tokens - len(tokens)) and written[-1] not in stop:
                written.append(int(sparse.step(written[-1]).argmax()))
            dense.truncate(start)
            logits = dense.logits(torch.tensor(written))
            kept = self._kept(logits, written)
            dense.truncate(start + 1 + kept)
            tokens += written[1 : 1 + kept]
            if tokens[-1] not in stop:
                tokens.append(int(logits[kept].argmax()))
            advances.append(len(tokens) - before)
        return Corrected(tuple(tokens), tuple(advances))

    def _kept(self, logits: Tensor, written: list[int]) -> int:
        """How many tokens after the first of ``written`` the dense ``logits`` ``(n, vocab)`` let stand."""
        chances = (logits[:-1] / self.temperature).softmax(-1)
        given = chances.gather(1, torch.tensor(written[1:], dtype=torch.int64)[:, None])[:, 0]
        return int((given >= self.threshold).long().cumprod(0).sum())


class GatedSession:
    """``session`` with ``gates`` in its model while it appends a token: the sparse side in transformers."""

    def __init__(self, session: Session, gates: Gates) -> None:
        self.session, self.gates = session, gates

    @property
    def length(self) -> int:
        return self.session.length

    def prompt(self, ids: Tensor) -> Tensor:
        """Append the tokens ``ids``, int64 ``(n,)``."""
        with self.gates.attach(self.session.model):
            return self.session.prompt(ids)

    def step(self, token: int) -> Tensor:
        """Append one token."""
        with self.gates.attach(self.session.model):
            return self.session.step(token)
