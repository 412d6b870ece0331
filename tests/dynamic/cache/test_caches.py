"""Compressed and selectively read caches in transformers: exact at full budget, honest about their size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gossamer.dynamic.attention import attention
from gossamer.dynamic.cache import CACHES, CacheMethod, KeptCache, reading
from gossamer.dynamic.cache.double_sparsity import DoubleSparsity, label_channels
from gossamer.dynamic.cache.gear import Gear, low_rank, take_out
from gossamer.dynamic.cache.low_rank_keys import LowRankKeys
from gossamer.dynamic.cache.method import KeptLayer
from gossamer.dynamic.cache.parts import tensors
from gossamer.dynamic.cache.quantize import of_keys, of_values
from gossamer.dynamic.cache.rotation import Rotation
from gossamer.errors import MethodError
from tiny import tiny_model, tiny_tokens

EVERY_CHANNEL = torch.arange(16).expand(3, 2, 16)
SOME_CHANNELS = torch.arange(0, 16, 4).expand(3, 2, 4)
# nothing is lost, or all is read
FULL: dict[str, CacheMethod] = {
    "gear": Gear(bits=4, outliers=1.0),
    "low_rank_keys": LowRankKeys(rank=32, tokens=4096, value_bits=16),
    "double_sparsity": DoubleSparsity(EVERY_CHANNEL, tokens=4096),
}
SMALL: dict[str, CacheMethod] = {
    "gear": Gear(bits=2, rank=2, outliers=0.02, recent=16),
    "low_rank_keys": LowRankKeys(rank=12, tokens=64, outliers=4, local=2, value_bits=4),
    "double_sparsity": DoubleSparsity(SOME_CHANNELS, tokens=48, recent=8),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small lose more by a team of threads than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama").requires_grad_(False)


@contextmanager
def nothing(*_: Any) -> Iterator[None]:
    yield


def ways(name: str) -> list[Callable[..., Any]]:
    return [nothing] if name == "gear" else [nothing, reading]


def run(model: Any, cache: Any, ids: Tensor, pieces: list[int]) -> Tensor:
    """Logits of all positions, ``ids`` going in by pieces."""
    logits = [model(part, past_key_values=cache, use_cache=True).logits for part in ids.split(pieces, dim=1)]
    return torch.cat(logits, 1)


def test_every_cache_is_tried_here() -> None:
    assert set(CACHES) == set(FULL) == set(SMALL)


@pytest.mark.parametrize("name", list(FULL))
@pytest.mark.parametrize("pieces", [[300, 1, 1, 40, 1, 57], [1] * 5 + [395], [200, 200]])
@pytest.mark.parametrize("rows", [1, 3])
def test_a_full_budget_is_the_plain_cache(model: Any, name: str, pieces: list[int], rows: int) -> None:
    ids = tiny_tokens(rows, sum(pieces))
    want = run(model, DynamicCache(config=model.config), ids, pieces)
    for way in ways(name):
        cache = FULL[name].new(model)
        with way(model, cache):
            got = run(model, cache, ids, pieces)
        if name == "gear" or (name == "double_sparsity" and way is nothing):
            assert torch.equal(got, want)
        else:
            torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-3)
        assert cache.get_seq_length() == 400


@pytest.mark.parametrize("name", list(FULL))
def test_generate_is_as_with_the_plain_cache(model: Any, name: str) -> None:
    ids = tiny_tokens(1, 200)
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    for way in ways(name):
        cache = FULL[name].new(model)
        with way(model, cache):
            assert torch.equal(model.generate(ids, past_key_values=cache, **options), want)
        small = SMALL[name].new(model)
        with way(model, small):
            assert model.generate(ids, past_key_values=small, **options).shape == (1, 220)


@pytest.mark.parametrize("name", list(FULL))
@pytest.mark.parametrize("arch", ["qwen3", "smollm3", "qwen2", "mistral"])
def test_other_families(name: str, arch: str) -> None:
    """Heads of 32, layers without rotation, biases; layers with a window keep transformers' own cache."""
    changes = {"sliding_window": None} if arch == "mistral" else {}
    other, ids = tiny_model(arch, **changes).requires_grad_(False), tiny_tokens(2, 150)
    dim = other.model.layers[0].self_attn.head_dim
    method = FULL[name]
    if name == "double_sparsity":
        method = DoubleSparsity(torch.arange(dim).expand(3, 2, dim), tokens=4096)
    if name == "low_rank_keys":
        method = LowRankKeys(rank=2 * dim, tokens=4096, value_bits=16)
    want = run(other, DynamicCache(config=other.config), ids, [120, 1, 29])
    cache = method.new(other)
    with ways(name)[-1](other, cache):
        got = run(other, cache, ids, [120, 1, 29])
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("name", list(SMALL))
def test_what_is_kept_is_what_is_counted(model: Any, name: str) -> None:
    ids = tiny_tokens(1, 480)
    cache = SMALL[name].new(model)
    run(model, cache, ids, [480])
    plain = DynamicCache(config=model.config)
    run(model, plain, ids, [480])
    dense = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    held = [x for layer in cache.layers if isinstance(layer, KeptLayer) for x in tensors(layer.state)]
    assert cache.nbytes >= sum(x.nbytes for x in held) > 0
    # float32 numbers: 2 bits and what comes with them; rank 12 of 32 and 4 bits; a quarter of the keys more
    least, most = {"gear": (0.0625, 0.3), "low_rank_keys": (0.2, 0.55), "double_sparsity": (1.12, 1.8)}[name]
    assert least < cache.nbytes / dense < most
    cache.reset()
    assert cache.nbytes == 0
    assert cache.get_seq_length() == 0
    again = SMALL[name].new(model)
    assert torch.equal(run(model, cache, ids, [480]), run(model, again, ids, [480]))


