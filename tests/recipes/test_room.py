"""Room on the disk: what is asked for beforehand is no more than what a run takes, and not far from it."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from gossamer.bench.memory import Memory
from gossamer.calibrate import fast_dtype
from gossamer.errors import CheckpointError, GossamerError, MethodError, ModelError, OutputError
from gossamer.models.skeleton import empty_model
from gossamer.recipes import room
from gossamer.recipes.compress import compress
from gossamer.recipes.finetune import finetune
from gossamer.recipes.predict import finetune_bytes
from gossamer.recipes.rates import parameters_of
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


TUNED: dict[str, dict[str, Any]] = {
    "all weights": {},
    "one evaluation": {"evaluations": 1},
    "fewer steps than evaluations": {"tokens": 1},
    "lora": {"method": "lora", "options": {"rank": 2}},
    "scales": {"method": "scales"},
    "towards int3": {"values": "int3"},
    "masks": {"method": "ast", "options": {"pattern": "2:4"}},
}
BRIEF: dict[str, Any] = {
    "text": [TEXT], "seqlen": 32, "batch": 2, "held_out": 2, "tokens": 256, "evaluations": 3,
    "losses": {"task": 1}, "rate": 1e-4,
}  # fmt: skip


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    source = tiny_folder(folder / "model", vocab_size=384, num_hidden_layers=2)
    return compress(source, folder / "sparse", method="magnitude", pattern="2:4", values="int4").path


@pytest.mark.parametrize("name", TUNED)
def test_tuning_takes_what_was_asked_for(
    name: str, sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    peak = [0]
    replace = os.replace

    def watched(old: Any, new: Any) -> None:
        peak[0] = max(peak[0], used(tmp_path / "out.work"))
        replace(old, new)

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr(
        "gossamer.recipes.finetune.check_room", lambda needed: asked.append(sum(needed.values()))
    )
    finetune(sparse, tmp_path / "out", **{**BRIEF, **TUNED[name]})
    assert len(asked) == 1
    assert 0.5 * peak[0] < asked[0] <= peak[0]


def test_tuning_on_a_full_disk_is_refused_once(
    sparse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    steps: list[int] = []

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "tuning":
            steps.append(done)
            if done >= 128:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: usage(1, 1, 1000))
        with pytest.raises(OutputError, match=r"bytes are needed in .*out.work, 1,000 are free"):
            finetune(sparse, tmp_path / "out", progress=stop, **BRIEF)
    assert not steps
    assert not (tmp_path / "out.work").exists()
    with pytest.raises(KeyboardInterrupt):
        finetune(sparse, tmp_path / "out", progress=stop, **BRIEF)
    monkeypatch.setattr("gossamer.recipes.finetune.check_room", lambda needed: pytest.fail("asked again"))
    assert finetune(sparse, tmp_path / "out", **BRIEF).resumed


def in_blocks(checkpoint: Path) -> list[dict[str, Any]]:
    """What a checkpoint says of the packed linears of its blocks."""
    matrices = json.loads((checkpoint / "gossamer.json").read_text())["matrices"]
    return [matrix for name, matrix in matrices.items() if ".layers." in name]


def test_what_tuning_keeps_in_memory_is_known_before(sparse: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the checkpoint and the teacher, of which nothing is read but where it says what it is made of."""
    monkeypatch.setattr("gossamer.recipes.predict.resident_bytes", lambda: 0)
    dense = sparse.parent / "model"
    brief = {key: value for key, value in BRIEF.items() if key != "text"}
    one = finetune_bytes(sparse, "no-such-model", **brief)  # the loss task asks for none
    with pytest.raises(ModelError, match="no-such-model"):
        finetune_bytes(sparse, "no-such-model", **{**brief, "losses": {"kl": 1}})
    taught = finetune_bytes(sparse, dense, **{**brief, "losses": {"kl": 1}})
    assert taught - one == parameters_of(empty_model(dense)) * fast_dtype().itemsize
    scales = finetune_bytes(sparse, dense, **{**brief, "method": "scales"})
    assert one - scales == 7 * sum(math.prod(matrix["shape"]) for matrix in in_blocks(sparse))
    with pytest.raises(CheckpointError, match="is no Gossamer checkpoint"):
        finetune_bytes(dense, **brief)
    with pytest.raises(GossamerError, match="the setting speed"):
        finetune_bytes(sparse, speed=1)
