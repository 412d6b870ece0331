"""``y = x Wᵀ`` with a packed weight or several, as a function and as an op that PyTorch can trace."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.errors import KernelError
from gossamer.kernels.handle import Operand, live_operand
from gossamer.kernels.native import native, tier

_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def matmul(operand: Operand, x: Tensor, isa: str | None = None) -> Tensor:
    """``x (..., in_features)`` times the transposed weight: ``(..., out_features)``, of x's dtype.

    ``x``: float32 or bfloat16 on the CPU. Integer values meet int8 activations (one scale a row and 64
    inputs); bfloat16 values meet activations rounded to bfloat16; sums are float32. A row of the result
    depends on its row of ``x`` only, bit for bit, on one instruction set. Between instruction sets integer
    sums are equal, and float32 sums round differently: each result lies within ``(n + 2) * 2**-24`` of the
    sum of magnitudes of its n terms from the exact one. A term is what one scale covers, or a float product.
    The weights of a program (`make_program`) each hold to this, for the float32 numbers that they are given.

    Runs on ``torch.get_num_threads()`` threads at most, those of PyTorch where they are OpenMP's.
    ``isa`` forces an instruction set for this call (one of ``available()``).

    Raises KernelError for another dtype, device or width. There is no gradient: backward raises it too.
    """
    # Straight to the kernel in eager mode: the dispatcher costs more than a small product.
    traced = type(x) is not Tensor or torch.compiler.is_compiling()
    if not traced and not (x.requires_grad and torch.is_grad_enabled()):
        return _run(operand, x, isa)
    if isa is not None:
        raise KernelError("an instruction set can be forced for eager calls without gradients only")
    y: Tensor = torch.ops.gossamer.packed_matmul(x, operand.id, operand.out_features)
    return y


def _run(operand: Operand, x: Tensor, isa: str | None) -> Tensor:
    dtype = _DTYPES.get(x.dtype)
    if dtype is None:
        raise KernelError(f"packed weights take float32 or bfloat16 activations, not {x.dtype}")
    shape = x.shape
    if not shape or shape[-1] != operand.in_features:
        raise KernelError(
            f"activations {tuple(shape)} do not end in {operand.in_features} inputs of {operand}"
        )
    if not x.is_cpu:
        raise KernelError(f"packed weights run on the CPU, the activations are on {x.device}")
    if not x.is_contiguous() or x.is_neg():
        x = x.resolve_neg().contiguous()
    y = x.new_empty((*shape[:-1], operand.out_features))
    native().matmul(
        operand.program,
        tier(isa),
        x.data_ptr(),
        x.numel() // operand.in_features,
        dtype,
        y.data_ptr(),
        torch.get_num_threads(),
    )
    return y


# ---- the same as an op

_library: Any = torch.library.Library("gossamer", "DEF")  # type: ignore[no-untyped-call]
_library.define("packed_matmul(Tensor x, int handle, int out_features) -> Tensor")


def _packed_matmul(x: Tensor, handle: int, out_features: int) -> Tensor:
    return _run(live_operand(handle), x, None)


def _fake(x: Tensor, handle: int, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


def _backward(context: object, gradient: Tensor) -> None:
    raise KernelError(
        "a packed weight has no gradient: run it under torch.no_grad(), or tune the model before packing it"
    )


_library.impl("packed_matmul", _packed_matmul, "CPU")
torch.library.register_fake("gossamer::packed_matmul", _fake, lib=_library)
torch.library.register_autograd("gossamer::packed_matmul", _backward, lib=_library)
