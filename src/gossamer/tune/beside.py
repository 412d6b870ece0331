"""Low-rank parameters beside a sparse weight, tuned with it and kept apart from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import MethodError
from gossamer.matrices import Dense, LowRank, Matrix, Packed, Sparse, Sum, pack_tree
from gossamer.registry import with_options
from gossamer.tune.weights import seed_of


@dataclass(frozen=True)
class BesideOptions:
    """Either ``rank``: of two factors that are both tuned, or ``sums``: one tuned weight for each output and
    sum of so many neighbouring inputs, as in AST (Huang et al. 2025). ``begin``: with the nearest to what the
    dense weight has and the sparse one ``lost``, as in the paper, which is right where kept weights are still
    the dense ones, or at ``zero``, where they were updated for what was pruned (OBS)."""

    rank: int | None = None
    sums: int | None = None
    begin: str = "zero"

    def __post_init__(self) -> None:
        if (self.rank is None) == (self.sums is None):
            raise MethodError("low-rank parameters have a rank, or sums of so many inputs: give one of them")
        number = self.rank if self.sums is None else self.sums
        if type(number) is not int or number < 1:
            raise MethodError(f"the rank of low-rank parameters, or their sums, is 1 or more, got {number!r}")
        if self.begin not in ("lost", "zero"):
            raise MethodError(f"low-rank parameters begin with what was lost or at zero, not {self.begin!r}")

    def check(self, shape: tuple[int, int]) -> None:
        """Raises MethodError where inputs of a weight ``(out, in)`` are no such sums, or the rank is above
        what it has."""
        if self.sums is not None and shape[1] % self.sums:
            raise MethodError(f"{shape[1]} inputs are not sums of {self.sums}")
        if self.rank is not None and self.rank > min(shape):
            raise MethodError(f"the rank of a {shape} matrix is at most {min(shape)}, not {self.rank}")

    @classmethod
    def of(cls, options: Mapping[str, Any] | None) -> BesideOptions | None:
        """``options`` checked (None: no such parameters); raises MethodError."""
        return None if options is None else with_options(cls, dict(options), "beside")


class Beside(nn.Module):
    """``y += (x Aᵀ) Bᵀ`` with ``B`` ``(out, rank)``, and ``A`` ``(rank, in)`` that is tuned, too, or fixed.

    Tuned in float32, seen and finished in bfloat16.
    """

    A: Tensor

    def __init__(self, B: Tensor, A: Tensor, *, fixed: bool = False) -> None:
        super().__init__()
        A = A.detach().float().clone(memory_format=torch.contiguous_format)
        self.B = nn.Parameter(B.detach().float().clone(memory_format=torch.contiguous_format))
        if fixed:
            self.register_buffer("A", A, persistent=False)
        else:
            self.A = nn.Parameter(A)
        self.fixed = fixed

    @classmethod
    def begin(cls, options: BesideOptions, weight: Tensor, dense: Tensor | None) -> Beside:
        """Beside the sparse ``weight`` ``(out, in)``; ``dense``: that of before, where they begin with what
        it lost. Raises MethodError as `BesideOptions.check` does."""
        out, width = weight.shape
        options.check((out, width))
        if options.sums is not None:
            A = torch.eye(width // options.sums).repeat_interleave(options.sums, dim=1)
            B = torch.zeros(out, len(A)) if dense is None else (dense - weight) @ A.T / options.sums
            return cls(B, A, fixed=True)
        assert options.rank is not None
        if dense is not None:
            fitted = LowRank.fit((dense - weight).float(), rank=options.rank)
            return cls(*(part.to_dense() for part in fitted))
        generator = torch.Generator().manual_seed(seed_of(weight))
        A = torch.randn(options.rank, width, generator=generator) / width**0.5
        return cls(torch.zeros(out, options.rank), A)

    def forward(self, x: Tensor) -> Tensor:
        A, B = (_stored(one).to(x.dtype) for one in (self.A, self.B))
        return nn.functional.linear(nn.functional.linear(x, A), B)

    @torch.no_grad()
    def join(self, matrix: Matrix) -> Sum:
        """``matrix`` and these, packed where it is."""
        B, A = (Dense(_stored(one), trainable=False) for one in (self.B, self.A))
        pair = LowRank(B, Sparse(self.A != 0, self.A, False) if self.fixed else A)
        return Sum(matrix, pack_tree(pair, "bfloat16") if matrix.is_packed else pair)


def _stored(x: Tensor) -> Tensor:
    """As bfloat16 holds it, gradients passing straight through."""
    return x + (x.bfloat16().float() - x).detach()


def apart(matrix: Matrix) -> tuple[Matrix, Beside | None]:
    """A weight, and the low-rank parameters that `Beside.join` put beside it, if any."""
    if not isinstance(matrix, Sum) or len(matrix.parts) != 2:
        return matrix, None
    main, low_rank = matrix
    if not isinstance(low_rank, LowRank):
        return matrix, None
    B, A = low_rank
    mask = A.unpack().mask if isinstance(A, Packed) else getattr(A, "mask", None)
    fixed = mask is not None and not mask.all()
    return main, Beside(B.to_dense(), A.to_dense(), fixed=fixed)
