"""How a matrix becomes a weight under tuning, and how the tuned one is packed again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ModelError, PatternError
from gossamer.matrices import Dense, Matrix, Packed, Sparse
from gossamer.matrices.geometry import GROUP
from gossamer.matrices.values import quantize, value_type
from gossamer.sparse import NM, Block, Channel, Pattern, check_mask, mask_from_scores
from gossamer.tune.weights import TunedWeight


@dataclass(frozen=True)
class Format:
    """``layout``, ``values`` and ``group`` of the packed result; ``values`` None: a plain Dense or Sparse."""

    layout: str
    values: str | None
    group: int

    @classmethod
    def of(cls, matrix: Matrix, values: str | None = None, group: int | None = None) -> Format:
        """That of ``matrix``, or, with other ``values`` or another ``group``, these in the layout of the
        fewest bytes."""
        if not isinstance(matrix, Packed):
            return cls("auto", None if values is None else value_type(values).name, group or GROUP)
        same = cls(matrix.layout, matrix.values_name, matrix.group)
        wanted = value_type(values or same.values or "")
        if wanted.name == same.values and group in (None, same.group):
            return same
        return cls("auto", wanted.name, group or (matrix.group if wanted.is_integer else GROUP))

    def begin(
        self,
        matrix: Matrix,
        kind: type[TunedWeight] = TunedWeight,
        options: Mapping[str, Any] | None = None,
        *,
        mask: Tensor | None = None,
        zeros_stay: bool = False,
    ) -> TunedWeight:
        """``matrix`` under tuning: with its own codes where it has the same format, else rounded to it.
        ``mask``: bool ``(out, in)``, True = kept, where its layout may not keep it; ``zeros_stay``: its zeros
        are pruned weights, where nothing else says which are. A ``kind`` with the option ``pattern`` takes
        that of the mask where ``options`` name none.

        Raises ModelError for a matrix made of others, and for a ``mask`` that is not the matrix's.
        """
        if not isinstance(matrix, (Packed, Dense, Sparse)):
            raise ModelError(f"a {matrix.kind} is made of other matrices, and cannot be tuned yet")
        weight = matrix.to_dense().detach().float()
        own = matrix.unpack().mask if isinstance(matrix, Packed) else getattr(matrix, "mask", None)
        if mask is not None:
            _check_agrees(mask, own, weight)
        elif own is None and zeros_stay:
            mask = weight != 0
        else:
            mask = own
        options = options or {}
        if mask is not None and kind.has_pattern() and "pattern" not in options:
            pattern = pattern_of(mask)
            options = kind.within(None if pattern is None else str(pattern), options)
        chosen = kind.chosen(options)
        wanted = None if self.values is None else value_type(self.values)
        if wanted is None or not wanted.is_integer:
            return kind(weight, mask, None, chosen)
        same = isinstance(matrix, Packed) and (matrix.values_name, matrix.group) == (wanted.name, self.group)
        if isinstance(matrix, Packed) and same:
            return kind(weight, mask, matrix.quantized(), chosen)
        return kind(weight, mask, quantize(weight, wanted, self.group, mask), chosen)

    def finish(self, weight: TunedWeight) -> Matrix:
        """The tuned weight as a matrix of this format."""
        (plain, codes), mask = weight.finished(), weight.final_mask()
        layout = "auto" if weight.frees_masks else self.layout
        if codes is not None:
            return Packed.pack(codes, layout=layout, mask=mask)
        if self.values is not None:
            return Packed.pack(plain, self.values, layout, mask=mask)
        return Dense(plain) if mask is None else Sparse(mask, plain)


def pattern_of(mask: Tensor) -> Pattern | None:
    """The N:M of the fewest inputs a group that ``mask`` bool ``(out, in)`` keeps exactly, else the steps of
    16x4 or the channels that it keeps whole; None where there is none, as of an unstructured mask."""
    if not mask.any() or mask.all():
        return None
    for m in range(2, min(64, mask.shape[1]) + 1):
        n = int(mask[0, :m].sum())
        # the first row first, which rules out nearly all
        if 0 < n < m and all(
            torch.equal(mask_from_scores(rows.float(), NM(n, m)), rows) for rows in (mask[:1], mask)
        ):
            return NM(n, m)
    return next((p for p in (Block(16, 4), Channel(0), Channel(1)) if _holds(mask, p)), None)


def _holds(mask: Tensor, pattern: Pattern) -> bool:
    try:
        check_mask(mask, pattern)
    except PatternError:
        return False
    return True


def _check_agrees(mask: Tensor, own: Tensor | None, weight: Tensor) -> None:
    """Raises ModelError unless ``mask`` is the ``own`` one of a weight, or where it has none prunes zeros."""
    if mask.dtype != torch.bool or mask.shape != weight.shape:
        raise ModelError(
            f"the mask of a weight {tuple(weight.shape)} is bool, got {mask.dtype} {tuple(mask.shape)}"
        )
    if own is not None and not torch.equal(mask, own):
        raise ModelError("the mask given is another one than the layer's own")
    if own is None and bool((weight[~mask] != 0).any()):
        raise ModelError("the mask given prunes weights that are not zero in the packed layer")
