"""Sums and products of matrices, and LowRank, the product of two dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn

from gossamer.claim import Unclaimed
from gossamer.errors import MatrixError
from gossamer.matrices.dense import Dense
from gossamer.matrices.inference import Compiled, Kept, Stages, Term, product
from gossamer.matrices.matrix import Description, Matrix, check_target, fit_error, from_description

UNCLAIMED = Unclaimed(
    name="sparse plus low rank",
    cite="Zhou & Tao 2011, GoDec: Randomized Low-rank & Sparse Matrix Decomposition in Noisy Case",
    figures="Sums and products",
    why="It fits any matrix, and no method of pruning asks for it: only bytes and speed are measured.",
)


class Composite(Matrix):
    """A matrix made of others: what Sum, Product and BlockDiagonal share.

    Where all leaves are packed, a product is one call of the kernels, which keeps float32 numbers inside and
    rounds to the activations' dtype once; else parts are multiplied one by one, each result in that dtype.
    """

    parts: nn.ModuleList
    _kept: Kept | None

    def __init__(self, *parts: Matrix) -> None:
        super().__init__()
        if not parts:
            raise MatrixError(f"a {self.kind} has at least one part")
        self.parts = nn.ModuleList(parts)
        self._kept = None

    def __iter__(self) -> Iterator[Matrix]:
        return cast("Iterator[Matrix]", iter(self.parts))

    def map_parts(self, change: Callable[[int, Matrix], Matrix]) -> Matrix:
        """The same combination of changed parts; ``change`` takes a part's number and the part."""
        return type(self)(*(change(index, part) for index, part in enumerate(self)))

    def part_importance(self, index: int, importance: Tensor) -> Tensor | None:
        """What ``importance`` ``(in,)`` of the inputs means for a part: None where it sees other inputs."""
        return importance

    def matmul(self, x: Tensor) -> Tensor:
        self._check_inputs(x)
        compiled = self.compiled()
        return self._combined(x) if compiled is None else product(compiled, x, self)

    def _combined(self, x: Tensor) -> Tensor:
        """`matmul` part by part, with gradients to trainable parts."""
        raise NotImplementedError

    @property
    def is_packed(self) -> bool:
        return all(part.is_packed for part in self)

    def compiled(self) -> Compiled | None:
        """What kernels run for this matrix, or None where it is not packed."""
        if self._kept is None or not self._kept.holds():
            self._kept = Kept(self) if self.is_packed else None
        return None if self._kept is None else self._kept.compiled

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}

    @property
    def kept(self) -> int:
        return sum(part.kept for part in self)

    def tensors(self) -> dict[str, Tensor]:
        return {
            f"{index}.{name}": tensor
            for index, part in enumerate(self)
            for name, tensor in part.tensors().items()
        }

    def describe(self) -> Description:
        return {**super().describe(), "parts": [part.describe() for part in self]}

    @classmethod
    def from_tensors(cls, description: Description, tensors: dict[str, Tensor]) -> Composite:
        return cls.from_parts(description, cls._parts_of(description, tensors))

    @classmethod
    def _parts_of(cls, description: Description, tensors: dict[str, Tensor]) -> list[Matrix]:
        """The parts that `describe` lists, from `tensors` of all of them."""
        inner = description.get("parts")
        if not isinstance(inner, list) or not inner:
            raise MatrixError(f"a {cls.kind} lists its parts, got {inner!r}")
        shares: list[dict[str, Tensor]] = [{} for _ in inner]
        for name, tensor in tensors.items():
            index, _, rest = name.partition(".")
            if not index.isdecimal() or int(index) >= len(inner):
                raise MatrixError(f"the tensor {name!r} belongs to no part of this {cls.kind}")
            shares[int(index)][rest] = tensor
        return [from_description(part, share) for part, share in zip(inner, shares, strict=True)]

    @classmethod
    def from_parts(cls, description: Description, parts: list[Matrix]) -> Composite:
        """The matrix from its parts and what else its description says."""
        try:
            return cls(*parts)
        except TypeError as error:
            raise MatrixError(f"a {cls.kind} is not made of {len(parts)} parts") from error


def _added(terms: Iterable[Tensor]) -> Tensor:
    first, *rest = terms
    for term in rest:
        first = first + term
    return first


def _multiplied(factors: list[Tensor]) -> Tensor:
    *left, total = factors
    for factor in reversed(left):
        dtype = torch.promote_types(factor.dtype, total.dtype)
        total = factor.to(dtype) @ total.to(dtype)
    return total


