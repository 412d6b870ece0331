"""Learned gates: what their target is, that they learn it, and that they run in both engines."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer import kernels
from gossamer.dynamic.attention import attention, load_policy, save_policy
from gossamer.dynamic.attention.block_topk import BlockTopK
from gossamer.dynamic.attention.seer import Sample, Seer, fit, learned, loss, sample
from gossamer.engine import Decoder, Look, NativeSession
from gossamer.errors import CheckpointError, MethodError, ModelError
from tiny import tiny_model, tiny_tokens


def test_the_target_is_the_largest_weight_of_each_block() -> None:
    queries, keys = torch.randn(4, 150, 16), torch.randn(2, 150, 16)
    found = sample(queries, keys, 0.25)
    scores = queries[3] @ keys[1].T * 0.25
    weights = scores.masked_fill(torch.ones(150, 150).triu(1).bool(), -torch.inf).softmax(-1)
    largest = torch.stack([weights[128:, begin : begin + 64].max() for begin in (0, 64, 128)])
    torch.testing.assert_close(found.target[3, 2], largest / largest.sum())
    assert found.target.shape == (4, 3, 3)
    assert float(found.target.triu(1).abs().max()) == 0
    torch.testing.assert_close(found.keys[2, 1], keys[1, 64:128].mean(0))


def test_the_target_knows_what_a_window_hides() -> None:
    queries, keys = torch.randn(4, 300, 16), torch.randn(2, 300, 16)
    target = sample(queries, keys, 0.25, window=65).target
    assert float(target.triu(-1).sum()) == pytest.approx(4 * 5)
    assert float(target.tril(-2).max()) == 0
    assert float(sample(queries, keys, 0.25).target.tril(-2).min(0).values[2:, 0].min()) > 0


def hidden(windows: int, seed: int) -> list[Sample]:
    """Blocks that are looked at for a reason that means alone do not show: queries ask in turned space."""
    turned = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)))[0]
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(windows):
        keys = torch.randn(2, 12, 8, generator=generator)
        queries = torch.randn(2, 12, 8, generator=generator)
        scores = 3 * queries @ turned @ keys.mT
        later = torch.ones(12, 12, dtype=torch.bool).triu(1)
        found.append(Sample(queries, keys, scores.masked_fill(later, -torch.inf).softmax(-1)))
    return found


def test_gates_learn_what_they_are_shown_and_it_holds_elsewhere() -> None:
    gates, other = fit(hidden(8, 1), 1.0, steps=300, rate=3e-2, pull=0), hidden(4, 2)
    plain = torch.eye(8).expand(2, -1, -1)
    before, after = (sum(float(loss(one, some, 1.0)) for some in other) for one in (plain, gates))
    assert after < 0.1 * before
    nothing = Sample(*(torch.randn(2, 2, 8) for _ in range(2)), torch.ones(2, 2, 2) / 2)
    assert torch.equal(fit([nothing], 1.0, steps=2), plain)  # two blocks leave no choice


def test_the_identity_is_block_top_k() -> None:
    queries, keys = torch.randn(4, 400, 16), torch.randn(2, 400, 16)
    seer = Seer(torch.eye(16).expand(1, 4, -1, -1), 3)
    want = BlockTopK(3).blocks(queries, keys, scaling=1.0, layer=0)
    assert torch.equal(seer.blocks(queries, keys, scaling=1.0, layer=0), want)


def test_gates_of_a_model_are_learned_beside_it() -> None:
    model, ids = tiny_model("llama", initializer_range=0.3).eval(), tiny_tokens(2, 320)
    before = [parameter.clone() for parameter in model.parameters()]
    policy = learned(model, ids, count=2, steps=30)
    assert policy.gates.shape == (3, 4, 16, 16)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert not policy.gates.requires_grad
    with torch.no_grad(), attention(model, policy) as attend:
        assert model(ids).logits.isfinite().all()
    assert attend.looked < 0.8


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
def test_the_native_decoder_chooses_as_transformers_does(tmp_path: Path) -> None:
    model, ids = tiny_model("llama", initializer_range=0.3).eval(), tiny_tokens(1, 500)[0]
    gates = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    save_policy(Seer(gates, 4), tmp_path)
    policy = load_policy(tmp_path)
    assert isinstance(policy, Seer)
    assert torch.equal(policy.gates, gates)
    with torch.no_grad(), attention(model, policy):
        want = model(ids[None]).logits[0]
    decoder = Decoder(model)
    got = NativeSession(decoder, torch.float32, policy.native(3, 4)).logits(ids)
    plain = NativeSession(decoder, torch.float32, BlockTopK(4).native(3, 4)).logits(ids)
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())
    assert float((plain - want).abs().max()) > 1e-2 * float(want.abs().max())
    full, dense = (NativeSession(decoder, looks=looks) for looks in (Seer(gates, 99).native(3, 4), None))
    assert torch.equal(full.logits(ids), dense.logits(ids))
    with pytest.raises(ModelError, match="not 16 x 16"):
        NativeSession(decoder, looks=[[Look("pooled", count=1, gate=torch.eye(8))] * 4] * 3)


def test_what_is_wrong_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="seer takes"):
        Seer(torch.eye(4), 2)
    policy = Seer(torch.eye(4).expand(2, 3, -1, -1), 2)
    with pytest.raises(MethodError, match="not of more"):
        policy.look(2, 0)
    with pytest.raises(MethodError, match="not of more"):
        policy.look(0, 3)
    for heads, dim in ((2, 4), (4, 4), (3, 8)):
        with pytest.raises(MethodError, match=r"gates of 3 heads of 4 numbers|not of more"):
            policy.blocks(torch.zeros(heads, 70, dim), torch.zeros(1, 70, dim), scaling=1.0, layer=0)
    file = save_policy(policy, tmp_path / "gates.json")
    file.with_suffix(".safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match="no attention policy"):
        load_policy(file)
    file.with_suffix(".safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"gates\.safetensors"):
        load_policy(file)
