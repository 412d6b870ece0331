"""The clock that cycles are counted by."""

from __future__ import annotations

import pytest

from gossamer import kernels
from gossamer.kernels.native import native


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
def test_a_cycle_takes_what_cycles_take() -> None:
    # a chain that the compiler adds up by itself would seem to run at thousands of gigahertz
    assert 1e8 < native().cycles_per_second() < 1e10
