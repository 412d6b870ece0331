"""One sequence in progress: what a decoder offers, transformers' as one, and the reuse of prefixes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from gossamer.models.attention import decoding


class DecodingSession(Protocol):
    """A sequence that grows: both methods append tokens and return the float32 logits ``(vocab,)`` of the
    token that comes next. ``length``: tokens so far."""

    @property
    def length(self) -> int: ...
    def prompt(self, ids: Tensor) -> Tensor:
        """Append the tokens ``ids``, int64 ``(n,)`` with n >= 1."""

    def step(self, token: int) -> Tensor:
        """Append one token."""


@runtime_checkable
class ScoringSession(DecodingSession, Protocol):
    """A session that also gives the logits of every position that it appends."""

    def logits(self, ids: Tensor) -> Tensor:
        """Append ``ids``, int64 ``(n,)``; the float32 logits after each of them, ``(n, vocab)``."""


SessionFactory = Callable[[], DecodingSession]


def context_length(config: Any) -> int | None:
    """Positions that a model of this configuration knows; None where it does not say.

    Rotary positions that are stretched (``linear``, ``yarn``) reach ``factor`` times as far as before:
    before are ``original_max_position_embeddings``, or where that is not told the configuration's own.
    """
    found: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if found is None or rope.get("rope_type") not in ("linear", "yarn"):
        return found
    before = rope.get("original_max_position_embeddings") or found
    return max(found, int(before * (rope.get("factor") or 1)))


class Session:
    """One sequence in progress: a transformers decoder and its key/value cache."""

    def __init__(self, model: nn.Module) -> None:
        from transformers import DynamicCache

        self.model = model
        self.length = 0
        self._cache = DynamicCache(config=model.config)
        accepted = inspect.signature(model.forward).parameters
        self._last_only: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.inference_mode()
    def prompt(self, ids: Tensor) -> Tensor:
        """Append the tokens ``ids``, int64 ``(n,)`` with n >= 1."""
        return self._append(ids.reshape(1, -1), **self._last_only)[-1]

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Append one token."""
        with decoding(self.model):
            return self._append(torch.tensor([[token]]), **self._last_only)[-1]

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        """Append ``ids``; the logits after each of them, float32 ``(n, vocab)``."""
        return self._append(ids.reshape(1, -1))

    @property
    def rewinds(self) -> bool:
        """Whether `truncate` can go anywhere: caches of windows and of states forget what they had."""
        from transformers.cache_utils import DynamicLayer

        return all(type(layer) is DynamicLayer for layer in self._cache.layers)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if length < self.length:
            self._cache.crop(length - self.length)  # negative: so many are removed
            self.length = length

    def _append(self, ids: Tensor, **options: Any) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **options)
        self.length += ids.shape[1]
        logits: Tensor = out.logits[0]
        return logits.float()


def all_logits(session: DecodingSession, ids: Tensor) -> Tensor:
    """Append ``ids`` ``(n,)`` and return the logits after each of them ``(n, vocab)``; token by token where
    the session has no ``logits``."""
    if isinstance(session, ScoringSession):
        return session.logits(ids)
    # cloned: a session may hand out the same memory again
    return torch.stack([session.prompt(token).clone() for token in ids[:, None]])


def step_each(sessions: Sequence[DecodingSession], tokens: Sequence[int]) -> Tensor:
    """Append one token to each of ``sessions``; the float32 logits after them, ``(n, vocab)``: together where
    they are all of a class that has a ``step_each`` (the native decoder's), else one after the other."""
    kind = type(sessions[0])
    together = getattr(kind, "step_each", None)
    if together is not None and all(type(session) is kind for session in sessions):
        found: Tensor = together(sessions, tokens)
        return found
    # cloned: a session may hand out the same memory again
    return torch.stack([one.step(token).clone() for one, token in zip(sessions, tokens, strict=True)])


class PrefixSession:
    """A session that is told whole sequences, and runs only what is new where one extends the other.

    ``reused`` is the number of tokens that the last `read` did not have to run.
    """

    def __init__(self, start: SessionFactory) -> None:
        self._start = start
        self._session: DecodingSession | None = None
        self._logits: Tensor | None = None
        self._ids: list[int] = []
        self.reused = 0

    def read(self, ids: Sequence[int]) -> Tensor:
        """The logits ``(vocab,)`` after ``ids`` (at least one); starts anew unless they begin with all tokens
        that were run so far."""
        self.reused = self.shared(ids)
        if not self.reused:
            self._session, self._logits, self._ids = None, None, []
        if new := list(ids[self.reused :]):
            return self._append(new)
        assert self._logits is not None
        return self._logits

    def step(self, token: int) -> Tensor:
        """The logits after one more token."""
        return self._append([token])

    def shared(self, ids: Sequence[int]) -> int:
        """How many of ``ids`` need not be run again: all that were run so far, or none."""
        known = len(self._ids)
        return known if self._session is not None and list(ids[:known]) == self._ids else 0

    def _append(self, ids: list[int]) -> Tensor:
        # an exception midway (Ctrl-C) leaves a cache that is half written: then there is no session
        session, self._session = self._session or self._start(), None
        if len(ids) == 1 and self._ids:
            self._logits = session.step(ids[0])
        else:
            self._logits = session.prompt(torch.tensor(ids, dtype=torch.int64))
        self._ids += ids
        self._session = session
        return self._logits
