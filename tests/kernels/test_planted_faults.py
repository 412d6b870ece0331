"""The checks of kernels see wrong results: planted.h makes each operation go wrong, and they must say so."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import PACKED, any_rows, any_weight, check_everything, handle_of, tiers
from kernel_packer import Weight
from kernel_units import COMPILER, ROOT, compile_cpp, compile_units, flags_of
from torch import Tensor

from gossamer import kernels
from gossamer.kernels import Handle
from gossamer.kernels.handle import _VALUES, _layout
from gossamer.kernels.native import native

HERE = Path(__file__).parent
DOTS = {
    "float32": "dot32",
    "bfloat16": "dot16",
    "int8": "dot8",
    "int4": "dot8",
    "int3": "dot8",
    "nl4": "dot8",
    "nl3": "dot8",
}
BELOW_TILES = {"matmul_int": "avx512vnni", "matmul_float": "avx512", "columns": "avx512vnni"}
COLUMNS = {**DOTS, "float32": "as_floats", "bfloat16": "lower_halves"}  # multiplies floats one by one

pytestmark = [
    pytest.mark.skipif(not COMPILER, reason="needs a C++ compiler"),
    pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built"),
]


class Planted:
    """The kernels of one instruction set, compiled with faults that can be planted one at a time."""

    def __init__(self, isa: str, folder: Path) -> None:
        plain = ["-O0", "-fPIC", "-ffp-contract=off", f"-I{ROOT / 'csrc'}"]
        planted, flags = ["-include", str(HERE / "planted.h")], [*plain, *flags_of(isa)]
        compiled = BELOW_TILES if isa == "amx" else dict.fromkeys(BELOW_TILES, isa)
        objects = []
        for name, tier in compiled.items():
            unit = ROOT / "csrc" / f"{name}.cpp"
            objects += compile_units([unit], [*plain, *flags_of(tier), *planted], folder)
        if isa == "amx":  # one unit on top of these, here on emulated tiles
            emulated = ["-include", str(ROOT / "tests" / "native" / "emulated_tiles.h")]
            objects += compile_units([ROOT / "csrc" / "tiles.cpp"], [*flags, *emulated, *planted], folder)
        host = [ROOT / "csrc" / f"{name}.cpp" for name in ("driver", "program", "threads")]
        rest = [HERE / "planted.cpp", *host]
        compile_cpp(*flags, "-shared", *objects, *rest, "-o", "planted.so", "-pthread", "-ldl", into=folder)
        self.library = ctypes.CDLL(str(folder / "planted.so"))
        self.library.faults.restype = ctypes.c_char_p
        self.faults = ["", *self.library.faults().decode().split()]

    def plant(self, fault: str) -> None:
        self.library.plant(self.faults.index(fault))

    def matmul(self, handle: Handle, x: Tensor, isa: str) -> Tensor:
        """As ``kernels.matmul``."""
        x = x.contiguous()
        y = x.new_empty(len(x), handle.out_features)
        layout, keep = _layout(handle.layout)
        names = ("masks", "scales", "offsets")
        sections = [handle.sections[name].data_ptr() if name in handle.sections else None for name in names]
        self.library.multiply(
            ctypes.c_int64(handle.out_features),
            ctypes.c_int64(handle.in_features),
            layout,
            _VALUES[handle.values],
            keep,
            64 // handle.group,
            ctypes.c_void_p(handle.sections["values"].data_ptr()),
            ctypes.c_int64(handle.sections["values"].numel()),
            *map(ctypes.c_void_p, sections),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_int64(len(x)),
            int(x.dtype == torch.bfloat16),
            ctypes.c_void_p(y.data_ptr()),
        )
        return y


@cache
def cases(layout: str, values: str, group: int) -> list[tuple[Weight, Handle, Tensor]]:
    """As test_properties.py makes them."""
    made = []
    for seed in range(6):
        rng = np.random.default_rng(seed)
        w = any_weight(layout, values, group, *[(17, 130), (40, 70), (5, 200)][seed % 3], rng)
        made.append((w, handle_of(w), any_rows(11, w.mask.shape[1], rng)))
    return made


def is_reported(planted: Planted, layout: str, values: str, group: int, isa: str) -> bool:
    try:
        for w, handle, x in cases(layout, values, group):
            check_everything(w, handle, x, isa, planted.matmul)
    except AssertionError:
        return True
    return False


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    "isa", [isa for isa in tiers() if isa != "amx"]
)  # which test_amx.py plants faults in
def test_a_wrong_result_of_any_kernel_is_reported(isa: str, tmp_path: Path) -> None:
    planted = Planted(isa, tmp_path)
    every = PACKED
    assert [kernel for kernel in every if is_reported(planted, *kernel, isa)] == []  # nothing is planted yet
    silent = []
    for kernel in every:
        planted.plant((COLUMNS if kernel[0] == "columns" else DOTS)[kernel[1]])
        if not is_reported(planted, *kernel, isa):
            silent.append(kernel)
    assert silent == []
    for fault in planted.faults[1:]:
        planted.plant(fault)
        if not any(is_reported(planted, *kernel, isa) for kernel in every):
            silent.append(fault)
    assert silent == []


def test_the_library_holds_no_fault() -> None:
    assert b"planted" not in Path(native().__file__).read_bytes()
    assert "planted" not in (ROOT / "CMakeLists.txt").read_text()
