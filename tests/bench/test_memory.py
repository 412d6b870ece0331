"""Resident memory: what a known allocation adds."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from gossamer.bench import memory, peak_bytes, reset_peak, resident_bytes, usable_memory

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


class Machine:
    total, available = 16 << 30, 12 << 30


@pytest.mark.parametrize(
    ("second", "first", "total"),
    [
        (None, None, 16 << 30),
        ("max\n", None, 16 << 30),
        ("4294967296\n", None, 4 << 30),
        (None, "8589934592\n", 8 << 30),
        (None, "9223372036854771712\n", 16 << 30),  # how version 1 says that there is none
        ("", None, 16 << 30),
    ],
)
def test_a_control_group_may_have_less_than_the_machine(
    second: str | None, first: str | None, total: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("memory.max", second), ("memory.limit_in_bytes", first)):
        if text is not None:
            (tmp_path / name).write_text(text)
    paths = (tmp_path / "memory.max", tmp_path / "memory.limit_in_bytes")
    monkeypatch.setattr(memory, "_LIMITS", paths)
    monkeypatch.setattr(memory.psutil, "virtual_memory", Machine)
    monkeypatch.setattr(memory, "resident_bytes", lambda: 1 << 30)
    found = usable_memory()
    assert found.total == total
    assert found.available == min(12 << 30, total - (1 << 30) if total < 16 << 30 else 12 << 30)
