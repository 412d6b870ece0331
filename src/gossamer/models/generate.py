"""Tokens from a language model, one at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import nn

from gossamer.errors import SamplingError, TextError
from gossamer.models.sampling import Floats, Sampler, Sampling, finite_logits, log_probabilities
from gossamer.models.session import PrefixSession, Session, context_length

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GREEDY = Sampling()


@dataclass(frozen=True)
class Token:
    """A new token; where they were asked for, its log-probability (nats) and ``top``, the likeliest tokens
    in its place with theirs, likeliest first. They are the model's own, before penalty, temperature and
    filters."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def generate(
    model: nn.Module,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    sampling: Sampling = _GREEDY,
    stop: frozenset[int] = frozenset(),
    logprobs: int | None = None,
    session: PrefixSession | None = None,
) -> Iterator[Token]:
    """New tokens after ``ids``, one at a time, until one of ``stop`` (not given out), ``max_new_tokens``,
    or the end of the positions that the model knows.

    ``logprobs``: also their log-probabilities and those of so many of the likeliest tokens; ``session``: what
    runs the tokens, and may have run their beginning before (else ``model``, as a transformers decoder).
    Same arguments, same tokens (on one machine with the same number of threads).
    Raises SamplingError for negative ``logprobs``, ModelError for damaged weights, and TextError for a prompt
    that is empty or longer than the model's context.
    """
    count = room(model, ids, max_new_tokens)
    if logprobs is not None and logprobs < 0:
        raise SamplingError(f"logprobs must be 0 (of the chosen token alone) or more, got {logprobs}")
    session = session or PrefixSession(lambda: Session(model))
    return _tokens(session, ids, count, sampling, stop, logprobs)


def room(model: nn.Module, ids: Sequence[int], max_new_tokens: int) -> int:
    """How many of ``max_new_tokens`` there are positions for after ``ids``: the last token needs none to be
    given out. Raises TextError for ``ids`` that are empty or longer than the model's context."""
    limit = context_length(model.config)
    if len(ids) == 0:
        raise TextError("the prompt is empty: give at least one token to continue from")
    if limit is None:
        return max_new_tokens
    if len(ids) > limit:
        raise TextError(f"the prompt has {len(ids)} tokens, but the model knows only {limit} positions")
    return min(max_new_tokens, int(limit) - len(ids) + 1)


def _tokens(
    session: PrefixSession,
    ids: Sequence[int],
    count: int,
    sampling: Sampling,
    stop: frozenset[int],
    logprobs: int | None,
) -> Iterator[Token]:
    if count < 1:
        return
    sampler = Sampler(sampling, ids)
    logits = finite_logits(session.read(ids))
    for left in range(count - 1, -1, -1):
        token = sampler.choose(logits)
        if token in stop:
            return
        yield Token(token) if logprobs is None else _with_logprobs(token, logits, logprobs)
        if left:
            logits = finite_logits(session.step(token))


def _with_logprobs(token: int, logits: Floats, count: int) -> Token:
    found = log_probabilities(logits)
    count = min(count, len(found))
    likeliest = np.argpartition(-found, count - 1)[:count] if count else np.empty(0, np.int64)
    likeliest = likeliest[np.lexsort((likeliest, -found[likeliest]))]
    return Token(token, float(found[token]), tuple((int(i), float(found[i])) for i in likeliest))


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """All end tokens that the model's generation settings, its configuration and the tokenizer name."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        named: Any = getattr(owner, "eos_token_id", None)
        if named is not None:
            found.update([named] if isinstance(named, int) else named)
    return frozenset(found)
