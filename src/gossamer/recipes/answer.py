"""An answer as it comes: pieces of text, and behind them tokens, times and why it ended."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gossamer.models.generate import Token
from gossamer.models.stops import StopStrings
from gossamer.models.tokenizer import StreamDecoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Timing:
    """How long an answer took: the prompt with the first new token, and every further step by itself.
    ``reused_tokens`` of the prompt had been run before."""

    prompt_tokens: int = 0
    reused_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    decode_seconds: float = 0.0

    @property
    def decode_speed(self) -> float | None:
        """Tokens a second after the first; None where there were none."""
        return self.steps / self.decode_seconds if self.steps and self.decode_seconds else None

    def timed(self, tokens: Iterator[Token], limit: int) -> Iterator[Token]:
        """At most ``limit`` of ``tokens`` as they come, with the time that making them takes (not what their
        reader does). A step that finds the end instead of a token counts: it runs the model too."""
        first = True
        for _ in range(limit):
            start = time.perf_counter()
            token = next(tokens, None)
            took = time.perf_counter() - start
            if first:
                self.prompt_seconds, first = took, False
            else:
                self.decode_seconds += took
                self.steps += 1
            if token is None:
                return
            yield token


class AnswerStream(Iterator[str]):
    """Pieces of text, each as soon as its characters are whole and surely no part of a stop string.

    ``tokens``: those made so far; ``timing``: how long they took; ``finish``: None until the end, then why it
    ended: "end" (the model said so), "stop" (a stop string) or "length" (no more tokens were allowed, or the
    model's context is full).
    """

    def __init__(
        self,
        tokens: Iterator[Token],
        tokenizer: PreTrainedTokenizerBase,
        *,
        limit: int,
        stops: StopStrings,
        timing: Timing,
    ) -> None:
        self.tokens: list[Token] = []
        self.finish: str | None = None
        self.timing = timing
        self._limit = limit
        self._pieces = self._run(tokens, StreamDecoder(tokenizer), stops)

    def __next__(self) -> str:
        return next(self._pieces)

    def _run(self, tokens: Iterator[Token], decoder: StreamDecoder, stops: StopStrings) -> Iterator[str]:
        for token in self.timing.timed(tokens, self._limit):
            self.tokens.append(token)
            if piece := stops.push(decoder.push(token.id)):
                yield piece
            if stops.found:
                break
        if piece := stops.push(decoder.finish()) + stops.finish():
            yield piece
        ended = "length" if len(self.tokens) >= self._limit else "end"
        self.finish = "stop" if stops.found else ended


class Answer(str):
    """The text of an answer, with its ``tokens``, ``timing`` and ``finish`` as `AnswerStream` has them."""

    tokens: tuple[Token, ...]
    timing: Timing
    finish: str

    @classmethod
    def of(cls, stream: AnswerStream) -> Answer:
        """All that is left of ``stream``."""
        answer = cls("".join(stream))
        assert stream.finish is not None
        answer.tokens, answer.timing, answer.finish = tuple(stream.tokens), stream.timing, stream.finish
        return answer
