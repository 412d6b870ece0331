"""Compiles units of csrc/ the way CMakeLists.txt does."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def flags_of(tier: str) -> list[str]:
    """What CMakeLists.txt compiles kernels with for one instruction set, and for no other."""
    text = (ROOT / "CMakeLists.txt").read_text()
    found = re.search(rf"add_tier\({tier}\b([^)]*)\)", text)
    assert found, f"CMakeLists.txt has no tier {tier}"
    sets = dict(re.findall(r"set\((\w+)([^)]*)\)", text))
    flags = found[1]
    while "${" in flags:  # a set may be another one and more
        flags = re.sub(r"\$\{(\w+)\}", lambda name: sets[name[1]], flags)
    return [f"-DGOSSAMER_TIER={tier}", *flags.split()]


def compile_cpp(*arguments: str | Path, into: Path) -> None:
    """Runs the C++ compiler in the folder ``into``; what it says is the failure."""
    command = [str(COMPILER), "-std=c++17", *map(str, arguments)]
    done = subprocess.run(command, cwd=into, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]


def compile_units(sources: Sequence[Path], flags: Sequence[str], into: Path) -> list[Path]:
    """The objects of ``sources``, in the folder ``into``."""
    compile_cpp(*flags, "-c", *sources, into=into)
    return [into / f"{source.stem}.o" for source in sources]
