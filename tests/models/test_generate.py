"""Generated tokens and text against transformers' own generate and decode."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from gossamer.engine import Decoder, NativeSession
from gossamer.errors import ModelError, SamplingError, TextError
from gossamer.kernels import native_available
from gossamer.models.attention import decode_attention, decoding
from gossamer.models.generate import AHEAD, Prompt, generate, generate_each, stop_tokens
from gossamer.models.sampling import Sampling
from gossamer.models.session import PrefixSession, Session, all_logits, context_length
from tiny import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer, tiny_tokens

IDS = tiny_tokens(1, 12)[0]


def each(*given: Any, **options: Any) -> Any:
    """The tokens that `generate_each` gives after each prompt."""
    return (written.tokens for written in generate_each(*given, **options))


def new_ids(model: Any, ids: list[int], count: int, **options: Any) -> list[int]:
    return [token.id for token in generate(model, ids, count, **options)]


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_session_equals_the_whole_sequence_run_at_once(arch: str) -> None:
    model = tiny_model(arch)
    session = Session(model)
    with torch.no_grad():
        expected = model(input_ids=IDS[None], use_cache=False).logits[0]
    torch.testing.assert_close(session.prompt(IDS[:5]), expected[4], rtol=1e-4, atol=1e-4)
    for i in range(5, 12):
        torch.testing.assert_close(session.step(int(IDS[i])), expected[i], rtol=1e-4, atol=1e-4)
    assert session.length == 12
    assert model.config._attn_implementation != "gossamer_decode"


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3", "gpt2"])
def test_greedy_tokens_are_those_of_transformers(arch: str) -> None:
    model = tiny_model(arch)
    expected = model.generate(
        input_ids=IDS[None],
        attention_mask=torch.ones(1, 12),
        max_new_tokens=20,
        do_sample=False,
        eos_token_id=-1,
    )
    assert new_ids(model, IDS.tolist(), 20) == expected[0, 12:].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "positions"), [(9, 3, 50), (4, 4, 1), (8, 1, 300)])
def test_decode_attention_equals_float64(
    dtype: torch.dtype, heads: int, kv_heads: int, positions: int
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, heads, 1, 16).to(dtype)
    k, v = (torch.randn(2, kv_heads, positions, 16).to(dtype) for _ in range(2))
    wide = [t.double().repeat_interleave(heads // kv_heads, dim=1) for t in (k, v)]
    scores = (0.3 * q.double() @ wide[0].transpose(2, 3)).softmax(-1)
    expected = (scores @ wide[1]).transpose(1, 2)
    found = decode_attention(q, k, v, 0.3)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_decode_attention_is_used_for_single_positions_and_then_put_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model("llama")
    calls = []

    def spy(*args: object) -> torch.Tensor:
        calls.append(1)
        return decode_attention(*args)  # type: ignore[arg-type]

    monkeypatch.setattr("gossamer.models.attention.decode_attention", spy)
    session = Session(model)
    session.prompt(IDS)
    assert not calls
    session.step(3)
    assert len(calls) == model.config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(KeyError), decoding(model):
        raise KeyError
    assert model.config._attn_implementation == "sdpa"


def test_stops_before_an_end_token_and_at_the_end_of_the_context() -> None:
    model = tiny_model("llama", max_position_embeddings=20)
    free = new_ids(model, IDS.tolist(), 100)
    assert len(free) == 9  # 8 positions are left, and the last token needs none
    stop = free[4]
    assert new_ids(model, IDS.tolist(), 100, stop=frozenset({stop})) == free[: free.index(stop)]
    assert new_ids(model, IDS.tolist(), 3) == free[:3]
    assert new_ids(model, IDS.tolist(), 0) == []
    with pytest.raises(TextError, match=r"21 tokens.*20 positions"):
        generate(model, [3] * 21, 1)


@pytest.mark.parametrize(
    ("arch", "rope", "known"),
    [
        ("llama", {"rope_type": "default"}, 20),
        ("llama", {"rope_type": "linear", "factor": 2.5}, 50),
        ("llama", {"rope_type": "dynamic", "factor": 4.0}, 20),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 20}, 80),
        ("qwen2", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        # stretched in max_position_embeddings already
        ("llama", {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 10}, 20),
        ("llama", {"rope_type": "linear", "factor": 2.0, "original_max_position_embeddings": 10}, 20),
        ("gemma3", {"full_attention": {"rope_type": "linear", "factor": 8.0}}, 20),
        ("gpt2", None, 20),
    ],
)
def test_positions_that_are_stretched_reach_further(arch: str, rope: Any, known: int) -> None:
    if rope and "rope_type" in rope:
        rope = {"rope_theta": 10000.0, **rope}
    model = tiny_model(arch, max_position_embeddings=20, **({"rope_parameters": rope} if rope else {}))
    assert context_length(model.config) == known
    assert len(new_ids(model, IDS.tolist(), 99)) == known - 12 + 1
    with pytest.raises(TextError, match=f"knows only {known} positions"):
        generate(model, [3] * (known + 1), 1)


def test_stop_tokens_come_from_everywhere() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [5, 6]
    assert stop_tokens(model, tiny_tokenizer()) == {2, 5, 6}
    assert stop_tokens(model) == {2, 5, 6}


def test_same_seed_same_tokens() -> None:
    model = tiny_model("llama")
    runs = [
        new_ids(model, IDS.tolist(), 15, sampling=Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert all(0 <= token < VOCABULARY for token in runs[0])


@pytest.mark.parametrize("engine", ["transformers", "native"])
def test_several_prompts_have_the_tokens_of_each_alone(engine: str) -> None:
    model = tiny_model("llama", max_position_embeddings=40)
    start: Any = lambda: Session(model)  # noqa: E731
    if engine == "native":
        if not native_available():
            pytest.skip("the native kernels are not built")
        start = partial(NativeSession, Decoder(model))
    prompts = [
        Prompt(tiny_tokens(1, length, seed=length)[0].tolist(), Sampling(temperature=1.0, seed=length))
        for length in (3, 38, 7, 40, 1, 12, 5)
    ]
    stop = frozenset(range(20, 60))
    want = [
        new_ids(model, one.ids, 25, sampling=one.sampling, stop=stop, session=PrefixSession(start))
        for one in prompts
    ]
    assert len({len(tokens) for tokens in want}) > 3
    running = 0

    class Counted:
        """Says how many are in progress."""

        def __init__(self) -> None:
            nonlocal running
            running += 1
            self.session = start()

        def __del__(self) -> None:
            nonlocal running
            running -= 1

        def prompt(self, ids: Any) -> Any:
            assert running <= together
            return self.session.prompt(ids)

        def step(self, token: int) -> Any:
            return self.session.step(token)

    for together in (1, 2, 3, 8):
        for begin in (start, Counted):
            found = each(model, iter(prompts), 25, stop=stop, start=begin, together=together)
            assert list(found) == want
    assert list(each(model, prompts, 0, start=start)) == [[]] * len(prompts)
    assert list(each(model, [], 5)) == []


def test_prompts_are_taken_as_places_fall_free() -> None:
    model, taken = tiny_model("llama"), 0

    def endless() -> Any:
        nonlocal taken
        while True:
            taken += 1
            yield Prompt([3 + taken % 50])

    answers = each(model, endless(), 6, together=2)
    for _ in range(10):
        next(answers)
    assert 10 <= taken <= 10 + 2 * AHEAD
    with pytest.raises(SamplingError, match="at least one prompt is in progress at once, not 0"):
        generate_each(model, endless(), 5, together=0)


@pytest.mark.parametrize("together", [1, 3, 8])
def test_prompts_that_end_at_once_do_not_end_the_others(together: int) -> None:
    model, many = tiny_model("llama"), [Prompt([3 + i % 50]) for i in range(50)]
    every = frozenset(range(VOCABULARY))
    ends = [Prompt(prompt.ids, ends=lambda token: True) for prompt in many]
    assert list(each(model, many, 3, stop=every, together=together)) == [[]] * 50
    assert list(each(model, many, 0, together=together)) == [[]] * 50
    assert [len(tokens) for tokens in each(model, ends, 3, together=together)] == [1] * 50


@pytest.mark.parametrize("together", [1, 3, 8])
def test_what_is_refused_comes_in_its_turn(together: int) -> None:
    model, answers = tiny_model("llama", max_position_embeddings=20), []
    prompts = [Prompt([3]), Prompt([4]), Prompt([3] * 21), Prompt([5])]

    def collect(prompts: Any) -> None:
        answers.clear()
        answers.extend(each(model, prompts, 5, together=together))

    with pytest.raises(TextError, match="the prompt has 21 tokens"):
        collect(prompts)
    assert answers == [new_ids(model, [token], 5) for token in (3, 4)]

    def breaks() -> Any:
        yield Prompt([3])
        raise TextError("no more")

    with pytest.raises(TextError, match="no more"):
        collect(breaks())
    assert answers == [new_ids(model, [3], 5)]


def test_bad_input_is_refused_before_the_first_token() -> None:
    model = tiny_model("llama")
    with pytest.raises(SamplingError, match="logprobs"):
        generate(model, [3], 1, logprobs=-1)
    with pytest.raises(TextError, match="empty"):
        generate(model, [], 1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        next(generate(model, [3], 1))


def test_logprobs_are_those_of_the_model_before_any_filter() -> None:
    model = tiny_model("llama")
    drawn = Sampling(temperature=0.7, top_k=3, repetition_penalty=1.3, seed=4)
    tokens = list(generate(model, IDS.tolist(), 6, sampling=drawn, logprobs=4))
    assert [token.id for token in tokens] == new_ids(model, IDS.tolist(), 6, sampling=drawn)
    whole = torch.tensor([[*IDS.tolist(), *(token.id for token in tokens)]])
    with torch.no_grad():
        expected = model(input_ids=whole).logits[0, 11:-1].double().log_softmax(-1)
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(row[token.id].item(), abs=1e-4)
        values, order = row.topk(4)
        assert [one for one, _ in token.top] == order.tolist()
        assert [value for _, value in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    none, all_ = (next(generate(model, [3], 1, logprobs=k)) for k in (0, 10**6))
    assert none.top == ()
    assert none.logprob is not None
    assert len(all_.top) == VOCABULARY


@pytest.mark.parametrize("arch", ["llama", "mistral", "gemma3", "gpt2"])
def test_a_prefix_session_runs_only_what_is_new(arch: str) -> None:
    """Suffixes of several tokens and of one, the same again, and another sequence; windows of 8 slide."""
    model = tiny_model(arch)
    with torch.no_grad():
        expected = model(input_ids=IDS[None], use_cache=False).logits[0]
    session = PrefixSession(lambda: Session(model))
    ids = IDS.tolist()
    for count, reused in ((3, 0), (4, 3), (9, 4), (9, 9), (12, 9), (5, 0)):
        found = session.read(ids[:count])
        assert session.reused == reused
        torch.testing.assert_close(found, expected[count - 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(session.step(ids[5]), expected[5], rtol=1e-4, atol=1e-4)
    assert session.shared(ids) == 6
    assert session.shared([ids[0], 7, *ids[2:]]) == 0


def test_an_interrupted_session_is_not_used_again() -> None:
    model = tiny_model("llama")
    session = PrefixSession(lambda: Session(model))
    expected = session.read(IDS.tolist()).clone()
    session = PrefixSession(lambda: Session(model))
    session.read(IDS[:6].tolist())

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(interrupt)  # the first layer's cache has grown by then
    with pytest.raises(KeyboardInterrupt):
        session.read(IDS[:8].tolist())
    hook.remove()
    torch.testing.assert_close(session.read(IDS.tolist()), expected)
    assert session.reused == 0


def test_logits_of_all_positions_with_and_without_the_method() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        expected = model(input_ids=IDS[None]).logits[0]

    class Plain:
        """A session that has no `logits`, and hands out the same memory each time."""

        length = 0

        def __init__(self) -> None:
            self._inner, self._out = Session(model), torch.empty(VOCABULARY)

        def prompt(self, ids: torch.Tensor) -> torch.Tensor:
            return self._out.copy_(self._inner.prompt(ids))

        def step(self, token: int) -> torch.Tensor:
            return self._out.copy_(self._inner.step(token))

    for session in (Session(model), Plain()):
        torch.testing.assert_close(all_logits(session, IDS), expected, rtol=1e-4, atol=1e-4)
