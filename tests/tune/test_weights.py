"""Weights under tuning: masks are exact, and what is tuned is what is stored."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.matrices import Packed
from gossamer.matrices.values import quantize, value_type
from gossamer.tune import TunedWeight


def drawn(out: int, width: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    return torch.randn(out, width), torch.rand(out, width) < 0.6


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 150), st.sampled_from(["int3", "int4", "int8", "nl3", "nl4"]),
    st.sampled_from([32, 64]),
    st.integers(0, 1000),
)  # fmt: skip
def test_any_steps_leave_what_was_pruned_at_zero_and_the_rest_on_the_grid(
    out: int, width: int, values: str, group: int, seed: int
) -> None:
    dense, mask = drawn(out, width, seed)
    start = quantize(dense * mask, value_type(values), group, mask)
    weight = TunedWeight(start.to_dense(), mask, start)
    assert torch.equal(weight(), start.to_dense())  # nothing has moved yet
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        (weight() - torch.randn(out, width)).square().sum().backward()
        optimizer.step()
        assert not weight()[~mask].any()
    tuned, codes = weight.finished()
    assert codes is not None
    assert torch.equal(tuned, codes.to_dense())
    assert not codes.q[~mask].any()
    packed = Packed.pack(codes, mask=mask)
    assert torch.equal(packed.to_dense(), tuned)


def test_float_weights_move_only_where_they_were_kept() -> None:
    dense, mask = drawn(8, 12, 0)
    weight = TunedWeight(dense * mask, mask)
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.1)
    (weight() - 1).square().sum().backward()
    optimizer.step()
    tuned, codes = weight.finished()
    assert codes is None
    assert (tuned != dense)[mask].all()
    assert not tuned[~mask].any()


@pytest.mark.parametrize("values", ["int4", "nl4"])
def test_rounding_passes_gradients_straight_through_inside_the_range_and_none_outside(values: str) -> None:
    start = quantize(torch.tensor([[1.0, -1.0, 0.5, 0.25] * 16]), value_type(values))
    weight = TunedWeight(start.to_dense(), None, start)
    with torch.no_grad():
        weight.latent[0, 0] = 100.0  # far outside what eight codes reach
    weight().sum().backward()
    gradient = weight.latent.grad
    assert gradient is not None
    assert gradient[0, 0] == 0
    assert gradient[0, 1:].numpy() == pytest.approx(1.0, rel=1e-6)


def test_a_scale_that_left_float16_is_brought_back() -> None:
    start = quantize(torch.ones(2, 64), value_type("int4"))
    weight = TunedWeight(start.to_dense(), None, start)
    assert weight.scales is not None
    with torch.no_grad():
        weight.scales.copy_(torch.tensor([[0.0], [-1e9]]))
    tuned, codes = weight.finished()
    assert codes is not None
    assert codes.scales.isfinite().all()
    assert (codes.scales != 0).all()
    assert torch.equal(tuned, codes.to_dense())
