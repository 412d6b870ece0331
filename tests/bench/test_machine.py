"""Facts of the machine, read from made-up and real places."""

from __future__ import annotations

import json
import os
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import kernels
from gossamer.bench import machine as machine_module
from gossamer.bench import machine_facts, read_bandwidth
from gossamer.bench.machine import cpu_name, last_level_cache, usable_cores, use_threads
from gossamer.errors import EvaluationError, KernelError


def cache(root: Path, core: int, index: int, kind: str, level: int, size: str, shared: str) -> None:
    folder = root / f"cpu{core}" / "cache" / f"index{index}"
    folder.mkdir(parents=True)
    for name, text in {"type": kind, "level": str(level), "size": size, "shared_cpu_list": shared}.items():
        (folder / name).write_text(text + "\n")


def test_last_level_caches_count_once_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    for core in (0, 1, 2, 3):
        cache(tmp_path, core, 0, "Data", 1, "48K", str(core))
        cache(tmp_path, core, 1, "Instruction", 1, "32K", str(core))
        cache(tmp_path, core, 2, "Unified", 3, "32768K", "0-1" if core < 2 else "2-3")
    assert last_level_cache(tmp_path) == 64 << 20
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1}, raising=False)
    assert last_level_cache(tmp_path) == 32 << 20


def test_unknown_caches_are_none(tmp_path: Path) -> None:
    assert last_level_cache(tmp_path) is None
    cache(tmp_path, 0, 0, "Unified", 3, "much", "0")
    assert last_level_cache(tmp_path) is None


def test_sizes_in_megabytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0}, raising=False)
    cache(tmp_path, 0, 0, "Unified", 2, "2M", "0")
    assert last_level_cache(tmp_path) == 2 << 20


def test_facts_of_this_machine() -> None:
    found = machine_facts(bandwidth=False)
    assert found.cores == usable_cores() >= 1
    assert found.threads == torch.get_num_threads()
    assert found.cpu == cpu_name() != ""
    assert found.read_gb_per_second is None
    assert found.memory_bytes > 1 << 28
    json.dumps(found.to_dict())


def test_past_cache_is_more_than_four_times() -> None:
    found = machine_facts(bandwidth=False)
    if found.cache_bytes is not None:
        assert found.past_cache(4 * found.cache_bytes) is False
        assert found.past_cache(4 * found.cache_bytes + 1) is True


def test_bandwidth_is_a_rate_of_bytes() -> None:
    assert 1e7 < read_bandwidth(0.01) < 1e13  # between a tape drive and any memory ever built


def test_bandwidth_of_a_small_working_set_reads_so_much(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    ones = torch.ones

    def spy(count: int, dtype: torch.dtype) -> torch.Tensor:
        made.append(count * dtype.itemsize)
        return ones(count, dtype=dtype)

    monkeypatch.setattr(torch, "ones", spy)
    assert read_bandwidth(0.001, working_set=3 << 20) > 1e7
    assert read_bandwidth(0.001, working_set=10) > 1e7
    assert made == [3 << 20, 1 << 20]


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with use_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with use_threads(None):
        assert torch.get_num_threads() == before
    with pytest.raises(EvaluationError, match="threads"), use_threads(0):
        pass


def test_other_work_is_what_was_busy_without_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    Times = namedtuple("Times", "user nice system idle iowait steal guest")
    ticks = iter(
        [(100.0, Times(50, 0, 5, 900, 7, 1, 30), 3.0), (110.0, Times(62, 1, 6, 906, 9, 2, 36), 15.0)]
    )

    def now(source: str) -> float:
        nonlocal moment
        if source == "wall":
            moment = next(ticks)
        return moment[0] if source == "wall" else moment[2]

    moment: Any = None
    monkeypatch.setattr(machine_module.time, "perf_counter", lambda: now("wall"))
    monkeypatch.setattr(machine_module.time, "process_time", lambda: now("own"))
    monkeypatch.setattr(machine_module.psutil, "cpu_times", lambda: moment[1])
    others = machine_module.OtherWork()
    # 12 user, 1 nice, 1 system, 1 stolen: 15 s busy, 12 of them ours, in 10 s
    assert others.cores() == pytest.approx(0.3)


def test_an_instruction_set_that_there_is_not_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not kernels.native_available():
        pytest.skip("the native kernels are not built")
    monkeypatch.setenv("GOSSAMER_ISA", "bogus")
    kernels.isa.cache_clear()
    with pytest.raises(KernelError, match="bogus"):
        machine_facts(bandwidth=False)
