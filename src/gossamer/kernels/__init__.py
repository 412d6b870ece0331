"""The Python face of the native kernels, and a plain-PyTorch reference of each (``reference``)."""

from gossamer.kernels.handle import Handle, make_handle, section_bytes
from gossamer.kernels.native import available, isa, native_available
from gossamer.kernels.ops import matmul

__all__ = [
    "Handle",
    "available",
    "isa",
    "make_handle",
    "matmul",
    "native_available",
    "section_bytes",
]
