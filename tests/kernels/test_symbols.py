"""Units compiled for one instruction set share no symbol with the others: else a linker may mix them."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from kernel_units import COMPILER, ROOT, compile_units, flags_of

from gossamer import kernels
from gossamer.kernels.native import native

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


# Without optimisation nothing is inlined away: every function that could be shared shows.
PLAIN = ["-O0", "-fno-exceptions"]


UNITS = {
    "matmul_int": "int",
    "columns": "columns",
    "matmul_float": "float",
    "attention": "attention",
    "estimate": "estimate",
    "decoder_ops": "decoder",
}
COMPILED = {  # as CMakeLists.txt does
    "avx2": list(UNITS),
    "avxvnni": ["matmul_int", "columns"],
    "avx512vnni": list(UNITS),
    "avx512": ["matmul_float", "attention", "estimate"],
}
# without optimisation the largest unit alone compiles for half a minute
SLOW = {"matmul_int": [pytest.mark.slow]}
TIERS = [
    pytest.param(unit, UNITS[unit], tier, marks=SLOW.get(unit, []))
    for tier, units in COMPILED.items()
    for unit in units
]


@pytest.mark.parametrize(
    ("name", "family", "tier"),
    [
        *TIERS,
        ("tiles", "int", "amx"),
        ("tiles", "float", "amx"),
        ("attention_tiles", "attention", "amx"),
    ],
)
def test_units_export_their_table_only(name: str, family: str, tier: str, tmp_path: Path) -> None:
    source = ROOT / "csrc" / f"{name}.cpp"
    (unit,) = compile_units([source], [*PLAIN, *flags_of(tier)], tmp_path)
    listing = subprocess.run([str(NM), "-g", str(unit)], capture_output=True, text=True, check=True).stdout
    assert f"gossamer_{family}_{tier}" in listing
    done = check(unit)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
@pytest.mark.skipif(sys.platform != "linux", reason="asks nm for an ELF file's exports")
def test_the_built_module_exports_nothing_of_ours() -> None:
    # what it exports, another library's symbol of the same name could replace
    command = [str(NM), "-D", "--defined-only", native().__file__]
    exports = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "PyInit__native" in exports
    assert "gossamer" not in exports


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
    done = check(*compile_units([source], PLAIN, tmp_path))
    assert done.returncode == 1
    assert culprit in done.stderr
