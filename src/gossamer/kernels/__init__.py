"""The Python face of the native kernels, and a plain-PyTorch reference of each (``reference``)."""

from gossamer.kernels.attention import BLOCK, block_attention, block_count
from gossamer.kernels.handle import Handle, Operand, make_handle, section_bytes
from gossamer.kernels.native import available, isa, native_available
from gossamer.kernels.ops import matmul
from gossamer.kernels.program import Program, Term, make_program

__all__ = [
    "BLOCK",
    "Handle",
    "Operand",
    "Program",
    "Term",
    "available",
    "block_attention",
    "block_count",
    "isa",
    "make_handle",
    "make_program",
    "matmul",
    "native_available",
    "section_bytes",
]
