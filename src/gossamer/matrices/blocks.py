"""BlockDiagonal: equal blocks on the diagonal, which is all of it that is stored and multiplied."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gossamer.errors import MatrixError
from gossamer.matrices.compose import Composite
from gossamer.matrices.dense import Dense
from gossamer.matrices.geometry import parse_layout
from gossamer.matrices.inference import Stages, Term
from gossamer.matrices.matrix import Description, Matrix, check_target
from gossamer.matrices.sparse import Sparse


class BlockDiagonal(Composite, kind="block_diagonal"):
    """``count`` blocks ``(r, c)`` on the diagonal of ``(count * r, count * c)``; all else is zero.

    ``stacked``: the blocks below each other, a leaf ``(count * r, c)``: Dense, Sparse or Packed, which trains
    and packs as it does anywhere. Packed blocks stay one leaf of the same values and scales; with several of
    them r must be a multiple of 16 (layout columns: 128) for kernels to take it; else PyTorch multiplies.
    `pack` sees to the 16.
    """

    def __init__(self, stacked: Matrix, count: int) -> None:
        super().__init__(stacked)
        if isinstance(stacked, Composite):
            raise MatrixError(f"the blocks of a block-diagonal matrix are one leaf, not a {stacked.kind}")
        if type(count) is not int or count < 1 or stacked.shape[0] % count:
            raise MatrixError(f"{stacked.shape[0]} outputs are not {count!r} equal blocks")
        self.count = count

    @classmethod
    def from_blocks(cls, blocks: Tensor, trainable: bool = True) -> BlockDiagonal:
        """``blocks``: float ``(count, r, c)``."""
        if blocks.dim() != 3:
            raise MatrixError(f"blocks are (count, outputs, inputs), got {tuple(blocks.shape)}")
        return cls(Dense(blocks.detach().flatten(0, 1), trainable), blocks.shape[0])

    @property
    def stacked(self) -> Matrix:
        """The leaf that holds the blocks below each other."""
        return next(iter(self))

    @property
    def shape(self) -> tuple[int, int]:
        out, width = self.stacked.shape
        return out, self.count * width

    def blocks(self) -> Tensor:
        """``(count, r, c)``, differentiable where trainable."""
        out, width = self.stacked.shape
        return self.stacked.to_dense().reshape(self.count, out // self.count, width)

    def to_dense(self) -> Tensor:
        return _on_diagonal(self.blocks())

    def _combined(self, x: Tensor) -> Tensor:
        blocks = self.blocks()
        dtype = torch.promote_types(x.dtype, blocks.dtype)
        apart = x.to(dtype).reshape(*x.shape[:-1], self.count, blocks.shape[2])
        y = torch.einsum("...nc,nrc->...nr", apart, blocks.to(dtype))
        return y.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def transpose(self) -> BlockDiagonal:
        def below(beside: Tensor) -> Tensor:  # (c, count * r) to (count * c, r)
            return torch.cat(beside.chunk(self.count, dim=1))

        turned = self.stacked.transpose()
        weight, trains = below(turned.to_dense().detach()), any(p.requires_grad for p in turned.parameters())
        leaf = (
            Sparse(below(turned.mask), weight, trains)
            if isinstance(turned, Sparse)
            else Dense(weight, trains)
        )
        return BlockDiagonal(leaf, self.count)

    def map_parts(self, change: Callable[[int, Matrix], Matrix]) -> Matrix:
        return BlockDiagonal(change(0, self.stacked), self.count)

    def part_importance(self, index: int, importance: Tensor) -> Tensor | None:
        """Of each weight ``(count * r, c)``."""
        return importance.reshape(self.count, -1).repeat_interleave(self.shape[0] // self.count, 0)

    def packable(self) -> Matrix:
        """This matrix, or where its blocks do not end with a panel of 16 outputs, the same as one Sparse."""
        if self._ends_with_panels or self.stacked.is_packed:
            return self
        inner = self.stacked
        kept = inner.mask if isinstance(inner, Sparse) else torch.ones(inner.shape, dtype=torch.bool)
        mask = _on_diagonal(kept.reshape(self.count, -1, inner.shape[1]))
        return Sparse(mask, self.to_dense().detach())

    # --- as kernels see it ---

    @property
    def _ends_with_panels(self) -> bool:
        layout = parse_layout(getattr(self.stacked, "layout", "dense"))
        return self.count == 1 or self.shape[0] // self.count % layout.outputs == 0

    @property
    def is_packed(self) -> bool:
        return self._ends_with_panels and super().is_packed

    def terms(self, source: int, stages: Stages) -> list[Term]:
        return [(leaf, self.count, source) for leaf, _, _ in self.stacked.terms(source, stages)]

    # --- on disk ---

    def describe(self) -> Description:
        return {**super().describe(), "count": self.count}

    @classmethod
    def from_parts(cls, description: Description, parts: list[Matrix]) -> BlockDiagonal:
        count = description.get("count")
        if len(parts) != 1 or type(count) is not int:
            raise MatrixError(
                f"a block-diagonal matrix has one part and a count, got {len(parts)} and {count!r}"
            )
        return cls(parts[0], count)

    @classmethod
    def fit(  # type: ignore[override]
        cls, target: Tensor, gram: Tensor | None = None, *, count: int
    ) -> BlockDiagonal:
        """The best approximation by ``count`` blocks, in closed form.

        Without a Gram matrix the blocks of the target itself; with one, for the inputs S of a block, least
        squares: ``W_S' = W G[:, S] G[S, S]⁺``. Computed in float64. Raises MatrixError where ``count`` does
        not divide outputs and inputs.
        """
        check_target(target, gram)
        out, width = target.shape
        if type(count) is not int or count < 1 or out % count or width % count:
            raise MatrixError(f"a matrix {out, width} has no {count!r} equal blocks")
        w = target.detach().double()
        fitted = []
        for rows, columns in zip(w.chunk(count), torch.arange(width).chunk(count), strict=True):
            block = rows[:, columns]
            if gram is not None:
                g = gram.double()
                block = rows @ g[:, columns] @ torch.linalg.pinv(g[columns][:, columns], hermitian=True)
            fitted.append(block)
        return cls.from_blocks(torch.stack(fitted).to(target.dtype))

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.count} blocks"


def _on_diagonal(blocks: Tensor) -> Tensor:
    dense: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return dense
