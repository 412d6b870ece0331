"""How products are timed: which copies are walked, and in which order; never how long anything took."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gossamer import kernels
from gossamer.bench import timing
from gossamer.bench.memory import Memory
from gossamer.bench.timing import (
    TORCH,
    Times,
    activations,
    call_seconds,
    past_cache,
    read_share,
    seconds_in_turn,
    time_forms,
)
from gossamer.matrices import Packed, Sparse

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")


@pytest.fixture
def forms(monkeypatch: pytest.MonkeyPatch) -> list[Packed]:
    monkeypatch.setattr(timing, "SECONDS", 0.0)  # the least number of rounds
    weight = torch.randn(48, 128, generator=torch.Generator().manual_seed(0))
    packed = Packed.pack(Sparse.fit(weight, pattern="32:64"), "int4")
    return [packed, packed.repack("dense")]


def test_every_form_is_timed_beside_torch(forms: list[Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "cache_size", lambda: 10_000)
    found = time_forms(forms, rows=20, copies=7)
    assert [times.form for times in found] == ["32:64", "dense", TORCH]
    assert [times.nbytes for times in found] == [forms[0].nbytes, forms[1].nbytes, 48 * 128 * 2]
    # 7 copies of 2,496 bytes are not past 40,000 bytes, 7 of 3,264 neither; 4 of 12,288 are
    assert [times.walked // times.nbytes for times in found] == [7, 7, 4]
    assert all(times.decode_seconds > 0 and times.prompt_seconds > 0 for times in found)
    assert past_cache(10_000) == 5


def test_zeros_are_those_asked_for_and_columns_read_less() -> None:
    x = activations(3, 10_000, 0.7)
    assert (x.shape, x.dtype) == ((3, 10_000), torch.bfloat16)
    assert all(0.68 < float((row == 0).double().mean()) < 0.72 for row in x)
    assert (activations(3, 10_000, 0.0) != 0).all()
    dense = Packed.pack(torch.randn(128, 256, generator=torch.Generator().manual_seed(0)), "int4")
    columns = dense.repack("columns")
    row = torch.zeros(256)
    row[::4] = 1
    assert read_share(dense, row) == 1
    assert read_share(columns, row) == pytest.approx((1 / 4 * 4 + 1 / 4) / 4.25)  # bits: values and scales
    row[1::2] = 1  # three of four: past the gate
    assert read_share(columns, row) == 1
    times = time_forms([dense, columns], 0, 1, zeros=0.75)
    assert [one.read for one in times] == pytest.approx([1, (1 + 1 / 4) / 4.25, 1], rel=0.2)


def test_prompts_of_one_row_and_none_need_no_timing_of_their_own(forms: list[Packed]) -> None:
    (one, _, _) = time_forms(forms, rows=1, copies=1)
    assert one.prompt_seconds == one.decode_seconds
    assert {times.prompt_seconds for times in time_forms(forms, rows=0, copies=1)} == {0.0}


def test_copies_leave_room_in_memory(forms: list[Packed], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "usable_memory", lambda: Memory(0, available=4 * 3 * 10_000))
    walked = [times.walked // times.nbytes for times in time_forms(forms, rows=0, copies=1000)]
    assert walked == [10_000 // forms[0].nbytes, 10_000 // forms[1].nbytes, 1]


def test_copies_multiply_as_their_original(forms: list[Packed]) -> None:
    x = torch.randn(3, 128)
    for form in forms:
        products = timing._packed_copies(form, 3)
        assert len(products) == 3
        assert all(torch.equal(product(x), form.matmul(x)) for product in products)
    weight = torch.randn(48, 128)
    for product in timing._plain_copies(weight, 2):
        assert torch.equal(product(x), torch.nn.functional.linear(x, weight))


def recorded(names: list[str], log: list[str]) -> list[Callable[[Tensor], Tensor]]:
    def product(name: str) -> Callable[[Tensor], Tensor]:
        return lambda x: log.append(name) or x  # type: ignore[func-returns-value]

    return [product(name) for name in names]


@pytest.mark.parametrize(
    ("walk", "rounds"),
    [
        # each turn: a pass to warm up, a pass that is timed; the order of rivals shifts
        (True, ["a0a1a0a1 b0b0", "b0b0 a0a1a0a1", "a0a1a0a1 b0b0"]),
        # each turn: the copy before, then the next
        (False, ["a0a1 b0b0", "b0b0 a1a0", "a0a1 b0b0"]),
    ],
)
def test_rivals_take_turns(walk: bool, rounds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    log: list[str] = []
    rivals = [recorded(["a0", "a1"], log), recorded(["b0"], log)]
    found = seconds_in_turn(rivals, torch.ones(1), walk=walk)
    assert "".join(log) == "".join(rounds).replace(" ", "")
    assert len(found) == 2


def test_a_time_is_the_median_of_the_timed_passes_for_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    costs = {"a": iter([100.0, 100, 2, 2, 100, 100, 8, 8, 100, 100, 4, 4])}

    def product(x: Tensor) -> Tensor:
        clock[0] += next(costs["a"])
        return x

    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert seconds_in_turn([[product, product]], torch.ones(1), walk=True) == [4.0]


def test_cost_and_rate() -> None:
    times = Times("dense", 3000, 9000, 2e-6, 1e-3)
    assert times.cost(100) == pytest.approx(1.2e-3)
    assert times.gb_per_second == pytest.approx(1.5)
    assert replace(times, read=0.5).gb_per_second == pytest.approx(0.75)
    assert call_seconds() > 0
