"""Attention policies: what they choose, that they are causal, and that they run in transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import BertConfig, BertModel
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)

from gossamer.dynamic.attention import POLICIES, Attend, Policy, attention
from gossamer.dynamic.attention.block_topk import BlockTopK
from gossamer.dynamic.attention.hip import HiP
from gossamer.dynamic.attention.minference import MInference, VerticalSlash, candidates, search, searched
from gossamer.dynamic.attention.plug import PAIRS, Watch, key_positions
from gossamer.dynamic.attention.policy import block_means, causal
from gossamer.dynamic.attention.seer import Seer
from gossamer.dynamic.attention.sink_window import SinkWindow
from gossamer.dynamic.attention.strided import Strided
from gossamer.errors import MethodError
from gossamer.kernels import BLOCK, block_attention, block_count
from tiny import tiny_model, tiny_tokens

FULL: dict[str, Policy] = {
    "sink_window": SinkWindow(window=2048),
    "strided": Strided(stride=1),
    "block_topk": BlockTopK(99),
    "hip": HiP(count=99),
    "minference": MInference(other=VerticalSlash(99, 99)),
}
SMALL: dict[str, Policy] = {
    "sink_window": SinkWindow(4, 100),
    "strided": Strided(window=64, stride=4),
    "block_topk": BlockTopK(3),
    "hip": HiP(2, 64),
    "minference": MInference({(0, 1): BlockTopK(2), (0, 2): SinkWindow(4, 64)}, VerticalSlash(1, 1)),
}


def made(rows: int = 700, positions: int = 700, heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(3)
    shapes = (heads, rows, 16), (2, positions, 16), (2, positions, 16)
    queries, keys, values = (torch.randn(shape, generator=g) for shape in shapes)
    return queries, keys, values


def chosen(policy: Policy, queries: Tensor, keys: Tensor, layer: int = 0) -> Tensor:
    blocks = policy.blocks(queries, keys, scaling=0.25, layer=layer)
    if blocks is None:
        blocks = torch.ones((len(queries), *block_count(queries.shape[1], keys.shape[1])), dtype=torch.bool)
    assert blocks.dtype == torch.bool
    assert tuple(blocks.shape) == (len(queries), *block_count(queries.shape[1], keys.shape[1]))
    return causal(blocks, queries.shape[1], keys.shape[1])


def test_every_policy_is_tried_here() -> None:
    assert set(POLICIES) == set(FULL) == set(SMALL)


@pytest.mark.parametrize("name", list(FULL))
@pytest.mark.parametrize(("rows", "positions"), [(700, 700), (1, 1), (1, 300), (130, 700), (65, 65)])
def test_a_full_budget_is_dense_attention_bit_for_bit(name: str, rows: int, positions: int) -> None:
    queries, keys, values = made(rows, positions)
    blocks = chosen(FULL[name], queries, keys)
    got = block_attention(queries, keys, values, scaling=0.25, blocks=blocks)
    assert torch.equal(got, block_attention(queries, keys, values, scaling=0.25))


@pytest.mark.parametrize("name", list(SMALL))
def test_a_small_budget_looks_at_less_and_at_itself(name: str) -> None:
    queries, keys, _ = made()
    blocks = chosen(SMALL[name], queries, keys)
    dense = causal(torch.ones_like(blocks), 700, 700)
    assert int(blocks.sum()) < 0.75 * int(dense.sum())
    assert not (blocks & ~dense).any()
    assert torch.diagonal(blocks, dim1=1, dim2=2).all()


@pytest.mark.parametrize("name", list(SMALL))
def test_a_later_token_never_reaches_an_earlier_output(name: str) -> None:
    """Where a policy estimates from the prompt's end, the choice is held: it may depend on what follows."""
    queries, keys, values = made()
    blocks = chosen(SMALL[name], queries, keys)
    want = block_attention(queries, keys, values, scaling=0.25, blocks=blocks)
    for at in (1, 63, 64, 333, 699):
        others = [one.clone() for one in (queries, keys, values)]
        for one in others:
            one[:, at:] = torch.randn(one[:, at:].shape) * 9
        if name in ("sink_window", "strided"):
            blocks = chosen(SMALL[name], others[0], others[1])
        got = block_attention(*others, scaling=0.25, blocks=blocks)
        assert torch.equal(got[:at], want[:at])


