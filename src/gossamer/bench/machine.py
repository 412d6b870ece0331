"""What a figure was measured on: processor, instruction set, caches, load, and how fast memory is read."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from gossamer import kernels
from gossamer.bench.memory import usable_memory
from gossamer.errors import EvaluationError
from gossamer.kernels.native import native

PAST_CACHE = 4.0  # a working set this many times the last-level cache is read from memory, not from the cache
_SYSFS = Path("/sys/devices/system/cpu")


@dataclass(frozen=True)
class Machine:
    """``cores``: that this process may use. ``threads``: that PyTorch and the kernels used. ``isa``: of the
    kernels. ``cache_bytes``: of all last-level caches that those cores see (None: unknown).
    ``load``: processes that wanted to run in the minute before, this one included (None: unknown).
    ``read_gb_per_second``: measured plain reading of memory with these threads, in 1e9 bytes a second (None:
    not measured)."""

    cpu: str
    cores: int
    threads: int
    isa: str
    cache_bytes: int | None
    memory_bytes: int
    load: float | None
    torch: str
    python: str
    read_gb_per_second: float | None = None

    def past_cache(self, working_set: int) -> bool | None:
        """Whether ``working_set`` bytes, read over and over, come from memory: more than four times the
        last-level cache. None where the cache is unknown."""
        return None if self.cache_bytes is None else working_set > PAST_CACHE * self.cache_bytes

    def weights_from(self, working_set: int) -> str:
        """Where they are read from, in words; a working set near the cache's size is partly in it."""
        said = {True: "memory", False: "cache, at least in part", None: "unknown"}
        return said[self.past_cache(working_set)]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def machine_facts(*, bandwidth: bool = True) -> Machine:
    """Facts of this machine now. ``bandwidth``: measure memory too (under a second)."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    built = kernels.native_available()
    isa = kernels.isa() if built else "none: the native kernels are not built"
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        threads=torch.get_num_threads(),
        isa=isa,
        cache_bytes=last_level_cache(),
        memory_bytes=usable_memory().total,
        load=load,
        torch=torch.__version__,
        python=platform.python_version(),
        read_gb_per_second=read_bandwidth() / 1e9 if bandwidth else None,
    )


class OtherWork:
    """Counts what other processes (and other guests of the same host) compute from when it is made on."""

    def __init__(self) -> None:
        self._start = self._now()

    def cores(self) -> float:
        """How many cores' worth of time that was on average, up to now."""
        wall, busy, own = (now - then for now, then in zip(self._now(), self._start, strict=True))
        return max(0.0, busy - own) / wall if wall > 0 else 0.0

    @staticmethod
    def _now() -> tuple[float, float, float]:
        wall = time.perf_counter()
        times = psutil.cpu_times()._asdict()
        # guest time is counted in user time as well
        quiet = ("idle", "iowait", "guest", "guest_nice")
        busy = sum(seconds for name, seconds in times.items() if name not in quiet)
        return wall, busy, time.process_time()


def cpu_name() -> str:
    """The processor's own name for itself."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine() or "unknown"


def usable_cores() -> int:
    """Logical processors that this process is allowed to run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def last_level_cache(root: Path = _SYSFS) -> int | None:
    """Bytes of the last-level caches that this process's cores see, each cache once; None where the system
    does not say (only Linux does, under ``root``)."""
    found: dict[str, int] = {}
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    for core in cores:
        levels: dict[int, tuple[str, int]] = {}
        for index in (root / f"cpu{core}" / "cache").glob("index*"):
            try:
                kind, level, size, shared = (
                    (index / name).read_text(encoding="ascii").strip()
                    for name in ("type", "level", "size", "shared_cpu_list")
                )
                if kind != "Instruction":
                    levels[int(level)] = (shared, _bytes(size))
            except (OSError, ValueError):
                continue
        if levels:
            shared, count = levels[max(levels)]
            found[shared] = count
    return sum(found.values()) or None


def read_bandwidth(seconds: float = 0.5, working_set: int | None = None) -> float:
    """Bytes a second at which a plain sum of words reads memory with the threads in use, each thread a part
    of its own: the best of the passes that fit into ``seconds``, over a buffer that no cache holds (a quarter
    of the free memory at most), or one of ``working_set`` bytes where that is smaller (1 MiB at least), which
    a cache may hold."""
    cache = last_level_cache() or 32 << 20
    room = usable_memory().available // 4
    size = min(max(256 << 20, 4 * cache), room, *([] if working_set is None else [working_set]))
    buffer = torch.ones(max(1 << 20, size) // 8, dtype=torch.int64)
    read = buffer.sum
    if kernels.native_available():
        place = buffer.data_ptr(), buffer.numel(), torch.get_num_threads()
        read = partial(native().sum_words, *place)
    read()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        start = time.perf_counter()
        read()
        best = min(best, time.perf_counter() - start)
    return buffer.nbytes / best


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Inside, PyTorch and the kernels use ``count`` threads (None: as many as before). Raises EvaluationError
    below 1."""
    if count is not None and count < 1:
        raise EvaluationError(f"threads must be at least 1, got {count}")
    before = torch.get_num_threads()
    torch.set_num_threads(before if count is None else count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _bytes(size: str) -> int:
    """A cache size as Linux writes it: 32768K."""
    factors = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(size[:-1]) * factors[size[-1]] if size[-1] in factors else int(size)
