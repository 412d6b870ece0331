"""Text from a language model, token by token: a session with its cache, sampling, and a stream of text."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError, TextError
from gossamer.models.attention import decoding
from gossamer.models.tokenizer import StreamDecoder, encode_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Session:
    """One sequence in progress: a transformers decoder and its key/value cache.

    ``prompt`` runs many tokens at once and ``step`` one; both return the float32 logits ``(vocab,)`` of the
    token that comes next.
    """

    def __init__(self, model: nn.Module) -> None:
        from transformers import DynamicCache

        self.model = model
        self.length = 0
        self._cache = DynamicCache(config=model.config)
        accepted = inspect.signature(model.forward).parameters
        self._options: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in accepted else {}

    @torch.inference_mode()
    def prompt(self, ids: Tensor) -> Tensor:
        """Append the tokens ``ids``, int64 ``(n,)`` with n >= 1."""
        return self._append(ids.reshape(1, -1))

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        """Append one token."""
        with decoding(self.model):
            return self._append(torch.tensor([[token]]))

    def _append(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, past_key_values=self._cache, use_cache=True, **self._options)
        self.length += ids.shape[1]
        logits: Tensor = out.logits[0, -1]
        return logits.float()


def choose(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """The next token: the likeliest at temperature 0, else drawn from softmax(logits / temperature).

    With ``top_p`` below 1 only the likeliest tokens whose probabilities first reach ``top_p`` together take
    part (Holtzman et al. 2020, The Curious Case of Neural Text Degeneration).
    Raises ModelError where logits are NaN or infinite.
    """
    if not torch.isfinite(logits).all():
        raise ModelError("the model gives logits that are NaN or infinite: its weights are damaged")
    if temperature == 0:
        return int(logits.argmax())
    probabilities = (logits / temperature).softmax(dim=-1)
    if top_p < 1:
        ordered, index = probabilities.sort(descending=True, stable=True)
        ordered[(ordered.cumsum(0) - ordered) >= top_p] = 0  # what stood before already reaches top_p
        return int(index[torch.multinomial(ordered, 1, generator=generator)])
    return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    model: nn.Module,
    ids: Sequence[int],
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stop: frozenset[int] = frozenset(),
) -> Iterator[int]:
    """New tokens after ``ids``, one at a time, until one of ``stop`` (not given out), ``max_new_tokens``,
    or the end of the positions that the model knows.

    Same arguments, same tokens (on one machine with the same number of threads).
    Raises ModelError for a temperature below 0, a ``top_p`` outside (0, 1] or damaged weights, and TextError
    for a prompt that is empty or longer than the model's context.
    """
    if temperature < 0:
        raise ModelError(f"temperature must be 0 (always the likeliest token) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ModelError(f"top_p must lie in (0, 1], got {top_p}")
    limit = getattr(model.config, "max_position_embeddings", None)
    if len(ids) == 0:
        raise TextError("the prompt is empty: give at least one token to continue from")
    if limit is not None and len(ids) > limit:
        raise TextError(f"the prompt has {len(ids)} tokens, but the model knows only {limit} positions")
    # a sequence may be as long as the context, and the last token needs no position to be given out
    count = max_new_tokens if limit is None else min(max_new_tokens, limit - len(ids) + 1)
    return _tokens(model, ids, count, temperature, top_p, seed, stop)


def _tokens(
    model: nn.Module,
    ids: Sequence[int],
    count: int,
    temperature: float,
    top_p: float,
    seed: int,
    stop: frozenset[int],
) -> Iterator[int]:
    if count < 1:
        return
    generator = torch.Generator().manual_seed(seed)
    session = Session(model)
    logits = session.prompt(torch.tensor(list(ids), dtype=torch.int64))
    for left in range(count - 1, -1, -1):
        token = choose(logits, temperature, top_p, generator)
        if token in stop:
            return
        yield token
        if left:
            logits = session.step(token)


def stream(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int = 256,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = True,
) -> Iterator[str]:
    """The model's answer to ``prompt`` as pieces of text, each given out as soon as its characters are whole.

    ``chat``: put the prompt into the model's chat form where its tokenizer has one. The answer ends at an end
    token of the model or the tokenizer. Raises as `generate` does, before the first piece is asked for.
    """
    ids = encode_prompt(tokenizer, prompt, chat=chat)
    options: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    tokens = generate(model, ids, max_new_tokens, stop=stop_tokens(model, tokenizer), **options)
    return _pieces(tokens, StreamDecoder(tokenizer))


def stop_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase | None = None) -> frozenset[int]:
    """All end tokens that the model's generation settings, its configuration and the tokenizer name."""
    found: set[int] = set()
    for owner in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        named = getattr(owner, "eos_token_id", None)
        if named is not None:
            found.update([named] if isinstance(named, int) else named)
    return frozenset(found)


def _pieces(tokens: Iterator[int], decoder: StreamDecoder) -> Iterator[str]:
    for token in tokens:
        if text := decoder.push(token):
            yield text
    if rest := decoder.finish():
        yield rest
