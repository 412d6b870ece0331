"""Products of any shape, mask and kind of numbers, of every kernel on every instruction set."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import PACKED, any_rows, any_weight, check_everything, handle_of, tiers

from gossamer import kernels

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

# whole panels, groups and blocks of rows, one more or less, and anything between
OUTPUTS = st.sampled_from([1, 15, 16, 17, 32, 33]) | st.integers(1, 50)
INPUTS = st.sampled_from([1, 3, 4, 63, 64, 65, 128, 192]) | st.integers(1, 200)
ROWS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16]) | st.integers(1, 24)


@pytest.mark.parametrize(("layout", "values", "group"), PACKED)
@settings(max_examples=50, deadline=None)
@given(out=OUTPUTS, cols=INPUTS, rows=ROWS, seed=st.integers(0, 2**32 - 1))
def test_any_product(layout: str, values: str, group: int, out: int, cols: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    w = any_weight(layout, values, group, out, cols, rng)
    handle, x = handle_of(w), any_rows(rows, cols, rng)
    for isa in tiers():
        check_everything(w, handle, x, isa)
