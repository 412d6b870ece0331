"""How packed matrices multiply: one call of the native kernels, or of their reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from gossamer import kernels
from gossamer.errors import MatrixError
from gossamer.kernels import Handle, Operand, reference

if TYPE_CHECKING:
    from gossamer.matrices.matrix import Matrix

Leaf = Handle | reference.Weight  # the latter where the native kernels are missing
Term = tuple[Leaf, int, int]  # leaf, blocks and source, as in kernels.Term
Stages = list[list[Term]]
Compiled = Operand | Stages


def compile_matrix(matrix: Matrix) -> Compiled:
    """A packed matrix as one program. Raises MatrixError where a part is not packed."""
    stages = stages_of(matrix)
    if isinstance(stages[0][0][0], reference.Weight):
        return stages
    return kernels.make_program(cast("list[list[kernels.Term]]", stages))


def stages_of(matrix: Matrix) -> Stages:
    """The sums that a product with ``matrix`` takes, the last one the result; of one sum of packed weights
    there is one stage. Raises MatrixError where a part is not packed."""
    stages: Stages = []
    last = matrix.terms(-1, stages)
    return [*stages, last]


class Kept:
    """A compiled matrix, for as long as no part of it is replaced, moved or loaded anew."""

    def __init__(self, matrix: Matrix) -> None:
        self.compiled = compile_matrix(matrix)
        parts = [module.__dict__ for module in matrix.modules()]
        self._children = [(part["_modules"], list(part["_modules"].values())) for part in parts]
        self._leaves = [(part, part["_leaf"]) for part in parts if "_leaf" in part]

    def holds(self) -> bool:
        """Whether the matrix is still what was compiled."""
        for modules, children in self._children:
            if list(modules.values()) != children:
                return False
        return all(part["_leaf"] is leaf for part, leaf in self._leaves)


def product(compiled: Compiled, x: Tensor, matrix: Matrix) -> Tensor:
    """``x Wᵀ`` by the compiled ``matrix``, in ``x``'s dtype. Gradients flow to ``x`` only, as if activations
    had not been rounded."""
    if x.requires_grad and torch.is_grad_enabled():
        y: Tensor = _Frozen.apply(x, compiled, matrix)  # type: ignore[no-untyped-call]
        return y
    return _product(compiled, x, matrix)


def _product(compiled: Compiled, x: Tensor, matrix: Matrix) -> Tensor:
    if not x.is_floating_point():
        raise MatrixError(f"activations are floats, got {x.dtype}")
    if isinstance(compiled, Operand):
        if x.dtype in (torch.float32, torch.bfloat16):
            return kernels.matmul(compiled, x)
        return kernels.matmul(compiled, x.float()).to(x.dtype)
    out, width = matrix.shape
    y = reference.run_program(compiled, x.reshape(-1, width).float())  # type: ignore[arg-type]
    return y.reshape(*x.shape[:-1], out).to(x.dtype)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, compiled: Compiled, matrix: Matrix) -> Tensor:
        ctx.matrix = matrix
        return _product(compiled, x, matrix)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (grad,) = grads
        return grad @ ctx.matrix.to_dense().to(grad.dtype), None, None
