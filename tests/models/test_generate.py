"""Generated tokens and text against transformers' own generate and decode."""

from __future__ import annotations

import pytest
import torch

from gossamer.errors import ModelError, TextError
from gossamer.models.attention import decode_attention, decoding
from gossamer.models.generate import Session, choose, generate, stop_tokens, stream
from tiny import ARCHITECTURES, VOCABULARY, tiny_model, tiny_tokenizer, tiny_tokens

IDS = tiny_tokens(1, 12)[0]


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
    assert list(generate(model, IDS.tolist(), 20)) == expected[0, 12:].tolist()


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


def test_stream_joined_is_the_decoded_whole() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    options = {"temperature": 1.5, "seed": 3}  # byte tokens at random: letters broken in every way
    ids = tokenizer("hello", add_special_tokens=True)["input_ids"]
    tokens = list(generate(model, ids, 60, stop=stop_tokens(model, tokenizer), **options))
    pieces = list(stream(model, tokenizer, "hello", 60, chat=False, **options))
    assert len(pieces) > 5
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)


def test_stream_uses_the_chat_form_unless_told_otherwise() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(chat, add_special_tokens=False)["input_ids"]
    expected = tokenizer.decode(list(generate(model, ids, 20, stop=frozenset({2}))), skip_special_tokens=True)
    assert "".join(stream(model, tokenizer, "hi", 20)) == expected


def test_stops_before_an_end_token_and_at_the_end_of_the_context() -> None:
    model = tiny_model("llama", max_position_embeddings=20)
    free = list(generate(model, IDS.tolist(), 100))
    assert len(free) == 9  # 8 positions are left, and the last token needs none
    stop = free[4]
    assert list(generate(model, IDS.tolist(), 100, stop=frozenset({stop}))) == free[: free.index(stop)]
    assert list(generate(model, IDS.tolist(), 3)) == free[:3]
    assert list(generate(model, IDS.tolist(), 0)) == []
    with pytest.raises(TextError, match=r"21 tokens.*20 positions"):
        generate(model, [3] * 21, 1)


def test_stop_tokens_come_from_everywhere() -> None:
    model = tiny_model("llama")
    model.generation_config.eos_token_id = [5, 6]
    assert stop_tokens(model, tiny_tokenizer()) == {2, 5, 6}
    assert stop_tokens(model) == {2, 5, 6}


def test_choose_follows_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    assert choose(logits, 0.0, 1.0, None) == 0
    generator = torch.Generator().manual_seed(0)
    counts = torch.bincount(
        torch.tensor([choose(logits, 1.0, 1.0, generator) for _ in range(4000)]), minlength=4
    )
    assert (counts / 4000 - logits.exp()).abs().max() < 0.03
    # 0.5 + 0.3 reaches 0.7: the third token is out, and the first two keep their ratio
    counts = torch.bincount(
        torch.tensor([choose(logits, 1.0, 0.7, generator) for _ in range(4000)]), minlength=4
    )
    assert counts[2:].sum() == 0
    assert abs(counts[0].item() / 4000 - 5 / 8) < 0.03
    assert {choose(logits, 1.0, 1e-9, generator) for _ in range(50)} == {0}
    cold = [choose(logits, 0.05, 1.0, generator) for _ in range(200)]
    assert cold.count(0) > 195


def test_same_seed_same_tokens() -> None:
    model = tiny_model("llama")
    runs = [list(generate(model, IDS.tolist(), 15, temperature=1.0, seed=seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    assert all(0 <= token < VOCABULARY for token in runs[0])


def test_bad_input_is_refused_before_the_first_token() -> None:
    model = tiny_model("llama")
    with pytest.raises(ModelError, match="temperature"):
        generate(model, [3], 1, temperature=-1.0)
    with pytest.raises(ModelError, match="top_p"):
        generate(model, [3], 1, top_p=0.0)
    with pytest.raises(TextError, match="empty"):
        generate(model, [], 1)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ModelError, match="NaN"):
        next(generate(model, [3], 1))
