"""Self-data distillation: the dense model itself writes the text that its pruned copy is tuned on.

Other people's text draws a pruned model away from what the dense one knew; text from the dense model's own
distribution draws it back. Either the model continues prompts cut from a text, or it says answers of an
instruction set in its own words, and its answer is taken where it comes to the same end as the given one.

Thangarasa et al. 2024, Self-Data Distillation for Recovering Quality in Pruned Large Language Models, which
rewrites as Yang et al. 2024, Self-Distillation Bridges Distribution Gap in Language Model Fine-Tuning.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
from torch import Tensor, nn

from gossamer.claim import Claim, Experiment
from gossamer.errors import TextError
from gossamer.models.generate import Prompt, generate_each, stop_tokens
from gossamer.models.sampling import Sampling
from gossamer.models.session import SessionFactory
from gossamer.models.text import Exchange
from gossamer.models.tokenizer import StreamDecoder, encode_prompt
from gossamer.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

REWRITE = (
    "Here is an instruction and a reference answer. Answer the instruction in your own words, to the same "
    "result as the reference answer. Give only the answer.\n\nInstruction:\n{prompt}\n\nReference answer:\n"
    "{response}"
)
SHORTENED = Experiment(
    sparsity=0.0,
    blocks=0.2,
    start="magnitude",
    against=("magnitude",),
    tuning={"tokens": 65_536, "seqlen": 256, "losses": {"task": 1}},
    tuned={"continuations": {}, "ordinary": {}, "rewrites": {}, "given": {}},
    sampled={"continuations": 32_768},
    rewritten={"rewrites": True, "given": False},
)
"""A model that lost a fifth of its blocks, tuned on text of the dense model's or of others."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


class Prompts(Protocol):
    """Where prompts come from: by their number, the same ones each time."""

    def prompt(self, index: int) -> list[int]:
        """The token ids that the model reads for record ``index`` = 0, 1, .."""

    def record(self, index: int, answer: str, whole: bool) -> dict[str, Any]:
        """What is kept of its ``answer``: the document to tune on, as `read_text` reads it from a line of
        jsonl, and what is worth knowing. ``whole``: the model ended it, and no limit of tokens did."""


PROMPTS: Registry[Prompts] = Registry(
    "source of prompts",
    dict.fromkeys(("continuations", "rewrites"), "gossamer.tune.self_data"),
)


@PROMPTS.register(
    "continuations",
    cite="Thangarasa et al. 2024, Self-Data Distillation for Recovering Quality in Pruned Large Language "
    "Models",
)
@dataclass(frozen=True)
class Continuations:
    """Prompts of ``length`` tokens from random places of a text, int64 ``ids``, which the model continues.

    Places are drawn for each record anew, from ``seed`` and its number. Raises TextError for a text shorter
    than a prompt.
    """

    claim: ClassVar[Claim | None] = Claim(
        says="Tuned on what the dense model itself writes, a model that lost blocks stays nearer to it than "
        "when tuned on other people's text.",
        experiment=SHORTENED,
        metric="kl",
        than="ordinary",
    )

    ids: Tensor
    tokenizer: PreTrainedTokenizerBase
    length: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.length <= len(self.ids):
            raise TextError(
                f"prompts of {self.length} tokens cannot be cut from a text of {len(self.ids)}: give more "
                "text, or shorter prompts of at least one token"
            )

    def prompt(self, index: int) -> list[int]:
        start = random.Random(_seed(self.seed, index)).randint(0, len(self.ids) - self.length)
        ids: list[int] = self.ids[start : start + self.length].tolist()
        return ids

    def record(self, index: int, answer: str, whole: bool) -> dict[str, Any]:
        decoder = StreamDecoder(self.tokenizer)
        prompt = "".join(map(decoder.push, self.prompt(index))) + decoder.finish()
        return {"text": prompt + answer}


@PROMPTS.register(
    "rewrites",
    cite="Yang et al. 2024, Self-Distillation Bridges Distribution Gap in Language Model Fine-Tuning",
)
@dataclass(frozen=True)
class Rewrites:
    """Answers of an instruction set, ``pairs`` of prompt and response, in the model's own words.

    A document is the instruction and an answer, of which tuning learns the answer alone. The model's answer
    is taken where its last number is that of the response, and where the response has none (the papers'
    conditional selection); else, or where it says nothing or was cut off, the response stays. Records past
    the last pair begin anew with the first.
    """

    claim: ClassVar[Claim | None] = Claim(
        says="Fine-tuned on answers in its own words a model stays nearer to what it was than on the given "
        "answers of the same instructions.",
        experiment=SHORTENED,
        metric="kl",
        than="given",
    )

    pairs: Sequence[Exchange]
    tokenizer: PreTrainedTokenizerBase

    def prompt(self, index: int) -> list[int]:
        pair = self._pair(index)
        return encode_prompt(self.tokenizer, REWRITE.format(prompt=pair.prompt, response=pair.response))

    def record(self, index: int, answer: str, whole: bool) -> dict[str, Any]:
        pair = self._pair(index)
        own = whole and bool(answer.strip()) and same_result(answer, pair.response)
        chosen = answer.strip() if own else pair.response
        return {"prompt": pair.prompt, "response": chosen, "own": own}

    def _pair(self, index: int) -> Exchange:
        return self.pairs[index % len(self.pairs)]


def same_result(answer: str, response: str) -> bool:
    """Whether both end in the same number, or ``response`` holds none."""
    wanted = _last_number(response)
    return wanted is None or wanted == _last_number(answer)


def _last_number(text: str) -> float | None:
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None


@dataclass(frozen=True)
class Sampled:
    """A finished ``record``, and what it took: ``tokens`` that were drawn."""

    record: dict[str, Any]
    tokens: int


def samples(
    prompts: Prompts,
    first: int,
    model: nn.Module,
    start: SessionFactory,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    max_new_tokens: int,
    together: int = 8,
) -> Iterator[Sampled]:
    """Records ``first``, ``first + 1``, .. without an end: each prompt answered by ``model`` in a new
    session, up to a token that ends the answer or ``max_new_tokens``, ``together`` of them at once. A record
    depends on its number, and not on others. Raises TextError for a prompt that is longer than the model's
    context, ModelError for damaged weights."""

    def asked(index: int) -> Prompt:
        return Prompt(prompts.prompt(index), replace(sampling, seed=_seed(sampling.seed, index)))

    stop = stop_tokens(model, tokenizer)
    answers = generate_each(
        model, map(asked, count(first)), max_new_tokens, stop=stop, start=start, together=together
    )
    for index, written in zip(count(first), answers, strict=False):
        decoder, drawn = StreamDecoder(tokenizer), len(written.tokens)
        text = "".join(map(decoder.push, written.tokens)) + decoder.finish()
        yield Sampled(prompts.record(index, text, drawn < written.room), drawn)


def _seed(seed: int, index: int) -> int:
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
