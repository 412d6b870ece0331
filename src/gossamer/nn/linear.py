"""StructuredLinear: one module that serves every structured matrix in a PyTorch model."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gossamer.errors import MatrixError
from gossamer.matrices.matrix import Matrix


class StructuredLinear(nn.Module):
    """``y = x Wᵀ + bias`` with a structured W ``(out_features, in_features)``.

    ``x``: ``(..., in_features)`` of any float dtype, which ``y`` keeps; ``bias``: ``(out_features,)``.
    """

    bias: nn.Parameter | None

    def __init__(self, matrix: Matrix, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (matrix.shape[0],):
            raise MatrixError(f"the bias of {matrix.shape[0]} outputs has shape {tuple(bias.shape)}")
        self.matrix = matrix
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            raise AttributeError(
                "a packed layer has a matrix, but no weight that its owner could read: leave it unpacked (in "
                "sparsify by skip)"
            )
        return super().__getattr__(name)

    @property
    def in_features(self) -> int:
        return self.matrix.shape[1]

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        y = self.matrix.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )
