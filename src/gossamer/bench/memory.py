"""Resident memory of this process, its peak, and how much it may have."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_LIMITS = (  # of a control group, as a container sees its own: version 2, version 1
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)


class Memory(NamedTuple):
    """Bytes in all, and those that are free."""

    total: int
    available: int


def usable_memory() -> Memory:
    """The machine's memory, or that of this process's control group where it is limited to less."""
    machine = psutil.virtual_memory()
    limit = min((found for path in _LIMITS if (found := _limit(path)) is not None), default=machine.total)
    if limit >= machine.total:
        return Memory(machine.total, machine.available)
    return Memory(limit, min(machine.available, max(0, limit - resident_bytes())))


def _limit(path: Path) -> int | None:
    """None where there is no such file, or it holds a word (``max``)."""
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most resident memory of this process since it started, or since `reset_peak` returned True."""
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10  # macOS counts bytes, Linux KiB


def reset_peak() -> bool:
    """Start counting the peak anew; False where the system cannot (it counts from the process's start)."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True
