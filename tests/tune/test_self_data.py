"""Prompts for self-data distillation, and what is kept of answers."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from gossamer.errors import TextError
from gossamer.models.generate import generate
from gossamer.models.sampling import Sampling
from gossamer.models.session import Session
from gossamer.models.text import Exchange
from gossamer.tune.self_data import Continuations, Rewrites, same_result, samples
from tiny import tiny_model, tiny_tokenizer

IDS = torch.tensor(
    tiny_tokenizer()("The assert statement is a convenient way to insert debugging.")["input_ids"]
)


def test_prompts_are_pieces_of_the_text_by_seed_and_number() -> None:
    prompts = Continuations(IDS, tiny_tokenizer(), 5, seed=3)
    first = [prompts.prompt(i) for i in range(20)]
    text = IDS.tolist()
    assert all(any(p == text[at : at + 5] for at in range(len(text) - 4)) for p in first)
    assert len({tuple(p) for p in first}) > 5
    assert first == [Continuations(IDS, tiny_tokenizer(), 5, seed=3).prompt(i) for i in range(20)]
    assert first != [Continuations(IDS, tiny_tokenizer(), 5, seed=4).prompt(i) for i in range(20)]
    whole = Continuations(IDS, tiny_tokenizer(), len(IDS))
    assert whole.record(0, " More.", True)["text"] == tiny_tokenizer().decode(IDS) + " More."
    for length in (0, len(IDS) + 1):
        with pytest.raises(TextError, match=f"prompts of {length} tokens cannot be cut"):
            Continuations(IDS, tiny_tokenizer(), length)


def test_a_record_is_what_the_model_says_and_depends_on_its_number_alone() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prompts = Continuations(IDS, tokenizer, 6)

    def made(first: int, temperature: float = 1.0, together: int = 1) -> tuple[str, int]:
        return several(first, 1, temperature, together)[0]

    def several(first: int, number: int, temperature: float, together: int) -> list[tuple[str, int]]:
        how = Sampling(temperature=temperature, seed=1)
        found = samples(prompts, first, model, lambda: Session(model), tokenizer, how, 8, together)
        return [(done.record["text"], done.tokens) for done in islice(found, number)]

    alone = [made(i) for i in range(5)]
    assert several(0, 5, 1.0, 3) == alone
    assert several(2, 3, 1.0, 8) == alone[2:]
    assert alone[0] != alone[1]
    greedy = [token.id for token in generate(model, prompts.prompt(0), 8)]
    assert made(0, 0.0) == (
        prompts.record(0, tokenizer.decode(greedy, skip_special_tokens=True), False)["text"],
        len(greedy),
    )


@pytest.mark.parametrize(
    ("answer", "response", "same"),
    [
        ("So it is 1,200.", "#### 1200", True),
        ("It is 12", "5 + 8 = 13", False),
        ("no number", "so 4", False),
        ("3 apples", "many apples", True),
        ("-2.50", "the result: -2.5", True),
    ],
)
def test_the_last_number_is_the_result(answer: str, response: str, same: bool) -> None:
    assert same_result(answer, response) is same


def test_an_answer_is_taken_where_it_comes_to_the_same() -> None:
    pairs = [Exchange("What is 2 + 2?", "It is 4."), Exchange("Say hello.", "Hello!")]
    rewrites = Rewrites(pairs, tiny_tokenizer())
    asked = tiny_tokenizer().decode(rewrites.prompt(0))
    assert "What is 2 + 2?" in asked
    assert "It is 4." in asked
    assert asked.endswith("assistant: ")
    own = {"prompt": "What is 2 + 2?", "response": "Four, 4", "own": True}
    theirs = {"prompt": "What is 2 + 2?", "response": "It is 4.", "own": False}
    assert rewrites.record(0, " Four, 4\n", True) == own
    assert rewrites.record(0, " Four, 4\n", False) == theirs  # cut off: who knows how it would have ended
    assert rewrites.record(0, "Perhaps 5?", True) == theirs
    assert rewrites.record(0, "  ", True) == theirs
    assert rewrites.record(1, "Hi 5 times", True)["own"] is True
    assert rewrites.prompt(2) == rewrites.prompt(0)  # begins anew
