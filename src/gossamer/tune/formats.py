"""How a matrix becomes a weight under tuning, and how the tuned one is packed again."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.errors import ModelError
from gossamer.matrices import Dense, Matrix, Packed, Sparse
from gossamer.matrices.geometry import GROUP
from gossamer.matrices.values import quantize, value_type
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
        options: object = None,
        *,
        zeros_stay: bool = False,
    ) -> TunedWeight:
        """``matrix`` under tuning: with its own codes where it has the same format, else rounded to it.
        ``zeros_stay``: its zeros are pruned weights, where its layout keeps no mask.

        Raises ModelError for a matrix made of others.
        """
        if not isinstance(matrix, (Packed, Dense, Sparse)):
            raise ModelError(f"a {matrix.kind} is made of other matrices, and cannot be tuned yet")
        weight = matrix.to_dense().detach().float()
        mask = matrix.unpack().mask if isinstance(matrix, Packed) else getattr(matrix, "mask", None)
        if mask is None and zeros_stay:
            mask = weight != 0
        wanted = None if self.values is None else value_type(self.values)
        if wanted is None or not wanted.is_integer:
            return kind(weight, mask, None, options)
        own = isinstance(matrix, Packed) and (matrix.values_name, matrix.group) == (wanted.name, self.group)
        if isinstance(matrix, Packed) and own:
            return kind(weight, mask, matrix.quantized(), options)
        return kind(weight, mask, quantize(weight, wanted, self.group, mask), options)

    def finish(self, weight: TunedWeight) -> Matrix:
        """The tuned weight as a matrix of this format."""
        (plain, codes), mask = weight.finished(), weight.final_mask()
        layout = "auto" if weight.frees_masks else self.layout
        if codes is not None:
            return Packed.pack(codes, layout=layout, mask=mask)
        if self.values is not None:
            return Packed.pack(plain, self.values, layout, mask=mask)
        return Dense(plain) if mask is None else Sparse(mask, plain)
