"""Low-rank keys in the native decoder: what PyTorch gives with the same keys put onto the same vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from gossamer import kernels
from gossamer.dynamic.attention.label_blocks import LabelBlocks
from gossamer.dynamic.cache.double_sparsity import label_channels
from gossamer.dynamic.cache.key_basis import key_basis
from gossamer.dynamic.cache.method import KeptCache, KeptLayer
from gossamer.dynamic.cache.quantize import of_values
from gossamer.dynamic.cache.rotation import Rotation
from gossamer.engine import Decoder, NativeSession, PackedCache
from gossamer.errors import CheckpointError, MethodError, ModelError
from gossamer.kernels import BLOCK
from gossamer.kernels.native import native
from tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

TIERS = native().available() if kernels.native_available() else []
YARN = {"rope_theta": 10000.0, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"head_dim": 20}),
    "with a scale": ("llama", {"rope_parameters": YARN}),
    "layers that do not rotate": ("smollm3", {}),
    "normed keys": ("qwen3", {}),
    "one head": ("llama", {"num_key_value_heads": 1}),
}


def made(name: str = "llama", **changes: Any) -> Any:
    """Attention that differs from token to token: weights are larger than in other tests."""
    arch, others = MODELS[name]
    changes = {"max_position_embeddings": 2048, "initializer_range": 0.3, **others, **changes}
    return tiny_model(arch, **changes).requires_grad_(False)


class Projected(KeptLayer):
    """All as it came, in bfloat16; blocks before the one that precedes a row's own are read as they are kept:
    keys before rotation as sums of vectors, values in 4 bits."""

    def __init__(self, vectors: Tensor, rotation: Rotation) -> None:
        super().__init__()
        self.vectors, self.rotation = vectors.flatten(1), rotation

    def empty(self, keys: Tensor) -> Any:
        return keys[:, :, :0], keys[:, :, :0]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        new = (x.bfloat16().float() for x in (keys, values))
        self.state = k, v = tuple(torch.cat([x, y], 2) for x, y in zip(self.state, new, strict=True))
        old = max(0, (self.length - 1) // BLOCK - 1) * BLOCK
        if not old:
            return k, v
        plain = self.rotation.undo(k[:, :, :old], torch.arange(old)).transpose(1, 2)
        factors = (plain.flatten(2) @ self.vectors.mT).bfloat16().float()
        plain = (factors @ self.vectors).reshape(plain.shape).transpose(1, 2)
        kept = self.rotation.apply(plain, torch.arange(old)), of_values(v[:, :, :old], 4).expand()
        return torch.cat([kept[0], k[:, :, old:]], 2), torch.cat([kept[1], v[:, :, old:]], 2)

    def cut(self, length: int) -> None:
        raise NotImplementedError


def in_transformers(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of all positions, a block at a time: a row then finds the cache as it would alone."""
    parts = [model(some, past_key_values=cache, use_cache=True).logits[0] for some in ids[None].split(64, 1)]
    return torch.cat(parts)