@pytest.mark.parametrize("name", ["sink_window", "strided", "block_topk", "hip"])
def test_chunks_of_a_prompt_at_borders_of_blocks_choose_as_the_whole(name: str) -> None:
    queries, keys, _ = made()
    whole = chosen(SMALL[name], queries, keys)
    for begin, end in ((0, 128), (128, 320), (320, 700)):
        part = chosen(SMALL[name], queries[:, begin:end], keys[:, :end])
        width = part.shape[2]
        assert torch.equal(part, whole[:, begin // BLOCK : (end - 1) // BLOCK + 1, :width])


def test_sink_window_reaches_as_far_as_it_says() -> None:
    blocks = chosen(SinkWindow(4, 100), *made()[:2])[0]
    for row in range(700):
        seen = {p // BLOCK for p in range(max(0, row - 99), row + 1)} | {0}
        assert seen <= set(blocks[row // BLOCK].nonzero().flatten().tolist())
    assert int(blocks[10].sum()) == 1 + 3


def test_strided_heads_cover_the_context_together() -> None:
    blocks = chosen(Strided(window=64, stride=4), *made()[:2])
    assert torch.equal(blocks.any(0), causal(torch.ones(11, 11, dtype=torch.bool), 700, 700))
    assert Strided(dense_layers=2).blocks(*made()[:2], scaling=1.0, layer=1) is None


def planted() -> tuple[Tensor, Tensor]:
    """Every query asks for what the keys of block 5 hold."""
    queries, keys, _ = made()
    asked = torch.randn(16, generator=torch.Generator().manual_seed(5))
    keys = keys * 0.1
    keys[:, 5 * BLOCK : 6 * BLOCK] += asked
    return queries * 0.1 + asked, keys


@pytest.mark.parametrize("policy", [BlockTopK(3), HiP(8, 1), VerticalSlash(2, 1)])
def test_estimates_find_what_is_asked_for(policy: Policy) -> None:
    blocks = chosen(policy, *planted())
    assert blocks[:, 6:, 5].all()


def test_vertical_slash_finds_a_diagonal() -> None:
    queries, keys, values = made(640, 640, heads=2)
    keys = torch.nn.functional.normalize(torch.randn(2, 640, 16), dim=-1)
    queries = 40 * keys.roll(200, 1)  # each looks 200 positions back
    blocks = chosen(VerticalSlash(1, 2), queries, keys)
    got = block_attention(queries, keys, values[:, :640], scaling=1.0, blocks=blocks)
    want = block_attention(queries, keys, values[:, :640], scaling=1.0)
    assert float((got - want)[256:].abs().max()) < 0.2 * float(want.abs().max())


def test_search_gives_each_head_the_pattern_that_serves_it() -> None:
    queries, keys, values = made()
    asked, answering = planted()
    queries[2:], keys[1] = asked[2:], answering[1]
    found = search(queries, keys, values, scaling=0.25, layer=7, budget=5)
    assert set(found) == {(7, head) for head in range(4)}
    blocks = chosen(MInference(found), queries, keys, layer=7)
    dense = block_attention(queries, keys, values, scaling=0.25)
    got = block_attention(queries, keys, values, scaling=0.25, blocks=blocks)
    errors = (got - dense).square().sum((0, 2))
    for policy in candidates(5):
        other = block_attention(queries, keys, values, scaling=0.25, blocks=chosen(policy, queries, keys))
        assert (errors <= (other - dense).square().sum((0, 2)) + 1e-6).all()


def test_search_compares_within_the_window() -> None:
    queries, keys = planted()
    options: dict[str, Any] = {"scaling": 0.25, "layer": 0, "budget": 5}
    whole, near = (search(queries, keys, made()[2], window=window, **options) for window in (0, 128))
    assert set(whole.values()) == {BlockTopK(5)}
    assert set(near.values()) == {candidates(5)[0]}  # all of the window, and nothing is lost


def test_whoever_watches_is_told_the_window() -> None:
    class Windows(Watch):
        def see(self, queries: Tensor, keys: Tensor, values: Tensor, **others: Any) -> None:
            found[others["layer"]] = others["window"]

    found: dict[int, int] = {}
    Windows().read(tiny_model("gemma3"), tiny_tokens(1, 20))
    assert found == {0: 8, 1: 0, 2: 8}


def test_patterns_of_a_head_are_as_they_are_alone() -> None:
    queries, keys, _ = made()
    strided, seer = Strided(window=64, stride=4), Seer(torch.randn(1, 4, 16, 16), 3)
    blocks = chosen(MInference({(0, 2): strided, (0, 3): seer}, BlockTopK(2)), queries, keys)
    for head, policy in enumerate((BlockTopK(2), BlockTopK(2), strided, seer)):
        assert torch.equal(blocks[head], chosen(policy, queries, keys)[head])


def test_patterns_of_a_model_are_found_on_a_text_and_run() -> None:
    model, ids = tiny_model("llama").eval(), tiny_tokens(1, 500)
    policy = searched(model, ids[0], 5)
    assert set(policy.heads) == {(layer, head) for layer in range(3) for head in range(4)}
    assert set(policy.heads.values()) <= set(candidates(5))
    with torch.no_grad(), attention(model, policy) as attend:
        assert model(ids).logits.isfinite().all()
    assert 0 < attend.looked < 1


@pytest.mark.parametrize("window", [100, 128])
def test_what_is_looked_at_is_counted_within_the_window(window: int) -> None:
    model, ids = tiny_model("mistral", sliding_window=window).eval(), tiny_tokens(1, 400)
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 2}
    with torch.no_grad(), attention(model, SinkWindow(0, window)) as attend:
        got = model.generate(ids, **options)
    assert torch.equal(got, model.generate(ids, **options))
    assert attend.looked == 1.0
    with torch.no_grad(), attention(model, SinkWindow(64, 1)) as attend:
        model(ids)
    assert attend.looked == (1 + 2 + 2 + 4 * 1) / (1 + 2 + 5 * 3)


def test_block_means_are_of_whole_and_part_blocks() -> None:
    x = torch.randn(2, 150, 8)
    means = block_means(x, 50)
    want = torch.stack([x[:, :14].mean(1), x[:, 14:78].mean(1), x[:, 78:142].mean(1), x[:, 142:].mean(1)], 1)
    torch.testing.assert_close(means, want)


@pytest.mark.parametrize("arch", ["llama", "mistral", "qwen3", "starcoder2", "gemma3", "opt"])
def test_dense_attention_in_transformers_is_its_own(arch: str) -> None:
    model, ids = tiny_model(arch).eval(), tiny_tokens(2, 150)
    with torch.no_grad():
        want = model(ids).logits
        with attention(model, None) as attend:
            got = model(ids).logits
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-4)
    assert attend.looked == 1.0


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_batches_give_what_each_text_gives_alone(side: str) -> None:
    model, ids = tiny_model("llama").eval(), tiny_tokens(3, 200)
    mask = torch.ones_like(ids)
    for row, length in enumerate((200, 130, 7)):
        mask[row, : 200 - length] = 0
        if side == "right":
            mask[row] = mask[row].flip(0)
    with torch.no_grad(), attention(model, SMALL["sink_window"]):
        got = model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        for row in range(3):
            kept = mask[row].bool()
            torch.testing.assert_close(
                got[row, kept], model(ids[row, kept][None]).logits[0], atol=1e-5, rtol=1e-4
            )


def test_ragged_batches_in_windows_give_what_each_text_gives_alone() -> None:
    model, ids = tiny_model("mistral", sliding_window=100).eval(), tiny_tokens(3, 330)
    mask = torch.ones_like(ids)
    for row, length in enumerate((330, 255, 7)):
        mask[row, : 330 - length] = 0
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 2, "eos_token_id": []}
    options |= {"output_scores": True, "return_dict_in_generate": True}
    with torch.no_grad(), attention(model, SinkWindow(4, 30)):
        got = model.generate(ids, attention_mask=mask, **options)
        for row in range(3):
            alone = model.generate(ids[row, mask[row].bool()][None], **options)
            for step, scores in enumerate(alone.scores):
                torch.testing.assert_close(got.scores[step][row], scores[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", list(SMALL))
def test_generation_goes_on_from_its_cache(name: str) -> None:
    model, ids = tiny_model("llama").eval(), tiny_tokens(1, 400)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad(), attention(model, FULL[name]):
        got = model.generate(ids, **options)
    assert torch.equal(got, model.generate(ids, **options))
    with torch.no_grad(), attention(model, SMALL[name]) as attend:
        assert model.generate(ids, **options).shape == (1, 406)
    assert attend.looked < 1


PREFIX = or_masks(causal_mask_function, lambda text, head, q, k: (q < 9) & (k < 9))  # sees itself whole


@pytest.mark.parametrize("length", [30, 300])
def test_masks_of_another_form_are_refused(length: int) -> None:
    """All of a short text's mask is looked at, and some of a long one's."""
    assert (length**2 * 2 > PAIRS) == (length == 300)
    packed = packed_sequence_mask_function((torch.arange(length) >= length - 9).long().expand(2, -1))
    options: dict[str, Any] = {"batch_size": 2, "q_length": length, "kv_length": length}
    window = sliding_window_causal_mask_function(8)
    assert key_positions(mask_function=causal_mask_function, **options) is None
    assert key_positions(mask_function=window, local_size=8, **options) is None
    chunked = chunked_causal_mask_function(25, torch.zeros(2, dtype=torch.int64))
    for mask, size in (
        (packed, None),
        (PREFIX, None),
        (chunked, 25),
        (window, None),
        (window, 9),
        (lambda text, head, q, k: q >= 0, None),
        (lambda text, head, q, k: (k <= q) & ((text == 0) | (k != 4)), None),
    ):
        with pytest.raises(MethodError, match="this model's mask"):
            key_positions(mask_function=mask, local_size=size, **options)


def test_models_whose_attention_is_not_of_one_causal_text_are_refused() -> None:
    model, ids = tiny_model("llama").eval(), tiny_tokens(1, 20)
    positions = torch.arange(10).repeat(2)[None]
    with torch.no_grad(), attention(model, None):
        with pytest.raises(MethodError, match="this model's mask"):
            model(ids, position_ids=positions, use_cache=False)
        with pytest.raises(MethodError, match="marks padding"):
            model(ids, attention_mask=torch.ones(1, 1, 20, 20).bool())
        with pytest.raises(MethodError, match="room for more"):
            model.generate(ids, cache_implementation="static", max_new_tokens=2)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 1}
    encoder = BertModel(BertConfig(vocab_size=384, **sizes)).eval()
    with torch.no_grad(), attention(encoder, None), pytest.raises(MethodError, match="this model's mask"):
        encoder(ids)
    some = (torch.zeros(1, 2, 3, 4),) * 3
    with pytest.raises(MethodError, match="is causal"):
        Attend(None)(encoder.encoder.layer[0].attention.self, *some, None)
    with pytest.raises(MethodError, match="is causal"):
        Attend(None)(model.model.layers[0].self_attn, *some, None, is_causal=False)


def test_names_are_known_to_transformers_and_the_model_is_as_before() -> None:
    model, ids = tiny_model("llama").eval(), tiny_tokens(1, 100)
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="on the way"), attention(model, "block_topk"):
        raise RuntimeError("on the way")
    assert model.config._attn_implementation == before
    with torch.no_grad():
        want = model(ids).logits
        model.set_attn_implementation("gossamer:minference")
        torch.testing.assert_close(model(ids).logits, want, atol=2e-5, rtol=2e-4)  # all fits into its budget


def test_what_it_cannot_do_is_refused() -> None:
    model, ids = tiny_model("gemma2").eval(), tiny_tokens(1, 30)
    with torch.no_grad(), attention(model, None), pytest.raises(MethodError, match="softcap"):
        model(ids)
    model = tiny_model("llama")
    with attention(model, None), pytest.raises(MethodError, match="no gradient"):
        model(ids)
    mask = torch.ones_like(ids)
    mask[0, 10] = 0
    with torch.no_grad(), attention(model.eval(), None), pytest.raises(MethodError, match="within"):
        model(ids, attention_mask=mask)
    for made_wrong in (
        lambda: SinkWindow(window=0),
        lambda: Strided(stride=0),
        lambda: BlockTopK(0),
        lambda: HiP(0),
        lambda: candidates(3),
    ):
        with pytest.raises(MethodError, match="takes"):
            made_wrong()
    with pytest.raises(MethodError, match="unknown"), attention(model, "nothing"):
        pass
    with pytest.raises(MethodError, match="dropout"):
        Attend(None)(model, *(torch.zeros(1, 2, 3, 4),) * 3, None, dropout=0.1)
