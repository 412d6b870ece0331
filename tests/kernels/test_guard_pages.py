"""Kernels read and write their own sections only: not a byte before or after."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer import kernels

pytestmark = [
    pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built"),
    pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for forbidden pages"),
]


def run(argument: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("guarded.py")
    return subprocess.run(
        [sys.executable, str(script), argument], capture_output=True, text=True, timeout=200
    )


@pytest.mark.slow
@pytest.mark.parametrize("side", ["before", "after"])
def test_no_kernel_leaves_its_buffers(side: str) -> None:
    done = run(side)
    assert done.returncode == 0, f"{done.returncode}: {done.stderr[-2000:]}"
    assert done.stdout.strip() == "untouched"


def test_the_guard_would_see_one_byte_too_far() -> None:
    assert run("touch").returncode == -signal.SIGSEGV
