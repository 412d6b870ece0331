"""Sparse: a mask and the values it keeps, trainable without ever growing back what was pruned."""

from __future__ import annotations

import numpy as np
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
from gossamer.sparse import Pattern, mask_from_scores, parse_pattern


class Sparse(Matrix, kind="sparse"):
    """``mask``: bool ``(out, in)``, True = kept; ``values``: float ``(kept,)`` in row-major order, or
    ``(out, in)``, of which the kept ones are taken.

    Only kept values are parameters, so the mask stays exact whatever an optimizer does, gradients reach
    kept weights only, and optimizer state is as sparse as the weight. On disk a mask is one bit a weight.
    """

    mask: Tensor

    def __init__(self, mask: Tensor, values: Tensor, trainable: bool = True) -> None:
        super().__init__()
        shape_of(mask)
        if mask.dtype != torch.bool:
            raise MatrixError(f"a mask is bool, got {mask.dtype}")
        if not values.is_floating_point():
            raise MatrixError(f"sparse values are floats, got {values.dtype}")
        if values.dim() == 2 and values.shape == mask.shape:
            values = values.detach()[mask]
        kept = int(mask.sum())
        if tuple(values.shape) != (kept,):
            raise MatrixError(f"the mask keeps {kept} weights, but the values are {tuple(values.shape)}")
        if not isinstance(values, nn.Parameter):
            values = nn.Parameter(values.detach(), requires_grad=trainable)
        self.register_buffer("mask", mask)
        self.values = values

    @property
    def shape(self) -> tuple[int, int]:
        return shape_of(self.mask)

    def to_dense(self) -> Tensor:
        return self.values.new_zeros(self.shape).masked_scatter(self.mask, self.values)

    def matmul(self, x: Tensor) -> Tensor:
        self._check_inputs(x)
        return multiply(x, self.to_dense())

    def transpose(self) -> Sparse:
        turned = self.to_dense().detach().T
        return Sparse(self.mask.T.contiguous(), turned, self.values.requires_grad)

    @property
    def kept(self) -> int:
        return self.values.numel()

    def tensors(self) -> dict[str, Tensor]:
        bits = np.packbits(self.mask.cpu().numpy().reshape(-1), bitorder="little")
        return {"mask": torch.from_numpy(bits), "values": self.values.detach()}

    @classmethod
    def from_tensors(cls, description: Description, tensors: dict[str, Tensor]) -> Sparse:
        packed, values = take_tensors(tensors, "mask", "values")
        shape = described_shape(description)
        count = shape[0] * shape[1]
        if packed.dtype != torch.uint8 or tuple(packed.shape) != (-(-count // 8),):
            raise MatrixError(
                f"the mask of a {shape} matrix is {-(-count // 8)} bytes, got {tuple(packed.shape)}"
            )
        bits = np.unpackbits(packed.numpy(), count=count, bitorder="little").view(np.bool_)
        return cls(torch.from_numpy(bits).reshape(shape), values)

    @classmethod
    def fit(  # type: ignore[override]
        cls,
        target: Tensor,
        gram: Tensor | None = None,
        *,
        pattern: str | Pattern = "unstructured",
        sparsity: float | None = None,
    ) -> Sparse:
        """The target's weights of highest ``|w_ij| sqrt(G_jj)`` that ``pattern`` allows, unchanged.

        That is the least error where inputs are uncorrelated (G diagonal); with correlated inputs an OBS
        sweep does better. Sun et al. 2024, A Simple and Effective Pruning Approach for LLMs, eq. 1.
        """
        check_target(target, gram)
        scores = target.detach().float().abs()
        if gram is not None:
            scores = scores * gram.diagonal().float().clamp_min(0).sqrt()
        chosen = parse_pattern(pattern) if isinstance(pattern, str) else pattern
        return cls(mask_from_scores(scores, chosen, sparsity), target.detach())
