"""Resident memory: what a known allocation adds."""

from __future__ import annotations

import sys

import pytest
import torch

from gossamer.bench import peak_bytes, reset_peak, resident_bytes

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives freed memory back at once")
def test_resident_and_peak_see_an_allocation() -> None:
    before = resident_bytes()
    can_reset = reset_peak()
    block = torch.ones(400 * MIB, dtype=torch.uint8)  # far more than what the system takes back meanwhile
    held = resident_bytes()
    assert 300 * MIB < held - before < 500 * MIB
    del block
    assert resident_bytes() < before + 100 * MIB
    assert peak_bytes() >= held - MIB
    if can_reset:
        assert reset_peak()
        assert peak_bytes() < held - 200 * MIB
