"""Units compiled for one instruction set share no symbol with the others: else a linker may mix them."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
NM = shutil.which("nm")

pytestmark = [
    pytest.mark.skipif(not (COMPILER and NM), reason="needs a C++ compiler and nm"),
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="one instruction set only"),
]


def check(*objects: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "csrc" / "check_symbols.py"
    return subprocess.run(
        [sys.executable, str(script), str(NM), *map(str, objects)], capture_output=True, text=True
    )


def compile_unit(source: Path, to: Path, flags: list[str]) -> Path:
    # Without optimisation nothing is inlined away: every function that could be shared shows.
    subprocess.run(
        [str(COMPILER), "-std=c++17", "-O0", "-fno-exceptions", *flags, "-c", str(source), "-o", str(to)],
        check=True,
        timeout=200,
    )
    return to


def flags_of(tier: str) -> list[str]:
    found = re.search(rf"add_tier\({tier}([^)]*)\)", (ROOT / "CMakeLists.txt").read_text())
    assert found, f"CMakeLists.txt has no tier {tier}"
    return [f"-DGOSSAMER_TIER={tier}", *found[1].split()]


@pytest.mark.parametrize("tier", ["avx2", "avx512"])
@pytest.mark.parametrize("family", ["int", "float"])
def test_units_export_their_table_only(family: str, tier: str, tmp_path: Path) -> None:
    unit = compile_unit(ROOT / "csrc" / f"matmul_{family}.cpp", tmp_path / "unit.o", flags_of(tier))
    listing = subprocess.run([str(NM), "-g", str(unit)], capture_output=True, text=True, check=True).stdout
    assert f"gossamer_{family}_{tier}" in listing
    done = check(unit)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("code", "culprit"),
    [
        ("inline int shared(int x) { return x + 1; } int (*gossamer_table)(int) = shared;", "shared"),
        ("template <class T> T twice(T x) { return 2 * x; } int gossamer_f() { return twice(2); }", "twice"),
        ("int made(); static int early = made(); int gossamer_f() { return early; }", "GLOBAL__sub_I"),
    ],
)
def test_the_check_finds_planted_faults(code: str, culprit: str, tmp_path: Path) -> None:
    source = tmp_path / "planted.cpp"
    source.write_text(code)
    done = check(compile_unit(source, tmp_path / "planted.o", []))
    assert done.returncode == 1
    assert culprit in done.stderr