@pytest.mark.parametrize("name", list(FULL))
@pytest.mark.parametrize("cut", [3, 50, 170, 350])
def test_a_cropped_cache_goes_on_as_a_shorter_one(model: Any, name: str, cut: int) -> None:
    ids, other = tiny_tokens(1, 360), tiny_tokens(1, 30, seed=5)
    cache = FULL[name].new(model)
    with ways(name)[-1](model, cache):
        run(model, cache, ids, [340, 20])
        cache.crop(-cut)
        assert cache.get_seq_length() == 360 - cut
        got = run(model, cache, other, [30])
    want = run(model, DynamicCache(), torch.cat([ids[:, : 360 - cut], other], 1), [390 - cut])[:, -30:]
    torch.testing.assert_close(got, want, atol=2e-4, rtol=2e-3)
    cache.crop(-1000)
    assert cache.get_seq_length() == 0
    with pytest.raises(MethodError, match="minus"):
        cache.crop(5)


@pytest.mark.parametrize("name", list(SMALL))
def test_rows_of_a_batch_are_for_themselves(model: Any, name: str) -> None:
    """Each row is as if alone, also after rows were chosen anew."""
    ids = tiny_tokens(3, 200)
    cache = SMALL[name].new(model)
    with ways(name)[-1](model, cache):
        run(model, cache, ids, [180, 1, 19])
        cache.reorder_cache(torch.tensor([2, 0, 0]))
        cache.batch_select_indices(torch.tensor([0, 1]))
        cache.batch_repeat_interleave(2)
        got = run(model, cache, ids[:1, :1].expand(4, 1), [1])
    for at, row in enumerate([2, 2, 0, 0]):
        alone = SMALL[name].new(model)
        with ways(name)[-1](model, alone):
            run(model, alone, ids[row : row + 1], [180, 1, 19])
            want = run(model, alone, ids[:1, :1], [1])
        torch.testing.assert_close(got[at : at + 1], want, atol=2e-3, rtol=2e-2)


def test_padding_before_a_text_in_gear(model: Any) -> None:
    ids = tiny_tokens(2, 120)
    mask = torch.ones_like(ids)
    mask[1, :50] = 0
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    cache = FULL["gear"].new(model)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options))
    for name in ("low_rank_keys", "double_sparsity"):
        cache = FULL[name].new(model)
        with reading(model, cache), pytest.raises(MethodError, match="padding"):
            model.generate(ids, past_key_values=cache, **options)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_are_within_half_a_step(bits: int) -> None:
    x = torch.randn(2, 3, 128, 16, generator=torch.Generator().manual_seed(1)) + 3
    for codes, groups in ((of_keys(x, bits), x.unflatten(2, (2, 64))), (of_values(x, bits), x)):
        dim = 3
        step = (groups.amax(dim, keepdim=True) - groups.amin(dim, keepdim=True)) / (2**bits - 1)
        assert codes.codes.nbytes == x.numel() * bits // 8
        # scale and low are rounded to float16
        slack = step / 2 + 2**-10 * (groups.abs().amax() + (2**bits - 1) * step) / 2
        assert bool(((codes.expand() - groups).abs() <= slack).all())
    same = of_values(torch.full((1, 1, 4, 16), 0.5), bits)
    assert torch.equal(same.expand(), torch.full((1, 1, 4, 16), 0.5))


