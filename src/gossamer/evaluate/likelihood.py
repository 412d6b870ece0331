"""Log-likelihoods of continuations through a decoding session: what answers is what is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from gossamer.errors import EvaluationError
from gossamer.models.session import DecodingSession, SessionFactory, all_logits


class LikelihoodReader:
    """Reads log-likelihoods one after another, and runs a beginning that two of them share only once.

    ``context_length``: positions that the model has, or None; longer contexts lose their first tokens.
    """

    def __init__(self, start: SessionFactory, context_length: int | None = None) -> None:
        self._start, self._limit = start, context_length
        self._session: DecodingSession | None = None
        self._ids: list[int] = []  # what the session holds
        self.reused = 0

    @torch.inference_mode()
    def __call__(self, context: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """log p(continuation | context) in nats, and whether each of its tokens is the likeliest.

        Both are token ids, at least one each. ``reused`` then says how many positions were not run again.
        Raises EvaluationError for an empty side, a continuation longer than the model's context, and logits
        that are not finite.
        """
        ids = self._cut([*context, *continuation], len(continuation))
        last = len(ids) - len(continuation) - 1  # of the context; its logits predict the continuation's first
        if last < 0 or not continuation:
            raise EvaluationError("a log-likelihood needs a context and a continuation of a token or more")
        # an exception midway (Ctrl-C) leaves a session that is half written: then there is none
        session, self._session = self._rewound(ids, last), None
        if session.length < last:
            session.prompt(torch.tensor(ids[session.length : last]))
        logp = all_logits(session, torch.tensor(ids[last:-1])).log_softmax(dim=-1)
        self._session, self._ids = session, ids[:-1]
        targets = torch.tensor(ids[last + 1 :])
        total = float(logp.gather(-1, targets[:, None]).sum(dtype=torch.float64))
        if not math.isfinite(total):
            raise EvaluationError("the model gives logits that are NaN or infinite: no likelihood exists")
        return total, bool((logp.argmax(dim=-1) == targets).all())

    def _cut(self, ids: list[int], continuation: int) -> list[int]:
        """The last tokens that fit; the very last one is only predicted, and takes no position."""
        if self._limit is None:
            return ids
        if continuation > self._limit:
            raise EvaluationError(
                f"a continuation of {continuation:,} tokens does not fit a context of {self._limit:,}"
            )
        return ids[-(self._limit + 1) :]

    def _rewound(self, ids: list[int], last: int) -> DecodingSession:
        """A session that holds the first ``session.length <= last`` of ``ids``."""
        session, self.reused = self._session, 0
        if session is None or not getattr(session, "rewinds", False):
            return self._start()
        pairs = zip(ids[:last], self._ids, strict=False)
        shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(last, len(self._ids)))
        if not shared:
            return self._start()
        session.truncate(shared)  # type: ignore[attr-defined]
        self.reused = shared
        return session
