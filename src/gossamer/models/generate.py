"""Tokens from a language model, one at a time, of one text or of several side by side."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from gossamer.errors import GossamerError, SamplingError, TextError
from gossamer.models.sampling import Floats, Sampler, Sampling, finite_logits, log_probabilities
from gossamer.models.session import (
    DecodingSession,
    PrefixSession,
    Session,
    SessionFactory,
    context_length,
    step_each,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AHEAD = 4  # prompts, times those in progress, that may be begun before the first of them has ended
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


@dataclass(frozen=True)
class Prompt:
    """Token ids to go on from, and how: see `generate`. ``ends``: asked behind each new token whether no
    more are wanted."""

    ids: Sequence[int]
    sampling: Sampling = _GREEDY
    ends: Callable[[int], bool] | None = None


@dataclass(frozen=True)
class Written:
    """The new ``tokens`` after a ``prompt``, of which ``room`` was for so many."""

    prompt: Prompt
    tokens: list[int]
    room: int


def generate_each(
    model: nn.Module,
    prompts: Iterable[Prompt],
    max_new_tokens: int,
    *,
    stop: frozenset[int] = frozenset(),
    start: SessionFactory | None = None,
    together: int = 8,
) -> Iterator[Written]:
    """The new tokens after each of ``prompts``, in their order: those that `generate` gives for it alone, up
    to the one at which it ``ends``.

    ``start``: of sessions that run the tokens (None: of ``model``, as a transformers decoder); so many as
    ``together`` are in progress at once, and where they can step side by side (the native decoder's) weights
    are read once for all. Prompts are taken as places fall free, which may be up to ``AHEAD * together``
    prompts before what has been given out. Raises as `generate`, for a prompt when its turn has come.
    """
    if together < 1:
        raise SamplingError(f"at least one prompt is in progress at once, not {together}")
    source, begin = iter(prompts), start or (lambda: Session(model))

    def lines() -> Iterator[_Line]:
        try:
            for prompt in source:
                line = _Line(prompt)
                line.begin(model, max_new_tokens, stop, begin)
                yield line
        except GossamerError as error:  # of what makes the prompts
            yield _Line(Prompt(()), error)

    return _side_by_side(lines(), together)


def _side_by_side(source: Iterator[_Line], together: int) -> Iterator[Written]:
    """The tokens of every line, in their order, ``together`` of them in progress at once."""
    lines, over = deque[_Line](), False
    while lines or not over:
        running = [line for line in lines if line.session is not None]
        while not over and len(running) < together and len(lines) < AHEAD * together:
            line = next(source, None)
            if line is None:
                over = True
                break
            lines.append(line)
            if line.session is not None:
                running.append(line)
        while lines and lines[0].session is None:
            yield lines.popleft().finished()
        if running:
            _step(running)


def _step(running: Sequence[_Line]) -> None:
    sessions = [line.session for line in running if line.session is not None]
    logits = step_each(sessions, [line.tokens[-1] for line in running])
    for line, row in zip(running, logits, strict=True):
        line.take(row)


class _Line:
    """A prompt in progress: ``session`` is None where its tokens are all there, or ``error`` came up."""

    def __init__(self, prompt: Prompt, error: GossamerError | None = None) -> None:
        self.tokens: list[int] = []
        self.session: DecodingSession | None = None
        self.error = error
        self._prompt, self._room = prompt, 0
        self._choice: _Choice

    def begin(
        self, model: nn.Module, max_new_tokens: int, stop: frozenset[int], start: SessionFactory
    ) -> None:
        ids = self._prompt.ids
        try:
            self._room = room(model, ids, max_new_tokens)
            self._choice = _Choice(ids, self._room, self._prompt.sampling, stop)
            if self._room > 0:
                self.session = start()
                self.take(self.session.prompt(torch.tensor(ids, dtype=torch.int64)))
        except GossamerError as error:
            self.error, self.session = error, None

    def take(self, logits: Tensor) -> None:
        try:
            token = self._choice.take(finite_logits(logits))
        except GossamerError as error:
            self.error, self.session = error, None
            return
        if token is not None:
            self.tokens.append(token)
        ends = self._prompt.ends
        if token is None or not self._choice.left or (ends is not None and ends(token)):
            self.session = None

    def finished(self) -> Written:
        if self.error is not None:
            raise self.error
        return Written(self._prompt, self.tokens, self._room)


class _Choice:
    """Chooses at most ``left`` tokens more of a sequence that begins with ``ids``."""

    def __init__(self, ids: Sequence[int], left: int, sampling: Sampling, stop: frozenset[int]) -> None:
        self.left = left
        self._sampler = Sampler(sampling, ids)
        self._stop = stop

    def take(self, logits: Floats) -> int | None:
        """The next token; None where it ends the sequence."""
        token = self._sampler.choose(logits)
        if token in self._stop:
            return None
        self.left -= 1
        return token


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
    choice = _Choice(ids, count, sampling, stop)
    logits = finite_logits(session.read(ids))
    while (token := choice.take(logits)) is not None:
        yield Token(token) if logprobs is None else _with_logprobs(token, logits, logprobs)
        if not choice.left:
            return
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
