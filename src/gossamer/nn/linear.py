"""StructuredLinear: one module that serves every structured matrix in a PyTorch model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from gossamer.errors import MatrixError
from gossamer.matrices.geometry import SECTION_DTYPES
from gossamer.matrices.matrix import Matrix
from gossamer.matrices.packed import Packed


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

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        check_state(self.matrix, state_dict, f"{prefix}matrix")
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        y = self.matrix.matmul(x)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        )


def check_state(matrix: Matrix, state: Mapping[str, Tensor], prefix: str) -> None:
    """Raises MatrixError where ``state`` holds packed weights of ``matrix``, whose names begin with
    ``prefix``, as sections of other names or sizes than it has."""
    for place, part in matrix.named_modules(prefix=prefix):
        if not isinstance(part, Packed):
            continue
        own = {name: tuple(section.shape) for name, section in part.tensors().items()}
        names = [name for name in SECTION_DTYPES if f"{place}.{name}" in state]
        given = {name: tuple(state[f"{place}.{name}"].shape) for name in names}
        if given and given != own:
            raise MatrixError(
                f"{place} is {part.values_name} in the layout {part.layout}, with sections {_sizes(own)}, "
                f"and the state has {_sizes(given)}: it was packed in another format or under another "
                "mask; pack this layer as that one was"
            )


def _sizes(sections: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sections.items())
