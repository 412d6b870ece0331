"""Answers of a loaded model: pieces, stop strings, tokens, why they ended; and any session underneath."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer.engine import Decoder, NativeSession
from gossamer.errors import ModelError, SamplingError, TextError
from gossamer.kernels import native_available
from gossamer.models.generate import generate, stop_tokens
from gossamer.models.sampling import Sampling
from gossamer.models.session import Session
from gossamer.recipes.answer import Answer, Timing
from gossamer.recipes.load import LoadedModel
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

DRAWN = {"temperature": 1.5, "seed": 3}  # byte tokens at random: letters broken in every way


@pytest.fixture
def loaded() -> LoadedModel:
    return LoadedModel(tiny_model("llama"), tiny_tokenizer(), "tiny")


class Native:
    """A session that knows nothing of transformers' models but what `prompt` and `step` need."""

    calls: list[int]

    def __init__(self, model: object, calls: list[int]) -> None:
        self._inner, self.calls = Session(model), calls  # type: ignore[arg-type]

    @property
    def length(self) -> int:
        return self._inner.length

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(ids))
        return self._inner.prompt(ids)

    def step(self, token: int) -> torch.Tensor:
        self.calls.append(1)
        return self._inner.step(token)


class Scoring(Native):
    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        self.calls.append(len(ids))
        return self._inner.logits(ids)


