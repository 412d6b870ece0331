"""Caches of few bits in the native decoder: what the transformers caches keep, whatever way tokens come."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gossamer import kernels
from gossamer.dynamic.cache.gear import Gear, GearLayer
from gossamer.engine import Decoder, NativeSession, PackedCache
from gossamer.engine.caches import PACKED
from gossamer.errors import ModelError
from gossamer.evaluate.likelihood import LikelihoodReader
from gossamer.kernels.native import native
from tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

TIERS = native().available() if kernels.native_available() else []
KINDS = {
    **PACKED,
    "all ranks": PackedCache(4, rank=4, outliers=0.1),
    "outliers": PackedCache(2, outliers=0.05),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=TIERS)
def tier(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    index = native().tier(request.param)
    monkeypatch.setattr(kernels.native, "tier", lambda name: index)
    return str(request.param)


def made(**changes: Any) -> Any:
    """Attention that differs from token to token: weights are larger than in other tests."""
    changes = {"max_position_embeddings": 2048, "initializer_range": 0.3, **changes}
    return tiny_model("llama", **changes).requires_grad_(False)


def in_transformers(model: Any, cache: Any, ids: Tensor) -> Tensor:
    """Logits of all positions, a block at a time: a row then finds the cache as it would alone."""
    parts = [model(some, past_key_values=cache, use_cache=True).logits[0] for some in ids[None].split(64, 1)]
    return torch.cat(parts)


def error(got: Tensor, want: Tensor) -> float:
    """Root mean square, in those of ``want``."""
    return float((got - want).norm() / want.norm())


def alike(got: Tensor, want: Tensor, tier: str) -> None:
    assert got.isfinite().all()
    assert torch.equal(got, want) if tier != "amx" else error(got, want) < 2e-2


class RoundedLayer(GearLayer):
    """GEAR's, of numbers that were bfloat16."""

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return super().append(keys.bfloat16().float(), values.bfloat16().float())


@dataclass(frozen=True)
class Rounded(Gear):
    def layer(self, model: Any, number: int) -> GearLayer:
        return RoundedLayer(self)


def gear_of(how: PackedCache) -> Gear:
    return Rounded(how.bits, how.rank, how.outliers, recent=64, later_rank=how.rank)


@pytest.mark.parametrize(("kind", "head_dim"), [(kind, 20) for kind in KINDS] + [("all ranks", 16)])
def test_it_keeps_what_gear_keeps(tier: str, kind: str, head_dim: int) -> None:
    how, ids = KINDS[kind], tiny_tokens(1, 500)[0]
    # one head, whose outliers of values are those of all; one layer, as deeper ones make rounding codes
    model = made(num_key_value_heads=1, head_dim=head_dim, num_hidden_layers=1)
    dense = in_transformers(model, DynamicCache(config=model.config), ids)
    want = in_transformers(model, gear_of(how).new(model), ids)
    got = NativeSession(Decoder(model), how).logits(ids)
    assert error(got[:128], dense[:128]) < 2e-2
    assert error(want[128:], dense[128:]) > 0.1
    assert error(got[128:], want[128:]) < 3e-2


@pytest.mark.parametrize("kind", ["kivi4", "gear2"])
def test_outliers_of_each_head_do_as_well_as_those_of_all(kind: str) -> None:
    how, ids, model = PACKED[kind], tiny_tokens(1, 500)[0], made()
    dense = in_transformers(model, DynamicCache(config=model.config), ids)
    lost = error(in_transformers(model, gear_of(how).new(model), ids), dense)
    assert error(NativeSession(Decoder(model), kind).logits(ids), dense) < 1.1 * lost


@pytest.mark.parametrize("kind", ["kivi2", "gear4", "all ranks"])
def test_a_token_has_the_same_bits_however_it_comes(tier: str, kind: str) -> None:
    decoder, ids = Decoder(made(head_dim=20)), tiny_tokens(1, 600)[0]
    want = NativeSession(decoder, KINDS[kind]).logits(ids)
    for threads, pieces in ((2, [17, 45, 300, 101, 66, 30, 41]), (3, [64] * 9 + [24])):
        torch.set_num_threads(threads)
        session = NativeSession(decoder, KINDS[kind])
        got = torch.cat([session.logits(some) for some in ids.split(pieces)])
        assert torch.equal(got, want)
    session = NativeSession(decoder, KINDS[kind])
    session.prompt(ids[:100])
    steps = torch.stack([session.step(int(token)).clone() for token in ids[100:300]])
    alike(steps, want[100:300], tier)
    alike(session.logits(ids[300:]), want[300:], tier)  # a tail that was written token by token


