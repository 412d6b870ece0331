"""Room on the disk: what is asked for beforehand is no more than what a run takes, and not far from it."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from gossamer.errors import OutputError
from gossamer.recipes import room
from gossamer.recipes.compress import compress
from tiny import tiny_folder

TEXT = "The cat sat on the mat. " * 400
SMALL: dict[str, Any] = {"windows": 8, "seqlen": 64, "calibration": [TEXT]}
RUNS: dict[str, dict[str, Any]] = {
    "one shot": {"method": "wanda", "values": "bf16", "head_values": "float32"},
    "tuned": {"tune": "blockwise", "tune_options": {"epochs": 1}},
    "gradients": {"method": "taylor", "sparsity": 0.5, "values": "float32", "windows": 64},
    "gradients of few windows": {"method": "fisher", "sparsity": 0.5, "windows": 1},
    "no text": {"method": "magnitude", "sparsity": 0.0, "values": "float32", "head_values": "float32"},
}


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0


@pytest.mark.parametrize("name", RUNS)
def test_a_run_takes_what_was_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    asked: list[int] = []
    peak = [0]
    replace = os.replace

    def watched(old: Any, new: Any) -> None:  # a file is whole here, and what it follows still there
        peak[0] = max(peak[0], used(tmp_path / "out.work"))
        replace(old, new)

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr("gossamer.recipes.compress.check_room", lambda folder, needed: asked.append(needed))
    compress(source, out, **{**SMALL, **RUNS[name]})
    assert 0.5 * peak[0] < max(asked) <= peak[0]


def test_a_full_disk_is_told_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tiny_folder(tmp_path / "model"), tmp_path / "out"
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    stages: list[str] = []
    with pytest.raises(OutputError, match=r"at least [\d,]+ bytes are needed in .*out.work, 1,000 are free"):
        compress(source, out, progress=lambda stage, done, total: stages.append(stage), **SMALL)
    assert not stages
    assert not (tmp_path / "out.work").exists()
    kept = tmp_path / "kept" / "gradients"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000 if path == tmp_path else 10**9))
    with pytest.raises(OutputError, match=r"bytes are needed in .*gradients, 1,000 are free"):
        compress(source, out, method="fisher", sparsity=0.5, gradients=kept, **SMALL)


def test_what_lies_there_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    (tmp_path / "work" / "gradients").mkdir(parents=True)
    (tmp_path / "work" / "gradients" / "a").write_bytes(b"0" * 500)
    room.check_room(tmp_path / "work", 1500)
    with pytest.raises(OutputError, match="at least 1,001 bytes"):
        room.check_room(tmp_path / "work", 1501)
    room.check_room(tmp_path / "none" / "work", 1000)
