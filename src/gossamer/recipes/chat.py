"""A conversation with a model: its turns, and a session that is kept from one answer to the next."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

from gossamer.errors import ModelError
from gossamer.models.sampling import Sampling
from gossamer.models.session import PrefixSession
from gossamer.models.tokenizer import encode_turns
from gossamer.recipes.answer import Timing
from gossamer.recipes.load import LoadedModel

_GREEDY = Sampling()


class Conversation:
    """Turns of a user and a model, after a ``system`` prompt where one is given.

    Each answer runs only the tokens that its turns add to what was run before. Where the chat template
    rewrites the past, or an answer reads back as other tokens than it was made of, all are run again.
    Raises ModelError where the tokenizer has no chat template, or its template refuses the turns.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        system: str | None = None,
        max_new_tokens: int = 1024,
        sampling: Sampling = _GREEDY,
        stop: str | Sequence[str] = (),
    ) -> None:
        if not loaded.tokenizer.chat_template:
            raise ModelError(
                f"{loaded.label} has no chat template: it continues texts (`gossamer run`), but has no form "
                "for a conversation"
            )
        self._loaded = loaded
        self._system = system
        self._max_new_tokens, self._sampling, self._stop = max_new_tokens, sampling, stop
        self._session = PrefixSession(loaded.session)
        self.reset()

    def reset(self) -> None:
        """Forgets all turns but the system prompt."""
        self.turns = [] if self._system is None else [{"role": "system", "content": self._system}]

    def ask(self, text: str, *, timing: Timing | None = None) -> Generator[str, None, None]:
        """The answer to ``text`` piece by piece. What came of it until it ended or was stopped is the model's
        turn. Raises TextError, and forgets ``text``, where the conversation is longer than the context."""
        turns = [*self.turns, {"role": "user", "content": text}]
        ids = encode_turns(self._loaded.tokenizer, turns)
        timing = timing or Timing()
        stream = self._loaded.stream_tokens(
            ids,
            self._max_new_tokens,
            sampling=self._sampling,
            stop=self._stop,
            session=self._session,
            timing=timing,
        )
        return self._recorded(turns, stream, timing)

    def _recorded(
        self, turns: list[dict[str, str]], stream: Iterator[str], timing: Timing
    ) -> Generator[str, None, None]:
        pieces: list[str] = []
        try:
            for piece in stream:
                pieces.append(piece)
                yield piece
        finally:
            timing.reused_tokens = self._session.reused
            self.turns = [*turns, {"role": "assistant", "content": "".join(pieces)}]
