"""The structured matrix: one protocol for all that stands in place of a dense weight.

``fit`` finds the best approximation W' of a target W: in the Frobenius norm, or, where the Gram matrix
G = X Xᵀ of a layer's inputs is given, in ``||(W - W') X||``, the error that the layer's outputs see.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.errors import MatrixError
from gossamer.matrices.inference import Stages, Term

KINDS: dict[str, type[Matrix]] = {}
Description = dict[str, Any]  # what JSON can hold


class Matrix(nn.Module):
    """A matrix W of shape ``(out, in)`` that multiplies activations: ``y = x Wᵀ``.

    A small tree: leaves hold tensors, Sum and Product combine matrices. Trainable parts are parameters,
    so an optimizer and ``state_dict`` see them. A subclass names its ``kind``, by which a description
    finds it again.
    """

    kind: ClassVar[str]

    def __init_subclass__(cls, kind: str | None = None, **rest: Any) -> None:
        super().__init_subclass__(**rest)
        if kind is not None:
            if kind in KINDS:
                raise MatrixError(f"the kind {kind!r} is taken by {KINDS[kind]}")
            cls.kind = kind
            KINDS[kind] = cls

    @property
    def shape(self) -> tuple[int, int]:
        """``(out_features, in_features)``."""
        raise NotImplementedError

    def matmul(self, x: Tensor) -> Tensor:
        """``x Wᵀ`` for ``x`` ``(..., in)``: ``(..., out)`` in ``x``'s dtype. Gradients flow to ``x`` and to
        trainable parts. Raises MatrixError where ``x`` has another number of inputs."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self.matmul(x)

    def to_dense(self) -> Tensor:
        """W as a plain tensor ``(out, in)``, differentiable where trainable."""
        raise NotImplementedError

    def transpose(self) -> Matrix:
        """Wᵀ as a new matrix, which shares no trainable tensor with this one."""
        raise NotImplementedError

    def rows(self, index: Tensor) -> Tensor:
        """Rows of W, as an embedding looks them up: ``index`` integers ``(...)``, returns ``(..., in)``."""
        return self.to_dense()[index]

    @property
    def is_packed(self) -> bool:
        """Whether kernels multiply by this matrix as it is, in one call: all of its leaves are packed."""
        return False

    def terms(self, source: int, stages: Stages) -> list[Term]:
        """What kernels add up for this matrix times ``source`` (a stage, or -1: the activations). Stages that
        must run before are appended to ``stages``. Raises MatrixError unless `is_packed`."""
        raise MatrixError(f"a {self.kind} matrix is not packed")

    @property
    def kept(self) -> int:
        """How many weights the leaves keep (as masks count, not as values turn out)."""
        raise NotImplementedError

    def tensors(self) -> dict[str, Tensor]:
        """All that must be stored, by name, as it lies on disk."""
        raise NotImplementedError

    def describe(self) -> Description:
        """What, beside :meth:`tensors`, is needed to make the matrix again: JSON-able."""
        return {"kind": self.kind, "shape": list(self.shape)}

    @classmethod
    def from_tensors(cls, description: Description, tensors: dict[str, Tensor]) -> Matrix:
        """The inverse of :meth:`describe` and :meth:`tensors`; raises MatrixError where they disagree."""
        raise NotImplementedError

    @classmethod
    def fit(cls, target: Tensor, gram: Tensor | None = None, **structure: Any) -> Matrix:
        """The approximation of ``target`` ``(out, in)`` by this kind of matrix, with the errors that
        ``gram`` ``(in, in)`` weighs; what ``structure`` takes is the subclass's."""
        raise MatrixError(f"a {cls.__name__} cannot be fitted by itself")

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())

    @property
    def bits_per_weight(self) -> float:
        """Bits as stored (values, masks, scales, offsets, padding) over ``out * in``."""
        out, width = self.shape
        return 8 * self.nbytes / (out * width)

    def extra_repr(self) -> str:
        out, width = self.shape
        return f"{out}x{width}, {self.bits_per_weight:.2f} bits/weight"

    def _check_inputs(self, x: Tensor) -> None:
        if x.dim() < 1 or x.shape[-1] != self.shape[1]:
            raise MatrixError(f"activations are (..., {self.shape[1]}), got {tuple(x.shape)}")


def from_description(description: Description, tensors: dict[str, Tensor]) -> Matrix:
    """A matrix from what :meth:`Matrix.describe` and :meth:`Matrix.tensors` gave.

    Raises MatrixError where the kind is unknown, or tensors are missing, superfluous or of a wrong shape.
    """
    kind = description.get("kind") if isinstance(description, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise MatrixError(f"unknown kind of matrix {kind!r} (there are: {', '.join(sorted(KINDS))})")
    shape = described_shape(description)
    try:
        matrix = KINDS[kind].from_tensors(description, tensors)
    except RecursionError:
        raise MatrixError("the parts of a matrix lie too deep in each other") from None
    if matrix.shape != shape:
        raise MatrixError(f"the matrix is {matrix.shape}, but its description says {shape}")
    return matrix


def described_shape(description: Description) -> tuple[int, int]:
    """``(out, in)`` of a description; raises MatrixError where it is not two positive integers."""
    shape = description.get("shape")
    if (
        not isinstance(shape, (list, tuple))
        or len(shape) != 2
        or not all(type(side) is int and side > 0 for side in shape)
    ):
        raise MatrixError(f"a matrix's shape is two positive integers, got {shape!r}")
    return shape[0], shape[1]


def take_tensors(tensors: dict[str, Tensor], *names: str) -> tuple[Tensor, ...]:
    """The tensors called ``names``; raises MatrixError where others, or not all, are there."""
    if set(tensors) != set(names):
        raise MatrixError(
            f"the tensors {', '.join(names)} are needed, got {', '.join(sorted(tensors)) or 'none'}"
        )
    return tuple(tensors[name] for name in names)


def check_target(target: Tensor, gram: Tensor | None) -> None:
    """Raises MatrixError unless ``target`` is a finite ``(out, in)`` and ``gram`` a finite ``(in, in)``."""
    if target.dim() != 2 or not target.is_floating_point():
        raise MatrixError(f"a target is a float (out, in), got {target.dtype} {tuple(target.shape)}")
    if not bool(torch.isfinite(target).all()):
        raise MatrixError("the target holds NaN or infinity")
    if gram is not None:
        width = target.shape[1]
        if tuple(gram.shape) != (width, width):
            raise MatrixError(
                f"the Gram matrix of {width} inputs is ({width}, {width}), got {tuple(gram.shape)}"
            )
        if not bool(torch.isfinite(gram).all()):
            raise MatrixError("the Gram matrix holds NaN or infinity")


def fit_error(target: Tensor, approximation: Tensor, gram: Tensor | None = None) -> float:
    """``||(W - W') X||²`` from the Gram matrix ``X Xᵀ``, or ``||W - W'||²`` without one, in float64."""
    rest = (target.detach() - approximation.detach()).double()
    seen = rest if gram is None else rest @ gram.double()
    return float((seen * rest).sum())


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """``x Wᵀ`` in the wider of the two dtypes, given back in ``x``'s."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return nn.functional.linear(x.to(dtype), weight.to(dtype)).to(x.dtype)
