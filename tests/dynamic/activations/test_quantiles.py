"""Quantiles of a stream, against torch's own on all of it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.dynamic.activations import Quantiles
from gossamer.errors import CalibrationError, SparsityError

NUMBERS = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 2.0**100, width=32), st.floats(0, 4, width=32), st.just(0.5)),
    min_size=1,
    max_size=200,
)


@settings(max_examples=300, deadline=None)
@given(NUMBERS, st.floats(0, 1, exclude_max=True), st.integers(1, 7))
def test_within_the_bound_of_the_exact_quantile(numbers: list[float], share: float, pieces: int) -> None:
    values = torch.tensor(numbers)
    sketch = Quantiles()
    for part in values.chunk(pieces):
        sketch.update(part)
    assert sketch.total == len(values)
    rank = int(share * len(values) + 0.5)
    found = sketch.below(share)
    if rank == 0:
        assert found == 0.0
        return
    position = (rank - 1) / max(1, len(values) - 1)
    exact = torch.quantile(values.double(), position, interpolation="nearest").item()
    assert abs(found - exact) <= max(Quantiles.RELATIVE_ERROR * exact, 2.0**-134)


def test_interpolates_within_a_bin() -> None:
    sketch = Quantiles()
    sketch.update(torch.linspace(1.0, 1.0 + 2**-8, 1001)[:-1])  # one bin, evenly filled
    assert sketch.below(0.25) == pytest.approx(1 + 0.25 * 2**-8, abs=2**-16)
    assert sketch.below(0.75) == pytest.approx(1 + 0.75 * 2**-8, abs=2**-16)


def test_the_share_below_a_quantile_of_many_numbers() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0)).abs()
    sketch = Quantiles()
    sketch.update(values)
    for share in (0.01, 0.25, 0.5, 0.9, 0.999):
        assert (values <= sketch.below(share)).float().mean().item() == pytest.approx(share, abs=2e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_refuses_what_has_no_place(bad: float) -> None:
    sketch = Quantiles()
    with pytest.raises(CalibrationError, match="NaN or infinite"):
        sketch.update(torch.tensor([1.0, bad]))
    assert sketch.total == 0


def test_refuses_shares_and_emptiness() -> None:
    sketch = Quantiles()
    with pytest.raises(CalibrationError, match="no calibration input"):
        sketch.below(0.5)
    sketch.update(torch.ones(3))
    for share in (1.0, -0.1, float("nan")):
        with pytest.raises(SparsityError):
            sketch.below(share)
