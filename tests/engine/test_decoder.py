"""The native decoder against transformers, family by family, and what it promises besides."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gossamer import kernels
from gossamer.dynamic.activations.gates import Gate
from gossamer.engine import Decoder, NativeSession, pack_in_place, why_not
from gossamer.engine.caches import CACHES, CacheKind
from gossamer.engine.policy import Look
from gossamer.errors import ModelError
from gossamer.matrices import BlockDiagonal, Dense, LowRank, Matrix, Packed, Product, Sum, pack, pack_tree
from gossamer.models.session import Session
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module
from gossamer.nn.experts import take_apart
from gossamer.sparse import mask_from_scores, parse_pattern
from tiny import VOCABULARY, tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_theta": 10000.0, **settings}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {}),
    "llama untied": ("llama_untied", {}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "one head of keys": ("llama", {"num_key_value_heads": 1}),
    "many heads of keys": ("llama", {"num_key_value_heads": 4}),
    "seven queries a key": ("llama", {"hidden_size": 70, "num_attention_heads": 7, "num_key_value_heads": 1}),
    "odd sizes": ("llama", {"hidden_size": 72, "intermediate_size": 104}),
    "linear": ("llama", rope(rope_type="linear", factor=4.0)),
    "dynamic NTK": ("llama", rope(rope_type="dynamic", factor=2.0)),
    "yarn": ("llama", rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=128)),
    "llama3": (
        "llama",
        rope(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "mistral": ("mistral", {"sliding_window": 37, "head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "smollm3": ("smollm3", {}),  # whose second layer does not rotate
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"norm_topk_prob": False}),
    "a window that no layer has": ("llama", {"sliding_window": 37, "layer_types": ["sliding_attention"] * 3}),
    "a window that all layers have": (
        "mistral",
        {"sliding_window": 37, "layer_types": ["full_attention"] * 3},
    ),
    "qwen3_moe, windows": (
        "qwen3_moe",
        {"use_sliding_window": True, "sliding_window": 37, "layer_types": ["full_attention"] * 3},
    ),
    "smollm3, windows": (
        "smollm3",
        {"sliding_window": 37, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "qwen3_moe, one layer dense": ("qwen3_moe", {"norm_topk_prob": True, "mlp_only_layers": [1]}),
}


def made(case: str, seed: int = 0) -> Any:
    arch, changes = CASES[case]
    return tiny_model(arch, seed, **changes)


def packed(model: Any, values: str, layout: str = "dense") -> Any:
    """``model`` with all weights packed, in place; the embedding and head dense int8."""
    embedding = model.model.embed_tokens
    rows = Packed.pack(embedding.weight.detach(), values="int8", layout="dense")
    tied = model.lm_head.weight is embedding.weight
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach()
        if name == "lm_head":
            matrix = rows if tied else Packed.pack(weight, values="int8", layout="dense")
        else:
            mask = None
            if layout != "dense":
                pattern = parse_pattern({"bitmap": "32:64"}.get(layout, layout))
                mask = mask_from_scores(weight.abs(), pattern, 0.5)
            matrix = Packed.pack(weight, values=values, layout=layout, mask=mask)
        replace_module(model, name, StructuredLinear(matrix, module.bias))
    replace_module(model, "model.embed_tokens", StructuredEmbedding.from_embedding(embedding, rows))
    return model


def close(got: torch.Tensor, want: torch.Tensor, bound: float = 1e-4) -> None:
    assert float((got - want).abs().max() / want.abs().max()) <= bound


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case: str) -> None:
    model, ids = made(case), tiny_tokens(1, 330)[0]
    with torch.no_grad():
        want = model(ids[None]).logits[0]
    session = NativeSession(Decoder(model), torch.float32)
    got = [session.logits(ids[:300])]  # past the first chunk of the cache
    got += [session.step(int(token))[None] for token in ids[300:]]
    close(torch.cat(got), want)
    assert session.length == 330


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_weights_packed_in_place_are_the_same_numbers_and_held_once(case: str, dtype: torch.dtype) -> None:
    model, ids = made(case).to(dtype), tiny_tokens(1, 40)[0]
    apart = made(case).to(dtype)
    take_apart(apart)
    plain = {name: one.detach().clone() for name, one in apart.named_parameters() if one.dim() == 2}
    routers = {name for name in plain if name.endswith("mlp.gate.weight")}
    want = NativeSession(Decoder(model), torch.float32).logits(ids)
    with torch.no_grad():
        theirs = model(ids[None]).logits[0].float()
    pack_in_place(model)
    decoder = Decoder(model)
    assert torch.equal(NativeSession(decoder, torch.float32).logits(ids), want)
    if dtype == torch.float32 or not routers:  # of bfloat16 the rounding may choose other experts
        with torch.no_grad():
            close(model(ids[None]).logits[0].float(), theirs, 1e-4 if dtype == torch.float32 else 0.05)
    matrices = {name: module.matrix for name, module in model.named_modules() if hasattr(module, "matrix")}
    assert {f"{name}.weight" for name in matrices} | routers >= plain.keys() - {"lm_head.weight"}
    for name, matrix in matrices.items():
        key = f"{name}.weight" if f"{name}.weight" in plain else "model.embed_tokens.weight"
        assert torch.equal(matrix.to_dense(), plain[key].float()), name
    tied = model.config.tie_word_embeddings
    assert (matrices["lm_head"] is matrices["model.embed_tokens"]) == tied
    used = {id(matrix) for part in decoder.weights.values() for matrix, _ in part}
    assert {id(matrix) for name, matrix in matrices.items() if name != "model.embed_tokens"} <= used
    assert {name for name, one in model.named_parameters() if one.dim() > 1} == routers
    before = dict(model.named_modules())
    pack_in_place(model)
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize("case", ["linear", "yarn"])
def test_stretched_positions_reach_past_those_of_the_configuration(case: str) -> None:
    arch, changes = CASES[case]
    model, ids = tiny_model(arch, max_position_embeddings=128, **changes), tiny_tokens(1, 512)[0]
    with torch.no_grad():
        want = model(ids[None]).logits[0]
    session = NativeSession(Decoder(model), torch.float32)
    close(session.logits(ids), want)
    with pytest.raises(ModelError, match="512 positions"):
        session.step(3)


@pytest.mark.parametrize("case", ["llama tied", "mistral", "qwen2", "qwen3", "smollm3", "mixtral"])
def test_greedy_continuations_are_those_of_transformers(case: str) -> None:
    model, ids = made(case), tiny_tokens(1, 20)[0]
    session, other = NativeSession(Decoder(model), torch.float32), Session(model)
    ours, theirs = session.prompt(ids), other.prompt(ids)
    for _ in range(64):
        close(ours, theirs)
        best = theirs.topk(2)
        token = int(ours.argmax())
        if token != int(best.indices[0]):  # only where the two likeliest are as good as equal
            assert float(best.values[0] - best.values[1]) <= 2e-4 * float(theirs.abs().max())
            return
        ours, theirs = session.step(token), other.step(token)


@pytest.mark.parametrize(
    ("values", "layout"),
    [
        ("int8", "dense"),
        ("int4", "dense"),
        ("int3", "dense"),
        ("nl4", "dense"),
        ("nl3", "bitmap"),
        ("int4", "32:64"),
        ("int4", "bitmap"),
        ("int8", "16x4"),
        ("bfloat16", "bitmap"),
        ("float32", "16x4"),
        ("int4", "columns"),
    ],
)
def test_packed_weights_give_what_pytorch_gives_with_them(values: str, layout: str) -> None:
    if layout == "columns":
        model = packed(tiny_model("llama_untied", hidden_size=128, intermediate_size=256), values, "dense")
        for module in model.model.layers.modules():
            if isinstance(module, StructuredLinear):
                module.matrix = module.matrix.repack("columns")
    else:
        model = packed(tiny_model("llama"), values, layout)
    ids = tiny_tokens(1, 40)[0]
    with torch.no_grad():
        want = model(ids[None]).logits[0]
    # codes of activations may round to the other side: a step of one activation now and then
    close(NativeSession(Decoder(model), torch.float32).logits(ids), want, 2e-2)


def beside(model: Any, values: str) -> Any:
    """``model`` with half of its weights, a low-rank part beside each, and MLPs of which a part is a product
    alone."""
    for name, module in list(model.model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach().float()
        low_rank = LowRank.fit(weight, rank=5)
        mask = mask_from_scores(weight.abs(), parse_pattern("32:64"), 0.5)
        matrix: Matrix = Sum(Packed.pack(weight, values=values, mask=mask), low_rank)
        if "up_proj" in name:
            half = Dense(torch.eye(len(weight)) / 2)
            matrix = Product(Sum(half, LowRank.fit(half.weight, rank=3)), Sum(Dense(weight), low_rank))
        replace_module(model, f"model.{name}", StructuredLinear(pack_tree(matrix), module.bias))
    return model


@pytest.mark.parametrize("case", ["biases", "qwen3"])
@pytest.mark.parametrize("values", ["bfloat16", "int4"])
def test_sums_and_products_give_what_pytorch_gives_with_them(case: str, values: str) -> None:
    model, ids = beside(made(case), values), tiny_tokens(1, 60)[0]
    assert why_not(model) is None
    with torch.no_grad():
        want = model(ids[None]).logits[0]
    session = NativeSession(Decoder(model), torch.float32)
    got = torch.cat([session.logits(ids[:40]), *(session.step(int(token))[None] for token in ids[40:])])
    close(got, want, 2e-2)


def test_blocks_along_the_diagonal_are_refused_with_a_reason() -> None:
    model = made("biases")
    blocks = pack(BlockDiagonal.from_blocks(torch.randn(2, 32, 32)), "int8")
    replace_module(model, "model.layers.1.self_attn.o_proj", StructuredLinear(blocks, None))
    assert str(why_not(model)).startswith("o_proj of layer 1 is a BlockDiagonal with blocks")


@pytest.mark.parametrize("case", [name for name in CASES if "mix" in name or "moe" in name])
@pytest.mark.parametrize(("values", "layout"), [("bfloat16", "dense"), ("int4", "32:64")])
def test_packed_experts_give_what_pytorch_gives_with_them(case: str, values: str, layout: str) -> None:
    model, ids = made(case), tiny_tokens(1, 48)[0]
    take_apart(model)
    packed(model, values, layout)
    with torch.no_grad():
        want = model(ids[None]).logits[0]
    decoder = Decoder(model)
    session = NativeSession(decoder, torch.float32)
    got = torch.cat([session.logits(ids[:40]), *(session.step(int(token))[None] for token in ids[40:])])
    assert divergence(got, want) <= 1e-3
    again = NativeSession(decoder, torch.float32)
    close(again.logits(ids), got, 1e-3 if "amx" in kernels.available() else 0)


def factors(out: int, width: int) -> StructuredLinear:
    return StructuredLinear(pack_tree(LowRank.fit(torch.randn(out, width), rank=2)), None)


def test_a_mixture_that_does_not_fit_is_refused() -> None:
    for break_it, says in [
        (lambda mlp: setattr(mlp.gate, "top_k", 5), "5 experts of 4 cannot be chosen of layer 1"),
        (
            lambda mlp: setattr(mlp.gate, "weight", nn.Parameter(torch.ones(3, 64))),
            "the router of layer 1 is 3 x",
        ),
        (
            lambda mlp: setattr(mlp.experts._modules["2"], "down_proj", nn.Linear(8, 64)),
            "of expert 2 of layer 1",
        ),
        (
            lambda mlp: setattr(mlp.experts._modules["2"], "down_proj", nn.Identity()),
            "an expert of layer 1 is a I",
        ),
        (
            lambda mlp: setattr(mlp.experts._modules["2"], "down_proj", factors(64, 64)),
            "an expert of layer 1 holds a product",
        ),
    ]:
        model = made("mixtral")
        take_apart(model)
        break_it(model.model.layers[1].mlp)
        with pytest.raises(ModelError, match=says):
            Decoder(model)


@pytest.mark.parametrize("cache", [*CACHES, "gear4"])
@pytest.mark.parametrize("with_products", [False, True])
def test_a_token_has_the_same_bits_in_any_company_and_on_any_threads(
    cache: CacheKind, with_products: bool
) -> None:
    model = tiny_model("llama")
    made_of = beside(model, "int4") if with_products else packed(model, "int4", "32:64")
    decoder, ids = Decoder(made_of), tiny_tokens(1, 60)[0]
    session = partial(NativeSession, decoder, cache)
    # tiles give tokens that come with more than 15 others bits of their own
    tiles = kernels.isa() == "amx" and cache is not torch.float32
    sizes = [3, 9, 1, 16, 15, 16] if tiles else [3, 9, 1, 47]
    found, few = [], []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            whole, steps, parts = session(), session(), session()
            found.append(whole.logits(ids))
            few.append(torch.stack([steps.step(int(token)) for token in ids]))
            few.append(torch.cat([parts.logits(some) for some in ids.split(sizes)]))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert torch.equal(other, found[0])
    for other in few[1:]:
        assert torch.equal(other, few[0])
    if tiles:
        close(few[0], found[0], 2e-2)
    else:
        assert torch.equal(few[0], found[0])


@pytest.mark.parametrize("cache", [*CACHES, "gear4"])
@pytest.mark.parametrize("case", ["biases", "mistral", "smollm3", "qwen3_moe, one layer dense"])
def test_sequences_that_step_together_have_the_bits_of_each_alone(case: str, cache: CacheKind) -> None:
    decoder, ids = Decoder(packed(made(case), "int4", "32:64")), tiny_tokens(1, 150)[0]
    lengths = [0, 1, 63, 64, 126, 127, *range(2, 15)]  # more than go through the layers together
    alone, together = ([NativeSession(decoder, cache) for _ in lengths] for _ in range(2))
    for one, other, length in zip(alone, together, lengths, strict=True):
        for session in (one, other) if length else ():
            session.prompt(ids[:length])
    before = torch.get_num_threads()
    try:
        for step, threads in enumerate((1, 3, 2, 1)):
            torch.set_num_threads(threads)
            some = range(step % 2, len(lengths))  # another one is the first of a pass
            tokens = [int(ids[together[i].length]) for i in some]
            got = NativeSession.step_each([together[i] for i in some], tokens)
            want = torch.stack([alone[i].step(token) for i, token in zip(some, tokens, strict=True)])
            assert torch.equal(got, want)
            assert [one.length for one in together] == [one.length for one in alone]
    finally:
        torch.set_num_threads(before)


def test_sequences_of_all_kinds_step_together() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 200)[0]
    decoder, other = Decoder(model), Decoder(tiny_model("llama", seed=1))
    large = Decoder(tiny_model("llama", vocab_size=2 * VOCABULARY))
    gates = {"model.layers.0.mlp.down_proj": Gate(sparsity=0.5, features=model.config.intermediate_size)}
    gated = decoder.gated(gates)
    looks = [[Look("static", sink=1, window=1)] * decoder.heads] * len(decoder.windows)

    def sessions() -> list[NativeSession]:
        return [
            NativeSession(decoder),
            NativeSession(decoder, looks=looks),
            NativeSession(gated),
            NativeSession(decoder, torch.int8),
            NativeSession(other),
            NativeSession(decoder),
            NativeSession(gated),
        ]

    alone, together = sessions(), sessions()
    for session in (*alone, *together):
        session.prompt(ids)
    for token in (5, 6):
        want = torch.stack([session.step(token) for session in alone])
        assert torch.equal(NativeSession.step_each(together, [token] * len(together)), want)
    assert together[1].looked == alone[1].looked < 1
    assert NativeSession.step_each([], []).shape[0] == 0
    for some, tokens, said in (
        ([together[0], together[5], together[0]], [5, 5, 5], "one of them is named twice"),
        ([together[0], together[0].beside(gated)], [5, 5], "one of them is named twice"),
        ([together[0], together[5]], [5, VOCABULARY], f"0 to {VOCABULARY - 1}"),
        ([together[0], together[5]], [5], "2 sequences take as many tokens, not 1"),
        ([together[0], NativeSession(large)], [5, 5], "several vocabularies"),
    ):
        lengths = [session.length for session in some]
        with pytest.raises(ModelError, match=said):
            NativeSession.step_each(some, tokens)
        assert [session.length for session in some] == lengths
    with pytest.raises(ModelError, match="2 caches take as many tokens, not 1"):
        decoder.append_each([together[0]._cache, together[5]._cache], torch.tensor([5]))


def test_ctrl_c_between_sequences_leaves_all_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, ids = Decoder(tiny_model("llama")), tiny_tokens(1, 30)[0]
    sessions = [NativeSession(decoder) for _ in range(3)]
    for session in sessions:
        session.prompt(ids)
    append = Decoder.append_each

    other, calls = NativeSession(Decoder(tiny_model("llama", seed=1))), 0
    other.prompt(ids)

    def interrupted(self: Decoder, *given: Any) -> Any:
        nonlocal calls
        found, calls = append(self, *given), calls + 1
        if calls == 2:  # where the other decoder's turn has come
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(Decoder, "append_each", interrupted)
    with pytest.raises(KeyboardInterrupt):
        NativeSession.step_each([*sessions, other], [5, 6, 7, 8])
    monkeypatch.undo()
    assert [session.length for session in (*sessions, other)] == [30, 30, 30, 30]
    fresh = NativeSession(decoder)
    fresh.prompt(ids)
    assert torch.equal(NativeSession.step_each(sessions, [5, 6, 7])[1], fresh.step(6))


def test_chunks_of_a_prompt_give_the_bits_of_the_whole() -> None:
    decoder, ids = Decoder(tiny_model("llama")), tiny_tokens(1, 480)[0]
    whole, parts = NativeSession(decoder), NativeSession(decoder)
    pieces = torch.cat([parts.logits(some) for some in ids.split([17, 45, 300, 101, 17])])
    assert torch.equal(pieces, whole.logits(ids))


@pytest.mark.parametrize("cache", [*CACHES, "gear4"])
def test_a_row_after_several_chunks_has_the_bits_of_a_prompt(cache: CacheKind) -> None:
    ids = tiny_tokens(1, 500)[0]
    for case in ("mistral", "seven queries a key"):  # windows that begin within blocks, and none
        decoder = Decoder(made(case))
        whole, steps = NativeSession(decoder, cache), NativeSession(decoder, cache)
        steps.prompt(ids[:440])
        got, want = torch.stack([steps.step(int(token)) for token in ids[440:]]), whole.logits(ids)[440:]
        if kernels.isa() == "amx" and cache is not torch.float32:  # a row alone adds in another order
            close(got, want, 2e-2)
        else:
            assert torch.equal(got, want)


@pytest.mark.parametrize("cache", [*CACHES, "gear4"])
def test_what_lies_behind_the_last_position_is_never_seen(cache: CacheKind) -> None:
    """Positions that were forgotten hold NaN, in the block that later tokens end in."""
    ids, poisoned = tiny_tokens(1, 64)[0], tiny_model("qwen2")
    for layer in poisoned.model.layers:
        for linear in (layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.constant_(linear.bias, torch.nan)
    decoder, other = Decoder(tiny_model("qwen2")), Decoder(poisoned)
    for more in (25, 1):  # rows that come with many others, and one alone
        fresh, used = NativeSession(decoder, cache), NativeSession(decoder, cache)
        for session in (fresh, used):
            session.prompt(ids[:20])
        other.append(used._cache, ids[20:])
        used.truncate(20)
        got = used.logits(ids[20 : 20 + more])
        assert got.isfinite().all()
        assert torch.equal(got, fresh.logits(ids[20 : 20 + more]))


@pytest.mark.parametrize("dim", [16, 24])  # 24 lies in 32
@pytest.mark.parametrize(("cache", "bytes_a_number"), [(torch.bfloat16, 2), (torch.int8, 1)])
def test_smaller_caches_are_near_one_in_float32(dim: int, cache: torch.dtype, bytes_a_number: int) -> None:
    decoder, ids = Decoder(tiny_model("llama", head_dim=dim)), tiny_tokens(1, 300)[0]
    full, small = NativeSession(decoder, torch.float32), NativeSession(decoder, cache)
    close(small.logits(ids), full.logits(ids), 3e-2)
    numbers = full.nbytes // 4
    scales = numbers // {16: 16, 24: 32}[dim] if cache == torch.int8 else 0
    assert small.nbytes == numbers * bytes_a_number + 4 * scales


@pytest.mark.parametrize("cache", [*CACHES, "gear4"])
def test_what_was_forgotten_leaves_nothing_behind(cache: CacheKind) -> None:
    decoder, ids = Decoder(tiny_model("llama")), tiny_tokens(1, 90)[0]
    session, other = NativeSession(decoder, cache), NativeSession(decoder, cache)
    for length in (1, 31, 64):
        for one in (session, other):
            one.truncate(0)
            one.prompt(ids[:length])
        session.prompt(ids[length:])
        session.truncate(length)
        assert torch.equal(session.step(7), other.step(7))


def test_truncated_and_used_again() -> None:
    decoder, ids = Decoder(tiny_model("llama")), tiny_tokens(1, 300)[0]
    session = NativeSession(decoder)
    session.prompt(ids)
    size = session.nbytes
    session.truncate(100)
    assert session.length == 100
    assert session.nbytes < size
    again = NativeSession(decoder)
    again.prompt(ids[:100])
    assert torch.equal(session.prompt(ids[100:]), again.prompt(ids[100:]))


def test_memory_grows_by_chunks_of_the_cache_alone() -> None:
    session = NativeSession(Decoder(tiny_model("llama")))
    session.prompt(tiny_tokens(1, 1)[0])
    size = session.nbytes
    for _ in range(255):
        session.step(3)
    assert session.nbytes == size
    session.step(3)
    assert session.nbytes == 2 * size


@pytest.mark.parametrize("cache", [torch.bfloat16, "gear4"])
def test_what_cannot_be_appended_changes_nothing(cache: CacheKind) -> None:
    decoder = Decoder(tiny_model("llama", max_position_embeddings=2048))
    session, other = NativeSession(decoder, cache), NativeSession(decoder, cache)
    session.prompt(tiny_tokens(1, 700)[0])
    other.prompt(tiny_tokens(1, 700)[0])
    many = tiny_tokens(1, 1300)[0]
    for ids, said in (
        (torch.zeros(0, dtype=torch.int64), "at least one"),
        (torch.tensor([VOCABULARY]), f"0 to {VOCABULARY - 1}"),
        (torch.tensor([-1]), "0 to"),
        (torch.tensor([*many.tolist(), -1]), "0 to"),  # behind chunks that could be appended
        (torch.cat([many, many])[:1349], "2048 positions"),
    ):
        with pytest.raises(ModelError, match=said):
            session.prompt(ids)
        assert session.length == 700
    assert torch.equal(session.logits(many), other.logits(many))


@pytest.mark.parametrize("arch", ["gpt2", "gemma2", "phi"])
def test_other_families_are_refused_with_a_reason(arch: str) -> None:
    model = tiny_model(arch)
    reason = why_not(model)
    assert reason is not None
    with pytest.raises(ModelError, match="family"):
        Decoder(model)


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "self_attn.k_norm"])
def test_norms_of_another_kind_are_refused_with_a_reason(name: str) -> None:
    model = tiny_model("qwen3")
    norm = model.model.layers[1].get_submodule(name)
    norm.variance_epsilon = 0.5
    assert f"{name.split('.')[-1]} of layer 1 adds 0.5 to a mean of squares" in str(why_not(model))
    model.model.layers[1].set_submodule(name, nn.Sequential(norm))
    assert "layer 1 is a Sequential, not a Qwen3RMSNorm" in str(why_not(model))
    with pytest.raises(ModelError, match="is a Sequential"):
        Decoder(model)
    model.model.norm = nn.Identity()
    assert why_not(model) == "its last norm is a Identity"


def test_a_model_that_does_not_fit_its_configuration_is_refused() -> None:
    model = tiny_model("llama_untied")
    model.config.num_key_value_heads = 1
    with pytest.raises(ModelError, match="k of layer 0 is 32 x 64, not 16 x 64"):
        Decoder(model)


def test_threads_of_python_take_turns_and_decoders_live_side_by_side() -> None:
    ids = tiny_tokens(1, 50)[0]
    decoders = [Decoder(tiny_model("llama", seed)) for seed in range(2)]
    want = [NativeSession(decoder, torch.float32).logits(ids) for decoder in decoders]
    wrong: list[int] = []

    def work(number: int) -> None:
        session = NativeSession(decoders[number % 2], torch.float32)
        got = torch.stack([session.step(int(token)) for token in ids])
        if not torch.equal(got, want[number % 2]):
            wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_views_of_sequences_that_step_together_take_turns() -> None:
    decoder = Decoder(tiny_model("llama"))
    sessions = [NativeSession(decoder) for _ in range(3)]
    views = [session.beside(decoder.gated(None)) for session in sessions]
    start = threading.Barrier(4)

    def work(some: list[NativeSession]) -> None:
        start.wait()
        for _ in range(30):
            NativeSession.step_each(some, [5] * len(some))

    orders = [sessions, sessions[::-1], views, views[::-1]]
    threads = [threading.Thread(target=work, args=(some,), daemon=True) for some in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert [session.length for session in sessions] == [120] * 3


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_decodes() -> None:
    """More numbers than torch handles without its threads, which a child has not: 32,768."""
    decoder, ids = Decoder(tiny_model("llama")), tiny_tokens(1, 300)[0]
    wide = Decoder(tiny_model("llama", vocab_size=10_000))
    sessions = [NativeSession(wide) for _ in range(8)]

    def logits() -> list[Any]:
        together = NativeSession.step_each(sessions, list(range(8)))
        for session in sessions:
            session.truncate(0)
        return [NativeSession(decoder).logits(ids).numpy(), together.numpy()]

    want = logits()
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.cat([torch.zeros(300, VOCABULARY)] * 2)  # the threads are there
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(60)  # rather than wait for ever
            try:
                os._exit(0 if all(map(np.array_equal, logits(), want)) else 1)
            finally:
                os._exit(2)
    finally:
        torch.set_num_threads(before)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def divergence(got: torch.Tensor, want: torch.Tensor) -> float:
    """Mean KL in nats a token."""
    logs = got.log_softmax(1), want.log_softmax(1)
    return float(nn.functional.kl_div(*logs, log_target=True, reduction="batchmean"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "layout"),
    [("float32", "dense"), ("bfloat16", "dense"), ("int8", "dense"), ("int4", "dense"), ("int4", "32:64")],
)
def test_the_real_model(smollm2: Path, values: str, layout: str) -> None:
    import pydoc_data.topics

    from gossamer.models import load_model

    model, tokenizer = load_model(smollm2, torch.float32)
    if values != "float32":
        packed(model, values, layout)
    ids = torch.tensor(tokenizer(pydoc_data.topics.topics["assert"])["input_ids"][:200])
    with torch.no_grad():
        want = model(ids[None]).logits[0]
        model.config._attn_implementation = "eager"
        other = model(ids[None]).logits[0]
    got = NativeSession(Decoder(model), torch.float32).logits(ids)
    if values == "float32":
        close(got, want)
    # Where activations are rounded, a difference in the last bit becomes one of a code, and grows from layer
    # to layer: PyTorch's two ways of attending differ as much from each other.
    assert divergence(got, want) <= 2 * divergence(other, want) + 1e-5


@pytest.mark.parametrize(
    "look", [Look("labels", labels=(0, 1)), Look("static", window=0, steps=False)], ids=lambda look: look.kind
)
def test_what_is_left_of_a_prompt_is_no_step(look: Look) -> None:
    """Prompts are read 512 tokens at a time; one that is left by itself is looked at as those before it."""
    model = tiny_model("llama", max_position_embeddings=2048, initializer_range=0.3)
    decoder, ids = Decoder(model.requires_grad_(False)), tiny_tokens(1, 515)[0]
    looks = [[look] * model.config.num_attention_heads] * model.config.num_hidden_layers

    def logits(prompt: int, looks: Any) -> torch.Tensor:
        session = NativeSession(decoder, looks=looks)
        parts = [session.logits(ids[:prompt]), *(session.step(int(token))[None] for token in ids[prompt:])]
        return torch.cat(parts)

    if look.kind == "labels":  # chooses for steps alone
        assert torch.equal(logits(513, looks)[:513], logits(513, None)[:513])
        assert not torch.equal(logits(513, looks)[513:], logits(513, None)[513:])
    else:  # for prompts alone
        assert torch.equal(logits(513, looks)[:513], logits(514, looks)[:513])
