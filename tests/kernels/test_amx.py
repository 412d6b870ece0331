"""The tier amx without a processor that has it: its source on emulated tiles, its unit's instructions.

What is compiled here is csrc/tiles.cpp itself, behind functions that do what Intel's manual says of each tile
instruction (tests/native/emulated_tiles.h).
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import PACKED, any_rows, any_weight, check_product, check_same, handle_of
from kernel_packer import Weight
from kernel_units import COMPILER, ROOT, compile_units, flags_of
from test_planted_faults import Planted
from test_properties import INPUTS, OUTPUTS
from torch import Tensor

from gossamer import kernels
from gossamer.kernels import Handle
from gossamer.kernels.native import native

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler"),
    pytest.mark.skipif(
        not kernels.native_available() or "amx" not in native().compiled(),
        reason="the native kernels are not built, or the compiler knows no tiles",
    ),
]

needs_avx512 = pytest.mark.skipif(
    not kernels.native_available() or "avx512" not in kernels.available(),
    reason="emulated tiles stand on avx512",
)

# by tiles there are calls of more rows than 16; whole tiles, one row more or less, pairs of tiles
ROWS = st.sampled_from([17, 31, 32, 33, 48, 49]) | st.integers(17, 70)
TILES = {
    "ldtilecfg",
    "sttilecfg",
    "tilerelease",
    "tileloadd",
    "tilestored",
    "tilezero",
    "tdpbssd",
    "tdpbf16ps",
}


@pytest.mark.skipif(not shutil.which("objdump"), reason="needs objdump")
def test_the_unit_holds_the_tile_instructions(tmp_path: Path) -> None:
    (unit,) = compile_units([ROOT / "csrc" / "tiles.cpp"], ["-O2", *flags_of("amx")], tmp_path)
    command = ["objdump", "-d", "--no-show-raw-insn", str(unit)]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\s(\w*tile\w*|tdp\w+)\s", code)) == TILES


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return Planted("amx", tmp_path_factory.mktemp("amx"))


def by_tiles_in_their_order(layout: str, values: str) -> bool:
    return values == "bfloat16" and layout not in ("16x4", "columns")


def check_tiles(w: Weight, handle: Handle, x: Tensor, emulated: Planted) -> None:
    """What holds for more than 16 rows: the product; the bits of avx512, but for bfloat16 by tiles; the same
    bits of a row in every such call, and those of avx512 in calls of fewer rows."""
    y = emulated.matmul(handle, x, "amx")
    check_product(w, x, y, "amx")
    if not by_tiles_in_their_order(handle.layout, handle.values):
        check_same(y, kernels.matmul(handle, x, "avx512"), "other bits than avx512's")
    rows = len(x)
    for first, last in ((0, 17), (rows - 17, rows), (rows // 8, rows)):
        if last - first > 16:
            check_same(emulated.matmul(handle, x[first:last], "amx"), y[first:last], "rows depend on others")
    for some in (x[:16], x[-9:], x[-1:]):
        few = emulated.matmul(handle, some, "amx")
        check_same(few, kernels.matmul(handle, some, "avx512"), "few rows have other bits than avx512's")
    narrow = x.bfloat16()
    wide = emulated.matmul(handle, narrow.float(), "amx")
    check_same(emulated.matmul(handle, narrow, "amx"), wide.bfloat16(), "results are not rounded ones")


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_avx512
@pytest.mark.parametrize(("layout", "values", "group"), PACKED)
@settings(max_examples=20, deadline=None)
@given(out=OUTPUTS, cols=INPUTS, rows=ROWS, seed=st.integers(0, 2**32 - 1))
def test_any_product(
    emulated: Planted, layout: str, values: str, group: int, out: int, cols: int, rows: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    w = any_weight(layout, values, group, out, cols, rng)
    check_tiles(w, handle_of(w), any_rows(rows, cols, rng), emulated)


@pytest.mark.slow
@pytest.mark.timeout(300)
@needs_avx512
def test_wrong_tiles_are_reported(emulated: Planted) -> None:
    fault = ctypes.c_int.in_dll(emulated.library, "emulated_fault")
    for layout, values, group in PACKED:
        rng = np.random.default_rng(0)
        w = any_weight(layout, values, group, 33, 130, rng)
        x, handle = torch.from_numpy(rng.standard_normal((33, 130), np.float32)), handle_of(w)
        check_tiles(w, handle, x, emulated)
        uses = layout not in ("16x4", "columns") and values != "float32"
        fault.value = 2 if values == "bfloat16" else 1
        try:
            if uses:
                with pytest.raises(AssertionError):
                    check_tiles(w, handle, x, emulated)
            else:
                check_tiles(w, handle, x, emulated)
        finally:
            fault.value = 0