class Sum(Composite, kind="sum"):
    """``W = A + B + ...``, all of one shape."""

    def __init__(self, *parts: Matrix) -> None:
        super().__init__(*parts)
        if any(part.shape != parts[0].shape for part in parts):
            raise MatrixError(f"the parts of a sum have one shape, got {[part.shape for part in parts]}")

    @property
    def shape(self) -> tuple[int, int]:
        return next(iter(self)).shape

    def _combined(self, x: Tensor) -> Tensor:
        return _added(part.matmul(x) for part in self)

    def terms(self, source: int, stages: Stages) -> list[Term]:
        return [term for part in self for term in part.terms(source, stages)]

    def to_dense(self) -> Tensor:
        return _added(part.to_dense() for part in self)

    def rows(self, index: Tensor) -> Tensor:
        return _added(part.rows(index) for part in self)

    def transpose(self) -> Matrix:
        return Sum(*(part.transpose() for part in self))

    @classmethod
    def fit(  # type: ignore[override]
        cls,
        target: Tensor,
        gram: Tensor | None = None,
        *,
        parts: Sequence[tuple[type[Matrix], dict[str, Any]]],
        rounds: int = 10,
    ) -> Sum:
        """Parts fitted in turn, each to what the others leave of the target, up to ``rounds`` times round.

        ``parts``: classes with the structure that their own ``fit`` takes, such as
        ``[(LowRank, {"rank": 32}), (Sparse, {"sparsity": 0.9})]``. Stops when a round gains less than
        0.01 %, and returns the best round's. Alternating projections: a local optimum
        (Zhou & Tao 2011, GoDec).
        """
        check_target(target, gram)
        goal = target.detach().float()
        dense = [torch.zeros_like(goal) for _ in parts]
        best: tuple[float, Sum] | None = None
        for _ in range(max(1, rounds)):
            fitted = []
            for index, (kind, structure) in enumerate(parts):
                rest = goal - sum(other for at, other in enumerate(dense) if at != index)
                fitted.append(kind.fit(rest, gram, **structure))
                dense[index] = fitted[-1].to_dense().detach()
            error = fit_error(goal, sum(dense, torch.zeros_like(goal)), gram)
            gained = best is None or error < best[0] * (1 - 1e-4)
            if best is None or error < best[0]:
                best = error, cls(*fitted)
            if not gained:
                break
        assert best is not None
        return best[1]


class Product(Composite, kind="product"):
    """``W = A B ...``: the last factor sees the activations first, ``x Wᵀ = (x Bᵀ) Aᵀ``."""

    def __init__(self, *parts: Matrix) -> None:
        super().__init__(*parts)
        for left, right in pairwise(parts):
            if left.shape[1] != right.shape[0]:
                raise MatrixError(
                    f"a factor {left.shape} cannot stand left of one of {right.shape}: the inner sizes differ"
                )

    @property
    def shape(self) -> tuple[int, int]:
        factors = list(self)
        return factors[0].shape[0], factors[-1].shape[1]

    def _combined(self, x: Tensor) -> Tensor:
        for factor in reversed(list(self)):
            x = factor.matmul(x)
        return x

    def terms(self, source: int, stages: Stages) -> list[Term]:
        first, *rest = list(self)
        for factor in reversed(rest):
            stages.append(factor.terms(source, stages))
            source = len(stages) - 1
        return first.terms(source, stages)

    def part_importance(self, index: int, importance: Tensor) -> Tensor | None:
        return importance if index == len(self.parts) - 1 else None

    def to_dense(self) -> Tensor:
        return _multiplied([factor.to_dense() for factor in self])

    def rows(self, index: Tensor) -> Tensor:
        first, *rest = list(self)
        return _multiplied([first.rows(index), *(factor.to_dense() for factor in rest)])

    def transpose(self) -> Matrix:
        return Product(*(part.transpose() for part in reversed(list(self))))


class LowRank(Product, kind="low_rank"):
    """``W = A B`` with dense A ``(out, rank)`` and B ``(rank, in)``."""

    def __init__(self, left: Matrix, right: Matrix) -> None:
        super().__init__(left, right)

    @property
    def rank(self) -> int:
        return next(iter(self)).shape[1]

    def transpose(self) -> LowRank:
        left, right = list(self)
        return LowRank(right.transpose(), left.transpose())

    @classmethod
    def fit(  # type: ignore[override]
        cls, target: Tensor, gram: Tensor | None = None, *, rank: int
    ) -> LowRank:
        """The best approximation of that rank, in closed form.

        With ``S = V sqrt(λ)`` from the eigenvalues of ``G = V λ Vᵀ`` and ``U`` the first ``rank`` left
        singular vectors of ``W S``, it is ``W' = U (Uᵀ W)`` (Eckart-Young on ``W S``; no inverse of S is
        needed, so a singular Gram matrix is fine). The singular values are split evenly between the
        factors. Computed in float64. Raises MatrixError unless ``1 <= rank <= min(out, in)``.
        """
        check_target(target, gram)
        if not 1 <= rank <= min(target.shape):
            raise MatrixError(
                f"the rank of a {tuple(target.shape)} matrix is in 1..{min(target.shape)}, got {rank}"
            )
        w = target.detach().double()
        seen = w
        if gram is not None:
            eigenvalues, vectors = torch.linalg.eigh(gram.double())
            seen = w @ (vectors * eigenvalues.clamp_min(0).sqrt())
        left = torch.linalg.svd(seen, full_matrices=False).U[:, :rank]
        right = left.T @ w
        # the rows of Uᵀ W carry all the size: share it, so that both factors train and quantize alike
        size = right.norm(dim=1).sqrt()
        size = torch.where(size > 0, size, 1.0)
        dtype = target.dtype
        return cls(Dense((left * size).to(dtype)), Dense((right / size[:, None]).to(dtype)))
