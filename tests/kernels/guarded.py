"""Runs every kernel with each buffer against a page that may not be touched: ``guarded.py before|after``.

A stray access kills the process; test_guard_pages.py starts it."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import torch
from kernel_cases import PACKED, any_rows, any_weight, check_same
from torch import Tensor

from gossamer import kernels
from gossamer.kernels.native import native, tier

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_regions: list[tuple[int, int]] = []  # address and size, mapped until `release`


def guarded(size: int, side: str) -> int:
    """Address of ``size`` bytes that end where a forbidden page starts (``after``), or start at its end."""
    pages = -(-size // PAGE)
    whole = ctypes.c_size_t((pages + 2) * PAGE)
    access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    start = _libc.mmap(None, whole, access, kind, -1, ctypes.c_long(0))
    if start == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    _regions.append((start, whole.value))
    for page in (0, pages + 1):
        if _libc.mprotect(ctypes.c_void_p(start + page * PAGE), ctypes.c_size_t(PAGE), 0):  # PROT_NONE
            raise OSError(ctypes.get_errno(), "mprotect")
    return int(start) + PAGE + (pages * PAGE - size if side == "after" else 0)


def release() -> None:
    """Gives all regions back, into which nothing may point any more: a process may have so many alone."""
    for start, size in _regions:
        _libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(size))
    _regions.clear()


def guarded_copy(tensor: Tensor, side: str) -> Tensor:
    size = tensor.numel() * tensor.element_size()
    if size == 0:
        return tensor
    buffer = (ctypes.c_char * size).from_address(guarded(size, side))
    return torch.frombuffer(buffer, dtype=tensor.dtype).copy_(tensor.reshape(-1)).reshape(tensor.shape)


def main(side: str) -> None:
    for layout, values, group in PACKED:
        rng = np.random.default_rng(0)
        for out, cols in [(17, 130), (16, 64), (48, 192), (33, 257), (1, 1)]:
            w = any_weight(layout, values, group, out, cols, rng)
            sections = {name: guarded_copy(t, side) for name, t in w.sections().items()}
            handle = kernels.make_handle(layout, values, out, cols, group, sections)
            assert all(handle.sections[n].data_ptr() == t.data_ptr() for n, t in sections.items())
            for isa in kernels.available():
                for rows in (1, 2, 3, 8, 11):
                    for dtype in (torch.float32, torch.bfloat16):
                        x = guarded_copy(any_rows(rows, cols, rng).to(dtype), side)
                        y = guarded_copy(torch.zeros(rows, out, dtype=dtype), side)
                        code = 0 if dtype == torch.float32 else 1
                        native().matmul(handle.program, tier(isa), x.data_ptr(), rows, code, y.data_ptr(), 1)
                        check_same(y, kernels.matmul(handle, x, isa), "other bits beside a guard page")
            del handle, sections, x, y
            release()
    print("untouched")


def touch_the_guard() -> None:
    """What a kernel that reads one byte too far would do."""
    ctypes.string_at(guarded(64, "after"), 65)


if __name__ == "__main__":
    touch_the_guard() if sys.argv[1] == "touch" else main(sys.argv[1])