def test_parts_of_gear() -> None:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(1, 2, 128, 16, generator=generator) * (torch.rand(16, generator=generator) * 4)
    rest, outliers = take_out(x, 0.25)
    assert torch.equal(outliers.put_back(rest), x)
    assert outliers.numbers.shape[-1] == 4
    assert bool((rest.amax(-1) <= x.amax(-1)).all())
    assert bool((rest.amin(-1) >= x.amin(-1)).all())
    left, right = low_rank(x, 4)
    u, s, v = torch.linalg.svd(x)
    best = (x - u[..., :4] * s[..., None, :4] @ v[..., :4, :]).square().sum()
    assert best <= (x - left @ right.mT).square().sum() < 1.2 * best
    losses = [(method.compress(x, True, 4).expand() - x).square().mean() for method in (
        Gear(2, 4, 0.0), Gear(2, 4, 0.05), Gear(4, 4, 0.05), Gear(8, 4, 0.05)
    )]  # fmt: skip
    assert losses == sorted(losses, reverse=True)
    assert (Gear(2, 0, 0.0).compress(x, True, 0).expand() - x).square().mean() > losses[0]


def test_keys_before_rotation(model: Any) -> None:
    rotation = Rotation.of(model, 0)
    x, position = torch.randn(1, 2, 9, 16), torch.arange(9)
    cos, sin = model.model.rotary_emb(x, position[None])
    half = torch.cat([-x[..., 8:], x[..., :8]], -1)
    turned = rotation.apply(x, position)
    torch.testing.assert_close(turned, x * cos + half * sin)
    torch.testing.assert_close(rotation.undo(turned, position), x)