def projected(model: Any, vectors: Tensor) -> KeptCache:
    plain = DynamicCache(config=model.config).layers
    assert all(type(layer) is DynamicLayer for layer in plain)
    layers = [Projected(of_layer, Rotation.of(model, number)) for number, of_layer in enumerate(vectors)]
    return KeptCache(layers=layers)


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square, in those of ``want``."""
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("name", MODELS)
def test_it_keeps_what_the_vectors_hold(tier: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = native().tier(tier)
    monkeypatch.setattr(kernels.native, "tier", lambda _: index)
    model, ids = made(name), tiny_tokens(1, 500)[0]
    vectors = key_basis(model, tiny_tokens(2, 300, seed=1), 13).bfloat16().float()
    dense = in_transformers(model, DynamicCache(config=model.config), ids)
    want = in_transformers(model, projected(model, vectors), ids)
    got = NativeSession(Decoder(model), PackedCache(4, keys=vectors)).logits(ids)
    assert error(got[:128], dense[:128]) < 3e-2
    assert error(want[128:], dense[128:]) > 0.1
    assert error(got[128:], want[128:]) < 5e-2


def test_as_many_vectors_as_numbers_lose_no_more_than_rounding() -> None:
    model, ids = made(initializer_range=0.1), tiny_tokens(1, 400)[0]
    dense = in_transformers(model, DynamicCache(config=model.config), ids)
    lost = {}
    for rank in (10, 30, 40):
        vectors = key_basis(model, tiny_tokens(1, 300), rank)
        lost[rank] = error(NativeSession(Decoder(model), PackedCache(4, keys=vectors)).logits(ids), dense)
    coded = error(NativeSession(Decoder(model), PackedCache(4)).logits(ids), dense)
    assert lost[40] < coded < lost[10]  # values are coded alike, keys only there
    assert lost[40] < lost[30] < lost[10]


def test_vectors_are_orthonormal_and_the_best_ones() -> None:
    model, windows = made("with a scale"), tiny_tokens(2, 200)
    vectors = key_basis(model, windows, 9)
    assert vectors.shape == (3, 9, 2, 16)
    keys: list[Tensor] = []
    hook = model.model.layers[1].self_attn.k_proj.register_forward_hook(lambda m, i, out: keys.append(out))
    model(windows)
    hook.remove()
    rows = keys[0].flatten(0, 1)
    best = torch.linalg.svd(rows, full_matrices=False).Vh[:9]
    found = vectors[1].flatten(1)
    assert torch.allclose(found @ found.mT, torch.eye(9), atol=1e-5)
    assert torch.allclose(found.mT @ found, best.mT @ best, atol=1e-3)
    assert torch.allclose((found * best).sum(1).abs(), torch.ones(9), atol=1e-2)  # in this order


def test_a_token_has_the_same_bits_however_it_comes() -> None:
    decoder, ids = Decoder(model := made()), tiny_tokens(1, 600)[0]
    cache = PackedCache(4, rank=1, keys=key_basis(model, tiny_tokens(1, 100), 20))
    want = NativeSession(decoder, cache).logits(ids)
    session = NativeSession(decoder, cache)
    got = torch.cat([session.logits(some) for some in ids.split([17, 45, 300, 101, 66, 30, 41])])
    assert torch.equal(got, want)
    session.truncate(570)
    assert torch.equal(session.logits(ids[570:]), want[570:])
    session = NativeSession(decoder, cache)
    session.prompt(ids[:100])
    for at in range(100, 300):
        assert error(session.step(int(ids[at])), want[at]) < 2e-2
    assert error(session.logits(ids[300:]), want[300:]) < 2e-2  # a tail that was written token by token


def test_from_further_back_it_goes_on_with_what_was_left() -> None:
    model, ids = made(initializer_range=0.1), tiny_tokens(1, 600)[0]
    session = NativeSession(Decoder(model), PackedCache(4, keys=key_basis(model, tiny_tokens(1, 200), 20)))
    want = session.logits(ids)
    for length in (390, 200, 70):
        session.truncate(length)
        assert error(session.logits(ids[length:]), want[length:]) < 0.1
    session.truncate(0)
    assert torch.equal(session.logits(ids), want)


def test_bytes_are_those_of_the_factors() -> None:
    model = made(head_dim=24)  # 24 lies in 32
    session = NativeSession(Decoder(model), PackedCache(4, keys=key_basis(model, tiny_tokens(1, 200), 20)))
    session.prompt(tiny_tokens(1, 1000)[0])
    factors, values, tail = 2 * 64 * 32, 1024 + 4 * 64, 2 * 3 * 64 * 32 * 2  # a rank of 20 lies in 32
    assert session.nbytes == 3 * (4 * 4 * (factors + 2 * values) + 2 * tail)


def test_policies_choose_among_keys_as_they_are_kept() -> None:
    model, ids = made(initializer_range=0.1), tiny_tokens(1, 700)[0]
    vectors = key_basis(model, tiny_tokens(1, 300), 40)
    labels = LabelBlocks(label_channels(model, tiny_tokens(1, 300), 6).tolist(), count=3)
    looks = labels.native(3, 4)

    def steps(cache: Any) -> Tensor:
        session = NativeSession(Decoder(model), cache, looks)
        session.prompt(ids[:690])
        found = torch.stack([session.step(int(token)).clone() for token in ids[690:]])
        assert session.looked < 1
        return found

    want = steps(torch.bfloat16)
    lost = [error(steps(PackedCache(4, keys=vectors[:, :rank])), want) for rank in (40, 4)]
    assert lost[0] < error(steps("kivi4"), want)  # whose values are kept alike
    assert lost[1] > 1.5 * lost[0]


def test_a_cache_comes_back_from_its_file(tmp_path: Path) -> None:
    model, ids = made(), tiny_tokens(1, 300)[0]
    cache = PackedCache(2, 1, 0.03, key_basis(model, tiny_tokens(1, 100), 12))
    cache.save(tmp_path / "keys.safetensors")
    found = PackedCache.load(tmp_path / "keys.safetensors")
    assert (found.bits, found.rank, found.outliers) == (2, 1, 0.03)
    decoder = Decoder(model)
    got = NativeSession(decoder, str(tmp_path / "keys.safetensors")).logits(ids)
    assert torch.equal(got, NativeSession(decoder, cache).logits(ids))
    PackedCache(4).save(tmp_path / "coded")
    assert PackedCache.load(tmp_path / "coded").keys is None


def test_a_damaged_file_says_so(tmp_path: Path) -> None:
    file, decoder = tmp_path / "keys", Decoder(made())
    PackedCache(4, keys=torch.ones(3, 2, 2, 20)).save(file)
    content = file.read_bytes()
    for damaged in (
        b"",
        content[: len(content) // 2],
        b"{}",
        content.replace(b"gossamer.cache", b"gossamer.catch"),
    ):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="keys"):
            NativeSession(decoder, str(file))
    with pytest.raises(CheckpointError, match="cannot read"):
        PackedCache.load(tmp_path / "nowhere")


def test_what_does_not_suit_is_refused() -> None:
    model, decoder, ids = made(), Decoder(made()), tiny_tokens(1, 100)
    vectors = key_basis(model, ids, 8)
    for keys, said in (
        (vectors[:2], "another model"),
        (vectors[:, :0], "no rank of 0"),
        (vectors[..., :10], "another model"),
        (vectors[0], "another model"),
        (vectors.repeat(1, 6, 1, 1), "no rank of 48"),
        (vectors * torch.nan, "not finite"),
    ):
        with pytest.raises(ModelError, match=said):
            NativeSession(decoder, replace(PackedCache(4), keys=keys))
    for rank in (0, 41):
        with pytest.raises(MethodError, match=f"no rank of {rank}"):
            key_basis(model, ids, rank)
    with pytest.raises(MethodError, match="are known for"):
        key_basis(tiny_model("gpt2"), ids, 4)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = torch.nan
    with pytest.raises(MethodError, match="layer 1 are not finite"):
        key_basis(model, ids, 8)