def test_stream_joined_is_the_decoded_whole(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer("hello")["input_ids"]
    ends = stop_tokens(loaded.model, loaded.tokenizer)
    made = generate(loaded.model, ids, 60, stop=ends, sampling=Sampling(**DRAWN))
    tokens = [token.id for token in made]
    stream = loaded.stream("hello", 60, chat=False, **DRAWN)
    pieces = list(stream)
    assert len(pieces) > 5
    assert "".join(pieces) == loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    assert [token.id for token in stream.tokens] == tokens
    assert stream.timing.prompt_tokens == len(ids)
    assert stream.timing.steps == len(tokens) - (stream.finish == "length")


def test_the_chat_form_is_used_unless_told_otherwise(loaded: LoadedModel) -> None:
    chat = loaded.tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = loaded.tokenizer(chat, add_special_tokens=False)["input_ids"]
    tokens = [token.id for token in generate(loaded.model, ids, 20, stop=frozenset({2}))]
    assert loaded.generate("hi", 20) == loaded.tokenizer.decode(tokens, skip_special_tokens=True)


def test_an_answer_is_text_that_knows_how_it_came_about(loaded: LoadedModel) -> None:
    answer = loaded.generate("hi", 5, logprobs=2)
    assert isinstance(answer, str)
    assert isinstance(answer, Answer)
    assert answer.finish == "length"
    assert len(answer.tokens) == 5
    assert all(len(token.top) == 2 and token.top[0][0] == token.id for token in answer.tokens)
    assert answer.timing.steps == 5 - 1  # the first token comes with the prompt
    loaded.model.generation_config.eos_token_id = answer.tokens[3].id
    first = [token.id for token in answer.tokens].index(answer.tokens[3].id)
    ended = loaded.generate("hi", 5)
    assert ended.finish == "end"
    assert len(ended.tokens) == first


@pytest.mark.parametrize("length", [1, 2, 5])
def test_stop_strings_end_an_answer_across_the_borders_of_tokens(loaded: LoadedModel, length: int) -> None:
    whole = loaded.generate("hello", 60, chat=False, **DRAWN)
    for start in range(0, len(whole) - length, 7):
        stop = whole[start : start + length]
        stream = loaded.stream("hello", 60, chat=False, stop=["\0never", stop], **DRAWN)
        shown = ""
        for piece in stream:
            shown += piece
            assert stop not in shown
            assert whole.startswith(shown)
        assert shown == whole[: whole.index(stop)]
        assert stream.finish == "stop"
        if "\ufffd" not in stop:  # which also stands for a character that is not whole yet
            before = [token.id for token in stream.tokens[:-1]]
            assert stop not in loaded.tokenizer.decode(before)  # no token is made once it is there
    assert loaded.generate("hello", 60, chat=False, stop="\0never", **DRAWN) == whole


@pytest.mark.parametrize("engine", ["transformers", "native"])
def test_several_prompts_have_the_answers_of_each_alone(loaded: LoadedModel, engine: str) -> None:
    if engine == "native":
        if not native_available():
            pytest.skip("the native kernels are not built")
        loaded = replace(loaded, new_session=partial(NativeSession, Decoder(loaded.model)))
    prompts = ["hello", "what is new", "a", "b", "where is it to be found"]
    whole = loaded.generate("hello", 40, chat=False, **DRAWN)
    for options in ({}, {"stop": whole[9:11]}, {"stop": ["\0never", whole[20:21]]}, {"chat": True}):
        asked: dict[str, Any] = {"max_new_tokens": 40, "chat": False, **DRAWN, **options}
        want = [loaded.generate(prompt, **asked) for prompt in prompts]
        for together in (1, 3):
            got = list(loaded.generate_each(iter(prompts), together=together, **asked))
            assert got == want
            assert [one.tokens for one in got] == [one.tokens for one in want]
            assert [one.finish for one in got] == [one.finish for one in want]
            assert got[1].timing == Timing(prompt_tokens=want[1].timing.prompt_tokens)
    assert list(loaded.generate_each([])) == []
    for wrong in ({"top_k": -1}, {"stop": [""]}):
        with pytest.raises(SamplingError):
            loaded.generate_each(prompts, **wrong)  # before anything is asked of it
    with pytest.raises(SamplingError, match="at least one prompt"):
        loaded.generate_each(prompts, together=0)
    with pytest.raises(TextError, match="prompts are several texts"):
        loaded.generate_each("hello")
    answers = loaded.generate_each(["good", "\udcff"], 5)
    assert next(answers) == loaded.generate("good", 5)
    with pytest.raises(TextError, match="no UTF-8"):
        next(answers)


def test_settings_are_refused_before_the_first_piece(loaded: LoadedModel) -> None:
    with pytest.raises(SamplingError, match="top_k"):
        loaded.stream("hi", top_k=-1)
    with pytest.raises(SamplingError, match="empty"):
        loaded.stream("hi", stop=[""])
    with pytest.raises(SamplingError, match="logprobs"):
        loaded.stream("hi", logprobs=-1)


def test_any_session_can_run_the_tokens(loaded: LoadedModel) -> None:
    calls: list[int] = []
    other = LoadedModel(loaded.model, loaded.tokenizer, "x", lambda: Native(loaded.model, calls))
    assert other.generate("hello", 12, top_p=0.9, **DRAWN) == loaded.generate("hello", 12, top_p=0.9, **DRAWN)
    assert calls[0] > 5
    assert calls[1:] == [1] * 11


def test_as_transformers_is_the_model_itself_where_that_runs(loaded: LoadedModel) -> None:
    assert loaded.as_transformers() is loaded.model


@pytest.mark.parametrize("kind", [Native, Scoring])
def test_as_transformers_over_sessions(loaded: LoadedModel, kind: type[Native]) -> None:
    plain, calls = loaded.model, list[int]()
    other = LoadedModel(plain, loaded.tokenizer, "x", lambda: kind(plain, calls))
    face = other.as_transformers().eval()
    ids = tiny_tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0  # padding on the left, as generate wants it
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask).logits
    found = face(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(face(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        face(ids, logits_to_keep=3).logits, plain(ids).logits[:, -3:], rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        face(ids, logits_to_keep=1).logits, plain(ids).logits[:, -1:], rtol=1e-4, atol=1e-4
    )
    assert face.device == torch.device("cpu")
    assert face.dtype == torch.float32
    assert face.config.vocab_size == plain.config.vocab_size
    assert plain.config._attn_implementation == "sdpa"

    face = other.as_transformers()  # which has run nothing yet
    calls.clear()
    for options in (
        {"do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.3},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"num_beams": 3, "do_sample": False},
    ):
        written = []
        for model in (plain, face):
            torch.manual_seed(0)
            written.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, **options))
        assert torch.equal(*written), options
        if options == {"do_sample": False}:
            assert calls == [8, 12] + [1] * 14  # each token once


@pytest.mark.skipif(not native_available(), reason="no compiled extension here")
def test_as_transformers_of_experts_in_the_native_decoder() -> None:
    mixture = tiny_model("mixtral")
    mixture.set_experts_implementation("grouped_mm")  # as transformers chooses for what it loads
    face = LoadedModel(
        mixture, tiny_tokenizer(), "x", partial(NativeSession, Decoder(mixture), torch.float32)
    ).as_transformers()
    ids = tiny_tokens(1, 12)
    with torch.no_grad():
        torch.testing.assert_close(face(ids).logits, mixture(ids).logits, rtol=1e-4, atol=1e-4)
    assert mixture.config._experts_implementation == "grouped_mm"


def test_equal_rows_have_a_session_each(loaded: LoadedModel) -> None:
    calls: list[int] = []
    start = lambda: Native(loaded.model, calls)  # noqa: E731
    face = LoadedModel(loaded.model, loaded.tokenizer, "x", start).as_transformers()
    ids = tiny_tokens(1, 12).expand(2, -1)
    face.generate(ids, max_new_tokens=8, do_sample=False)
    assert calls == [12, 12] + [1] * 14


def test_what_a_session_cannot_take_is_refused(loaded: LoadedModel) -> None:
    face = LoadedModel(
        loaded.model, loaded.tokenizer, "x", lambda: Native(loaded.model, [])
    ).as_transformers()
    ids = tiny_tokens(1, 5)
    with pytest.raises(ModelError, match="labels, position_ids"):
        face(ids, labels=ids, position_ids=ids, use_cache=True, output_attentions=False)
    with pytest.raises(ModelError, match=r"\(1, 4\).*\(1, 5\)"):
        face(ids, attention_mask=ids[:, 1:])
    with pytest.raises(ModelError, match="no token"):
        face(ids, attention_mask=torch.zeros_like(ids))
    with pytest.raises(ModelError, match="take tokens back"):
        face.generate(ids, max_new_tokens=5, prompt_lookup_num_tokens=3)


@pytest.mark.parametrize("place", ["~no-such-user/model", "~no-such-user/a/b"])
def test_a_home_that_is_not_there_is_a_clear_error(place: str) -> None:
    with pytest.raises(ModelError, match="there is no model"):
        gs.load(place)
    with pytest.raises(TextError, match="there is no"):
        gs.quality("no-such-model", text=place)
