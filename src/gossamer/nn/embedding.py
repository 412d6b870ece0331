"""StructuredEmbedding: a look-up in the rows of a structured matrix, which a tied head may share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.errors import MatrixError
from gossamer.matrices.matrix import Matrix


class StructuredEmbedding(nn.Module):
    """Rows of a matrix ``(num_embeddings, embedding_dim)``.

    ``padding_idx`` is kept for code that asks for it; ``dtype``: of the output; ``scale``, rounded to it,
    multiplies it (some models scale their embeddings by the root of the width). Pass the same matrix to a
    StructuredLinear for a tied head: the bytes are held once.
    """

    def __init__(
        self,
        matrix: Matrix,
        padding_idx: int | None = None,
        dtype: torch.dtype = torch.float32,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.matrix = matrix
        self.padding_idx = padding_idx
        self.dtype = dtype
        self.scale = scale

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, matrix: Matrix) -> StructuredEmbedding:
        """``matrix`` in place of ``embedding``'s weight, its output dtype, padding index and scale kept.

        Raises MatrixError on another shape, or where the embedding renormalizes its rows.
        """
        if matrix.shape != tuple(embedding.weight.shape):
            raise MatrixError(
                f"a matrix {matrix.shape} cannot stand in for an embedding {tuple(embedding.weight.shape)}"
            )
        if embedding.max_norm is not None:
            raise MatrixError("an embedding with max_norm changes its rows as it runs: keep it dense")
        scale = float(getattr(embedding, "embed_scale", 1.0))
        made = cls(matrix, embedding.padding_idx, embedding.weight.dtype, scale)
        return made.train(embedding.training)

    @property
    def num_embeddings(self) -> int:
        return self.matrix.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.matrix.shape[1]

    def forward(self, index: Tensor) -> Tensor:
        """``index``: integers ``(...)``; returns ``(..., embedding_dim)`` in ``dtype``."""
        rows = self.matrix.rows(index).to(self.dtype)
        return rows if self.scale == 1.0 else rows * torch.tensor(self.scale, dtype=self.dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.dtype}"
