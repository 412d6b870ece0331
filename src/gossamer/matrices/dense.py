"""Dense: a plain weight as a structured matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import MatrixError
from gossamer.matrices.geometry import shape_of
from gossamer.matrices.matrix import (
    Description,
    Matrix,
    check_target,
    described_shape,
    multiply,
    take_tensors,
)


class Dense(Matrix, kind="dense"):
    """``weight``: float ``(out, in)``; a Parameter is used as it is, so that it can be shared."""

    def __init__(self, weight: Tensor, trainable: bool = True) -> None:
        super().__init__()
        shape_of(weight)
        if not weight.is_floating_point():
            raise MatrixError(f"a dense weight holds floats, got {weight.dtype}")
        if not isinstance(weight, nn.Parameter):
            weight = nn.Parameter(weight.detach(), requires_grad=trainable)
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.weight)

    def matmul(self, x: Tensor) -> Tensor:
        self._check_inputs(x)
        return multiply(x, self.weight)

    def to_dense(self) -> Tensor:
        return self.weight

    def rows(self, index: Tensor) -> Tensor:
        return nn.functional.embedding(index, self.weight)

    def transpose(self) -> Dense:
        return Dense(self.weight.detach().T.contiguous().clone(), self.weight.requires_grad)

    @property
    def kept(self) -> int:
        return self.weight.numel()

    def tensors(self) -> dict[str, Tensor]:
        return {"weight": self.weight.detach()}

    @classmethod
    def from_tensors(cls, description: Description, tensors: dict[str, Tensor]) -> Dense:
        (weight,) = take_tensors(tensors, "weight")
        if tuple(weight.shape) != described_shape(description):
            raise MatrixError(f"the weight is {tuple(weight.shape)}, not {described_shape(description)}")
        return cls(weight)

    @classmethod
    def fit(cls, target: Tensor, gram: Tensor | None = None, **structure: Any) -> Dense:
        """The target itself. ``structure``: ``dtype`` (the target's by default)."""
        check_target(target, gram)
        dtype: torch.dtype = structure.pop("dtype", target.dtype)
        if structure:
            raise MatrixError(f"Dense.fit takes dtype, got {', '.join(structure)}")
        return cls(target.detach().to(dtype, copy=True))