@pytest.mark.parametrize("length", [1, 63, 64, 65, 127, 128, 129, 192, 193, 256, 257])
def test_ragged_lengths(length: int) -> None:
    decoder, ids = Decoder(made()), tiny_tokens(1, 300)[0]
    want = NativeSession(decoder, "gear4").logits(ids)
    session = NativeSession(decoder, "gear4")
    rows = [session.prompt(ids[:length]), session.step(int(ids[length])), session.step(int(ids[length + 1]))]
    for row, place in zip(rows, range(length - 1, length + 2), strict=True):
        assert error(row, want[place]) < 2e-2


@pytest.mark.parametrize(("length", "back"), [(65, 64), (130, 1), (200, 63), (256, 10), (256, 64), (330, 20)])
def test_a_block_is_forgotten_without_a_trace(tier: str, length: int, back: int) -> None:
    decoder, ids = Decoder(made()), tiny_tokens(1, 400)[0]
    session, fresh = NativeSession(decoder, "gear4"), NativeSession(decoder, "gear4")
    session.prompt(ids[:length])
    for token in range(5):
        session.step(token)
    session.truncate(length - back + 5)
    session.truncate(length - back)
    session.prompt(torch.arange(20))
    session.truncate(length - back)
    fresh.prompt(ids[: length - back])
    assert torch.equal(session.step(7), fresh.step(7))
    assert torch.equal(session.logits(ids[length:]), fresh.logits(ids[length:]))


def test_from_further_back_it_goes_on_with_what_was_left() -> None:
    decoder, ids = Decoder(made(initializer_range=0.1)), tiny_tokens(1, 600)[0]
    session = NativeSession(decoder, "gear4")
    want = session.logits(ids)
    size = session.nbytes
    for length in (390, 200, 70, 31):
        session.truncate(length)
        assert session.length == length
        got = session.logits(ids[length:])
        assert error(got, want[length:]) < 0.1
        assert session.nbytes == size
    session.truncate(100)
    assert session.nbytes < size
    session.truncate(0)
    assert torch.equal(session.logits(ids), want)


def test_bytes_are_those_of_the_format() -> None:
    decoder, ids = Decoder(made(head_dim=24)), tiny_tokens(1, 1000)[0]  # 24 lies in 32
    heads, tail = 3 * 2, 2 * 3 * 64 * 32 * 2
    for kind, keys, values in (
        ("kivi4", 1024 + 4 * 32, 1024 + 4 * 64),
        ("kivi2", 512 + 4 * 32, 512 + 4 * 64),
        # rank 2; a largest and a least number of a channel, one of 24 values
        ("gear4", 1024 + 4 * 32 + 4 * 96 + 6 * 32, 1024 + 4 * 64 + 4 * 96 + 3 * 64),
    ):
        session = NativeSession(decoder, kind)
        session.prompt(ids)
        assert session.nbytes == heads * (4 * 4 * (keys + values) + tail)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("gear3", "unknown cache 'gear3'; there are: float32, bfloat16, int8, kivi4"),
        (torch.float16, "unknown cache 'float16'"),
        ("nn", "unknown cache"),
        (PackedCache(3), "2 or 4 bits, not 3"),
        (PackedCache(4, rank=5), "a rank of 0 to 4, not 5"),
        (PackedCache(4, rank=-1), "a rank of 0 to 4"),
        (PackedCache(4, rank=1.0), "a rank of 0 to 4"),  # type: ignore[arg-type]
        (PackedCache(4.0), "2 or 4 bits"),  # type: ignore[arg-type]
        (PackedCache(4, outliers=0.5), "at most 16 outliers of 64 numbers"),
        (PackedCache(4, outliers=float("nan")), "outliers"),
    ],
)
def test_what_cannot_be_kept_is_refused(kind: Any, said: str) -> None:
    with pytest.raises(ModelError, match=said):
        NativeSession(Decoder(tiny_model("llama")), kind)


@pytest.mark.parametrize("cache", ["bfloat16", "gear4"])
def test_likelihoods_do_not_depend_on_what_was_asked_before(cache: str) -> None:
    decoder = Decoder(made())
    ids = tiny_tokens(1, 300)[0].tolist()
    context, other = ids[:200], [*ids[:40], *ids[60:290]]
    alone = LikelihoodReader(lambda: NativeSession(decoder, cache))(context, ids[200:210])
    read = LikelihoodReader(lambda: NativeSession(decoder, cache))
    read(other, ids[290:])
    assert read(context, ids[200:210]) == alone
    assert read.reused == (40 if cache == "bfloat16" else 0)
