"""Room on the disk: what is asked for beforehand is no more than what a run takes, and not far from it."""

from __future__ import annotations

import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from gossamer.bench.memory import Memory
from gossamer.errors import MethodError, OutputError
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
    monkeypatch.setattr(
        "gossamer.recipes.compress.check_room", lambda needed: asked.append(sum(needed.values()))
    )
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
    with pytest.raises(OutputError, match=r"bytes are needed in .*gradients, 1,000 are free"):
        compress(source, out, method="fisher", sparsity=0.5, gradients=kept, **SMALL)
    assert not kept.exists()


def test_what_was_begun_is_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out, kept = tiny_folder(tmp_path / "model"), tmp_path / "out", tmp_path / "gradients"
    settings = {**SMALL, "windows": 64, "method": "fisher", "sparsity": 0.5, "gradients": kept}
    asked: list[dict[str, int]] = []

    def note(needed: dict[Path, int]) -> None:
        asked.append({path.name: amount for path, amount in needed.items()})

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pruning" and done == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("gossamer.recipes.compress.check_room", note)
    with pytest.raises(KeyboardInterrupt):
        compress(source, out, progress=stop, **settings)
    assert [set(one) for one in asked] == [{"gradients"}, {"out.work", "gradients"}]
    assert asked[0]["gradients"] > 2 * asked[1]["gradients"]  # streams, and then sums alone
    assert used(kept) == pytest.approx(asked[1]["gradients"], rel=0.1)
    asked.clear()
    assert compress(source, out, **settings).resumed
    assert not asked
    compress(source, tmp_path / "other", **{**settings, "method": "taylor"})
    assert [set(one) for one in asked] == [{"other.work", "gradients"}]


def test_what_lies_there_already_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    (tmp_path / "work" / "gradients").mkdir(parents=True)
    (tmp_path / "work" / "gradients" / "a").write_bytes(b"0" * 500)
    work, other = tmp_path / "work", tmp_path / "none" / "work"
    room.check_room({work: 1500})
    with pytest.raises(OutputError, match="at least 1,001 bytes"):
        room.check_room({work: 1501})
    room.check_room({other: 1000})
    room.check_room({work: 900, other: 600})
    with pytest.raises(OutputError, match=r"at least 1,001 bytes are needed in .*work and .*none.work"):
        room.check_room({work: 901, other: 600})  # of one disk


def test_more_memory_than_there_is_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "usable_memory", lambda: Memory(16 * 10**9, 0))
    room.check_memory(16 * 10**9)
    with pytest.raises(MethodError, match=r"20.0 GB of memory are needed, and 16.0 GB may be used here"):
        room.check_memory(20 * 10**9)