def test_a_token_that_matters_is_found(model: Any) -> None:
    """Of keys that are small but for one, that one is read, by its label channels or its chunk's mean."""
    for method in (DoubleSparsity(SOME_CHANNELS, tokens=12, recent=4), LowRankKeys(32, 8, outliers=0)):
        layer: Any = method.layer(model, 0)
        generator = torch.Generator().manual_seed(4)
        keys = 0.01 * torch.randn(1, 2, 256, 16, generator=generator)
        keys[:, 0, 77], keys[:, 1, 130] = 5, 5
        layer.update(keys, torch.randn(1, 2, 256, 16, generator=generator))
        layer.update(keys[:, :, :1], keys[:, :, :1])
        chosen = layer.choose(torch.ones(1, 2, 2, 1, 16), 0.25)
        assert 77 in chosen[0, 0, 0].tolist()
        assert 130 in chosen[0, 1, 0].tolist()
        assert 256 in chosen[0, 0, 0].tolist()
        assert chosen.shape[3] < 60
        k, v = layer.gather(chosen[:, :, 0])
        everything = layer.everything()
        index = chosen[0, 1, 0]
        torch.testing.assert_close(k[0, 1], everything[0][0, 1, index], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(v[0, 1], everything[1][0, 1, index])


def test_labels_are_the_channels_of_large_products(model: Any) -> None:
    windows = tiny_tokens(2, 60)
    labels = label_channels(model, windows, 5)
    assert labels.shape == (3, 2, 5)
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for ids in windows:
            hidden = model.model.embed_tokens(ids[None])
            layer = model.model.layers[0]
            x = layer.input_layernorm(hidden)
            cos, sin = model.model.rotary_emb(x, torch.arange(60)[None])
            q = layer.self_attn.q_proj(x).unflatten(2, (4, 16)).transpose(1, 2)
            k = layer.self_attn.k_proj(x).unflatten(2, (2, 16)).transpose(1, 2)
            q, k = (y * cos + torch.cat([-y[..., 8:], y[..., :8]], -1) * sin for y in (q, k))
            found[0] = found.get(0, 0) + q.abs().sum(2)[0]
            found[1] = found.get(1, 0) + k.abs().sum(2)[0]
    products = found[0].unflatten(0, (2, 2)).sum(1) * found[1]
    assert torch.equal(labels[0], products.topk(5, -1).indices)


def test_a_step_reads_less(model: Any) -> None:
    ids = tiny_tokens(1, 420)
    for name in ("low_rank_keys", "double_sparsity"):
        cache = SMALL[name].new(model)
        with reading(model, cache) as attend:
            run(model, cache, ids, [400, 1, 19])
        assert attend.looked < 0.35
        assert run(model, cache, ids, [420]).isfinite().all()  # without `reading` all is read


@pytest.mark.parametrize(
    ("pieces", "compressed"),
    [([4, 64], 0), ([1] * 4 + [64], 0), ([100, 1, 64, 60], 80), ([100, *[64] * 9], 592)],
)
def test_rows_of_one_call_read_their_own_and_the_latest_keys_as_they_are(
    model: Any, pieces: list[int], compressed: int
) -> None:
    method = SMALL["low_rank_keys"]
    assert isinstance(method, LowRankKeys)
    layer: Any = method.layer(model, 0)
    layer.choosing = True
    keys, values = torch.randn(2, 1, 2, sum(pieces), 16, generator=torch.Generator().manual_seed(7))
    first = 0
    for piece in pieces:
        layer.update(keys[:, :, first : first + piece], values[:, :, first : first + piece])
        lasting = max(0, first + 1 - method.local * method.chunk) if first else first + piece
        k, v = layer.everything()
        assert torch.equal(k[:, :, lasting:], keys[:, :, lasting : first + piece])
        assert torch.equal(v[:, :, lasting:], values[:, :, lasting : first + piece])
        chosen = layer.choose(torch.ones(1, 2, 2, piece, 16), 0.25)
        if first and chosen is not None:
            for row in range(piece):
                assert set(range(lasting, first + row + 1)) <= set(chosen[0, 0, row].tolist())
        first += piece
    assert compressed == (layer.state.prompt.left.shape[1] if layer.state.prompt else 0)


def test_what_does_not_suit_is_refused(model: Any) -> None:
    for made_wrong in (
        lambda: Gear(bits=3),
        lambda: Gear(rank=-1),
        lambda: Gear(outliers=1.5),
        lambda: LowRankKeys(rank=0),
        lambda: LowRankKeys(tokens=4),
        lambda: LowRankKeys(value_bits=3),
        lambda: DoubleSparsity(tokens=0),
        lambda: DoubleSparsity(tokens=10, recent=11),
    ):
        with pytest.raises(MethodError, match=r"takes|keeps"):
            made_wrong()
    with pytest.raises(MethodError, match="label channels"):
        DoubleSparsity().new(model)
    with pytest.raises(MethodError, match="labels must be"):
        DoubleSparsity(SOME_CHANNELS[:2]).new(model)
    with pytest.raises(MethodError, match="no rank of 33"):
        LowRankKeys(rank=33).new(model)
    with pytest.raises(MethodError, match="gemma2"):
        LowRankKeys(rank=8).new(tiny_model("gemma2"))
    with pytest.raises(MethodError, match="17 labels"):
        label_channels(model, tiny_tokens(1, 20), 17)
    with pytest.raises(MethodError, match="unknown cache"):
        CACHES["gaer"]
    windows = tiny_model("mistral")
    with pytest.raises(MethodError, match="see all positions"):
        Gear().new(windows)


def test_layers_with_a_window_keep_their_own_cache() -> None:
    other, ids = tiny_model("qwen2").requires_grad_(False), tiny_tokens(1, 100)
    kinds = [isinstance(layer, KeptLayer) for layer in Gear().new(other).layers]
    assert True in kinds
    cache = Gear(outliers=1.0, recent=0).new(other)
    want = run(other, DynamicCache(config=other.config), ids, [90, 1, 9])
    assert torch.equal(run(other, cache, ids, [90, 1, 9]), want)
    assert cache.nbytes > 0


def test_attention_is_as_before_after_reading(model: Any) -> None:
    before, cache = model.config._attn_implementation, FULL["double_sparsity"].new(model)
    with pytest.raises(RuntimeError, match="on the way"), reading(model, cache):
        raise RuntimeError("on the way")
    assert model.config._attn_implementation == before
    assert isinstance(cache, KeptCache)
    with torch.no_grad(), attention(model, None):
        assert run(model, cache, tiny_tokens(1, 30), [29, 1]).isfinite().all()
