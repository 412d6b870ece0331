"""Conversations: the same answers as from the whole text each time, and no token run twice."""

from __future__ import annotations

import pytest

from gossamer.errors import ModelError, TextError
from gossamer.models.tokenizer import encode_turns
from gossamer.recipes.answer import Timing
from gossamer.recipes.chat import Conversation
from gossamer.recipes.load import LoadedModel
from tiny import tiny_model, tiny_tokenizer

QUESTIONS = ("hello", "and the assert statement?", "why")


@pytest.fixture
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model("llama"), tiny_tokenizer(), "tiny")


def plain_answers(loaded: LoadedModel, system: str | None, count: int) -> list[str]:
    """Each answer from a session of its own."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in QUESTIONS:
        turns.append({"role": "user", "content": question})
        ids = encode_turns(loaded.tokenizer, turns)
        answers.append("".join(loaded.stream_tokens(ids, count)))
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers


@pytest.mark.parametrize("system", [None, "Be kind."])
def test_answers_are_those_of_the_whole_text(loaded: LoadedModel, system: str | None) -> None:
    conversation = Conversation(loaded, system=system, max_new_tokens=12)
    answers = ["".join(conversation.ask(question)) for question in QUESTIONS]
    assert answers == plain_answers(loaded, system, 12)
    assert [turn["content"] for turn in conversation.turns if turn["role"] == "assistant"] == answers
    conversation.reset()
    assert len(conversation.turns) == (system is not None)
    assert "".join(conversation.ask(QUESTIONS[0])) == answers[0]


def test_only_new_tokens_are_run_where_the_text_extends_what_was_run(loaded: LoadedModel) -> None:
    conversation = Conversation(loaded, max_new_tokens=1)
    reused, lengths = [], []
    for question in QUESTIONS:
        timing = Timing()
        answer = "".join(conversation.ask(question, timing=timing))
        assert "\ufffd" not in answer
        reused.append(timing.reused_tokens)
        lengths.append(timing.prompt_tokens)
    assert reused == [0, *lengths[:-1]]  # the one token of an answer was given out, but not run yet


def test_a_template_that_rewrites_the_past_starts_anew(loaded: LoadedModel) -> None:
    tokenizer = tiny_tokenizer()
    before = tokenizer.chat_template
    tokenizer.chat_template = before.replace("m['content']", "(m['content'] if loop.last else '...')")
    try:
        conversation = Conversation(loaded, max_new_tokens=4)
        for question in QUESTIONS:
            timing = Timing()
            answer = "".join(conversation.ask(question, timing=timing))
            ids = encode_turns(tokenizer, conversation.turns[:-1])
            assert timing.reused_tokens == 0
            assert answer == "".join(loaded.stream_tokens(ids, 4))
    finally:
        tokenizer.chat_template = before


def test_a_stopped_answer_is_the_turn_as_far_as_it_came(loaded: LoadedModel) -> None:
    conversation = Conversation(loaded, max_new_tokens=30)
    pieces = conversation.ask("hello")
    shown = next(pieces) + next(pieces)
    pieces.close()
    assert conversation.turns[-1] == {"role": "assistant", "content": shown}
    ids = encode_turns(loaded.tokenizer, [*conversation.turns, {"role": "user", "content": "go on"}])
    assert "".join(conversation.ask("go on")) == "".join(loaded.stream_tokens(ids, 30))


def test_a_question_that_does_not_fit_is_forgotten(loaded: LoadedModel) -> None:
    conversation = Conversation(loaded, max_new_tokens=2)
    with pytest.raises(TextError, match="512 positions"):
        conversation.ask("x y " * 400)
    assert conversation.turns == []


def test_no_template_no_conversation(loaded: LoadedModel) -> None:
    tokenizer = tiny_tokenizer()
    before, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        with pytest.raises(ModelError, match="no chat template"):
            Conversation(loaded)
    finally:
        tokenizer.chat_template = before
