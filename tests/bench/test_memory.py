"""Resident memory: what a known allocation adds, and a model in a process of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from gossamer.bench import peak_bytes, reset_peak, resident_bytes, resident_memory
from gossamer.errors import EvaluationError
from tiny import tiny_folder

MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux gives freed memory back at once")
def test_resident_and_peak_see_an_allocation() -> None:
    before = resident_bytes()
    can_reset = reset_peak()
    block = torch.ones(100 * MIB, dtype=torch.uint8)
    held = resident_bytes()
    assert 90 * MIB < held - before < 200 * MIB
    del block
    assert resident_bytes() < before + 50 * MIB
    assert peak_bytes() >= held - MIB
    if can_reset:
        assert reset_peak()
        assert peak_bytes() < held - 40 * MIB


def test_a_model_in_a_fresh_process(tmp_path: Path) -> None:
    # 30 MiB of weights, all of them touched, and what transformers imports late
    found = resident_memory(tiny_folder(tmp_path, vocab_size=122_880), prompt=8, threads=1)
    assert 30 * MIB < found.model < 250 * MIB
    assert found.peak >= found.running > found.base > 50 * MIB
    assert found.model == found.running - found.base
    assert json.loads(json.dumps(found.to_dict()))["model"] == found.model


def test_a_process_that_fails_is_a_clear_error_with_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.bench.memory._CHILD", "raise SystemExit('first\\nno such model')")
    with pytest.raises(EvaluationError, match=r"nothing could not be run.*: no such model"):
        resident_memory("nothing")
