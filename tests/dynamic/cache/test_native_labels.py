"""Double Sparsity in the native decoder: the blocks that labels rate highest, as PyTorch chooses them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gossamer import kernels
from gossamer.dynamic.attention import attention, load_policy, save_policy
from gossamer.dynamic.attention.label_blocks import LabelBlocks
from gossamer.dynamic.cache.double_sparsity import DoubleSparsity, label_channels
from gossamer.engine import Decoder, Look, NativeSession
from gossamer.engine.caches import CACHES, CacheKind
from gossamer.errors import MethodError, ModelError
from gossamer.kernels import BLOCK
from gossamer.kernels.native import native
from tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

IDS = tiny_tokens(1, 1110)[0]
STEPS = 10


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


def made(**changes: Any) -> Any:
    """Attention that differs from token to token: weights are larger than in other tests."""
    changes = {"max_position_embeddings": 2048, "initializer_range": 0.3, **changes}
    return tiny_model("llama", **changes).requires_grad_(False)


def session_of(model: Any, method: DoubleSparsity | None, cache: CacheKind = torch.float32) -> NativeSession:
    config = model.config
    looks = method and method.policy(model).native(config.num_hidden_layers, config.num_attention_heads)
    return NativeSession(Decoder(model), cache, looks)


def run(session: NativeSession, ids: Tensor, steps: int = STEPS) -> Tensor:
    prompt, later = ids[: len(ids) - steps], ids[len(ids) - steps :]
    return torch.stack([session.prompt(prompt).clone(), *(session.step(int(t)).clone() for t in later)])


@pytest.mark.parametrize("group", [1, 2, 4])
def test_steps_look_at_what_labels_rate_highest(group: int) -> None:
    model = made(num_key_value_heads=4 // group)
    labels = label_channels(model, tiny_tokens(1, 200), 6)
    method = DoubleSparsity(labels, tokens=5 * BLOCK, recent=BLOCK)
    cache, policy = DynamicCache(config=model.config), method.policy(model)
    assert (policy.count, policy.window) == (3, 1)
    with attention(model, policy) as attend:
        want = [model(IDS[None, :-STEPS], past_key_values=cache).logits[0, -1]]
        want += [model(token[None, None], past_key_values=cache).logits[0, -1] for token in IDS[-STEPS:]]
    session = session_of(model, method)
    got, size = run(session, IDS), float(want[0].abs().max())
    assert float((got - torch.stack(want)).abs().max()) <= 1e-4 * size
    assert float((got - run(session_of(model, None), IDS)).abs().max()) > 0.1 * size
    assert session.looked == 5 / 18
    assert attend.looked == session.looked
    dense = session_of(model, None)
    run(dense, IDS)
    assert session.nbytes - dense.nbytes >= 3 * 4 // group * 17 * BLOCK * 6 * 2


@pytest.mark.parametrize("dtype", [*CACHES, "gear4"])
def test_a_full_budget_is_dense_bit_for_bit(model: Any, dtype: CacheKind) -> None:
    labels = label_channels(model, tiny_tokens(1, 100), 4)
    method = DoubleSparsity(labels, tokens=2048)
    assert torch.equal(run(session_of(model, method, dtype), IDS), run(session_of(model, None, dtype), IDS))


@pytest.mark.usefixtures("without_tiles")
@pytest.mark.parametrize("dtype", [*CACHES, "gear4"])
def test_threads_cuts_and_rollbacks_change_no_bit(model: Any, dtype: CacheKind) -> None:
    labels = label_channels(model, tiny_tokens(1, 100), 4)
    method = DoubleSparsity(labels, tokens=4 * BLOCK)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(run(session_of(model, method, dtype), IDS))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    if dtype not in CACHES:  # so far back a packed cache does not go
        return
    session = session_of(model, method, dtype)
    run(session, torch.cat([IDS[:500], tiny_tokens(1, 300, seed=3)[0]]), 200)
    session.truncate(500)
    session.prompt(IDS[500:1024])
    assert torch.equal(run(session, IDS[1024:]), found[0])


@pytest.mark.parametrize("isa", ["portable", "avx2", "avxvnni", "avx512vnni", "avx512", "amx"])
def test_every_instruction_set_chooses_alike(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = native().tier(isa)
    if index < 0:
        pytest.skip(f"this machine does not run {isa}")
    model = made(hidden_size=112, num_attention_heads=14, num_key_value_heads=1, head_dim=24)
    labels = label_channels(model, tiny_tokens(1, 100), 10)
    method = DoubleSparsity(labels, tokens=3 * BLOCK)
    want = run(session_of(model, method), IDS[:700])
    monkeypatch.setattr(kernels.native, "tier", lambda name: index)
    got = run(session_of(model, method), IDS[:700])
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


def test_what_does_not_fit_is_refused(model: Any) -> None:
    def heads(*labels: tuple[int, ...]) -> list[list[Look]]:
        return [[Look("labels", count=2, labels=some) for some in labels]] * 3

    one, other = (0, 1), (0, 2)
    for looks, fault in (
        (heads(one, one, (0, 1, 2, 3), (0, 1, 2, 3)), "different numbers"),
        (heads(one, other, one, one), "share keys"),
        (heads(*[(0, 16)] * 4), "16 channels"),
        (heads(*[(0, -1)] * 4), "no channel"),
        (heads(*[(0, 1, 2)] * 4), "even number"),
        (heads(*[()] * 4), "no labels"),
    ):
        with pytest.raises(ModelError, match=fault):
            NativeSession(Decoder(model), looks=looks)
    with pytest.raises(MethodError, match="label channels"):
        DoubleSparsity().policy(model)
    for labels in ((), ((), ()), [[[0, 1]], []]):
        with pytest.raises(MethodError, match="takes labels"):
            LabelBlocks(labels)
    for labels in ([[[], []]], [[[0, 1], [0]]]):
        with pytest.raises(MethodError, match="as many labels"):
            LabelBlocks(labels)
    with pytest.raises(MethodError, match="another model"):
        LabelBlocks([[[0, 1]]]).native(3, 4)
    other = LabelBlocks([[[0, 1]]] * 3)
    with attention(model, other), pytest.raises(MethodError, match="another model"):
        model(IDS[None, :1])
    wide = LabelBlocks([[[0, 16]] * model.config.num_key_value_heads] * 3)
    with torch.no_grad(), attention(model, wide), pytest.raises(MethodError, match="16 channels"):
        model(IDS[None, :1])


def test_a_block_with_the_best_token_is_found() -> None:
    generator = torch.Generator().manual_seed(6)
    keys = 0.1 * torch.randn(2, 700, 16, generator=generator)
    keys[0, 130, 3], keys[1, 400, 5] = 9, -9
    policy = LabelBlocks([[[3, 4], [4, 5]]], count=1, window=0)
    queries = torch.ones(4, 1, 16)
    queries[2:, 0, 5] = -1
    chosen = policy.blocks(queries, keys, scaling=0.25, layer=0)
    assert chosen is not None
    assert [head.nonzero()[:, 1].tolist() for head in chosen] == [[2, 10]] * 2 + [[6, 10]] * 2
    assert policy.blocks(queries.expand(-1, 2, -1), keys, scaling=0.25, layer=0) is None
    first = policy.blocks(queries, keys[:, :5], scaling=0.25, layer=0)
    assert first is not None
    assert bool(first.all())


def test_labels_are_a_file_like_other_policies(model: Any, tmp_path: Any) -> None:
    policy = DoubleSparsity(label_channels(model, tiny_tokens(1, 50), 4), tokens=512).policy(model)
    assert load_policy(save_policy(policy, tmp_path / "labels.json")) == policy
