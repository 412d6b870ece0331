"""Selected: a matrix that reads some of the inputs only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import MatrixError
from gossamer.kernels import Handle
from gossamer.matrices.bitfields import pack_bits, unpack_bits
from gossamer.matrices.compose import Composite
from gossamer.matrices.dense import Dense
from gossamer.matrices.geometry import GROUP, padded_size
from gossamer.matrices.inference import Leaf, Stages, Term
from gossamer.matrices.matrix import Description, Matrix, described_shape
from gossamer.matrices.sparse import Sparse


class Selected(Composite, kind="selected"):
    """``W`` ``(out, in)`` whose columns are zero but for those of a leaf ``(out, count)``.

    ``inputs``: bool ``(in,)``, True = read; the leaf's columns are theirs, in order. What is not read does
    not reach the leaf: with integer values, groups of 64 and the scales of activations are made of what is
    read alone. Raises MatrixError where ``inputs`` are not as many as the leaf's.
    """

    words: Tensor  # int64, a bit an input, padded to whole sections
    _leaf: tuple[Leaf, Leaf] | None

    def __init__(self, leaf: Matrix, inputs: Tensor) -> None:
        super().__init__(leaf)
        if isinstance(leaf, Composite):
            raise MatrixError(f"a selected matrix has one leaf, not a {leaf.kind}")
        if inputs.dtype != torch.bool or inputs.dim() != 1:
            raise MatrixError(f"inputs are bool (in,), got {inputs.dtype} {tuple(inputs.shape)}")
        if int(inputs.sum()) != leaf.shape[1]:
            raise MatrixError(f"{int(inputs.sum())} inputs are selected for a leaf {leaf.shape}")
        self.register_buffer("words", _to_words(inputs))
        self._width = len(inputs)
        self._leaf = None

    @property
    def leaf(self) -> Matrix:
        """The matrix ``(out, count)`` of the inputs that are read."""
        return next(iter(self))

    @property
    def shape(self) -> tuple[int, int]:
        return self.leaf.shape[0], self._width

    def inputs(self) -> Tensor:
        """bool ``(in,)``, True = read."""
        return _from_words(self.words, self._width)

    def _combined(self, x: Tensor) -> Tensor:
        return self.leaf.matmul(x[..., self.inputs()])

    def to_dense(self) -> Tensor:
        return self._spread(self.leaf.to_dense())

    def rows(self, index: Tensor) -> Tensor:
        return self._spread(self.leaf.rows(index))

    def _spread(self, columns: Tensor) -> Tensor:
        """``(..., count)`` as ``(..., in)``, zeros elsewhere."""
        places = self.inputs().nonzero()[:, 0]
        whole = columns.new_zeros((*columns.shape[:-1], self._width))
        return whole.index_copy(-1, places, columns)

    def transpose(self) -> Matrix:
        """Wᵀ as a Sparse whose mask keeps whole rows (those of the leaf's mask, where it has one)."""
        inner = self.leaf
        turned = inner.transpose()
        kept = turned.mask if isinstance(turned, Sparse) else torch.ones(turned.shape, dtype=torch.bool)
        trains = any(p.requires_grad for p in inner.parameters())
        whole = self._spread(turned.to_dense().detach().T.contiguous()).T.contiguous()
        mask = self._spread(kept.T.contiguous()).T.contiguous()
        return Sparse(mask, whole, trains)

    def map_parts(self, change: Callable[[int, Matrix], Matrix]) -> Matrix:
        return Selected(change(0, self.leaf), self.inputs())

    def part_importance(self, index: int, importance: Tensor) -> Tensor | None:
        return importance[self.inputs()]

    # --- as kernels see it ---

    def terms(self, source: int, stages: Stages) -> list[Term]:
        ((leaf, blocks, source),) = self.leaf.terms(source, stages)
        if self._leaf is None or self._leaf[0] is not leaf:
            places = self.inputs().nonzero()[:, 0]
            if isinstance(leaf, Handle):
                chosen: Leaf = leaf.reading(places.to(torch.int32), self._width)
            else:
                chosen = leaf._replace(inputs=places)
            self._leaf = leaf, chosen
        return [(self._leaf[1], blocks, source)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Selected:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._leaf = None
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._leaf = None
        _check_words(self.words, self._width, self.leaf.shape[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_leaf": None}

    # --- on disk ---

    def tensors(self) -> dict[str, Tensor]:
        return {**super().tensors(), "inputs": self.words}

    @classmethod
    def from_tensors(cls, description: Description, tensors: dict[str, Tensor]) -> Selected:
        rest = dict(tensors)
        words = rest.pop("inputs", None)
        if words is None:
            raise MatrixError("a selected matrix has a tensor inputs, and there is none")
        parts = cls._parts_of(description, rest)
        if len(parts) != 1:
            raise MatrixError(f"a selected matrix has one part, got {len(parts)}")
        leaf, width = parts[0], described_shape(description)[1]
        _check_words(words, width, leaf.shape[1])
        return cls(leaf, _from_words(words, width))

    @classmethod
    def of(cls, weight: Tensor, inputs: Tensor) -> Selected:
        """The columns ``inputs`` (bool ``(in,)``) of ``weight`` ``(out, in)``, as a trainable leaf."""
        return cls(Dense(weight[:, inputs].contiguous()), inputs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.leaf.shape[1]} inputs read"


def _to_words(inputs: Tensor) -> Tensor:
    count = padded_size(-(-len(inputs) // GROUP) * 8) * 8
    padded = torch.zeros(count, dtype=torch.bool)
    padded[: len(inputs)] = inputs
    return torch.from_numpy(pack_bits(padded.numpy()[None])[0]).view(torch.int64)


def _from_words(words: Tensor, width: int) -> Tensor:
    bits = unpack_bits(words.view(torch.uint8).numpy()[None])[0]
    return torch.from_numpy(bits[:width].copy())


def _check_words(words: Tensor, width: int, count: int) -> None:
    """Raises MatrixError unless ``words`` are whole and select ``count`` of ``width`` inputs."""
    size = padded_size(-(-width // GROUP) * 8) // 8
    if words.dtype != torch.int64 or tuple(words.shape) != (size,):
        raise MatrixError(
            f"the inputs of {width} are {size} int64 words, got {words.dtype} {tuple(words.shape)}"
        )
    bits = unpack_bits(words.contiguous().view(torch.uint8).numpy()[None])[0]
    if bits[width:].any():
        raise MatrixError(f"inputs past the {width} that there are are selected: the matrix is damaged")
    if int(bits.sum()) != count:
        raise MatrixError(f"{int(bits.sum())} inputs are selected for a leaf of {count}")
