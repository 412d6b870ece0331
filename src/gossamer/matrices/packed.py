"""Packed: the leaf whose bytes a kernel reads, the same in memory and on disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from gossamer import kernels
from gossamer.errors import MatrixError
from gossamer.kernels import reference
from gossamer.matrices.bitfields import pack_bits
from gossamer.matrices.blocks import BlockDiagonal
from gossamer.matrices.compose import Composite
from gossamer.matrices.dense import Dense
from gossamer.matrices.geometry import (
    GROUP,
    SECTION_DTYPES,
    Array,
    grid,
    mask_bytes,
    output_counts,
    parse_layout,
    shape_of,
    to_stream,
)
from gossamer.matrices.inference import Leaf, Stages, Term, product
from gossamer.matrices.layouts import (
    Unpacked,
    choose_layout,
    pack_sections,
    packed_bytes,
    unpack_sections,
)
from gossamer.matrices.matrix import Description, Matrix, check_target, described_shape
from gossamer.matrices.rows import dense_rows
from gossamer.matrices.sparse import Sparse
from gossamer.matrices.validation import check_sections
from gossamer.matrices.values import Quantized, ValueType, check_group, quantize, value_type


class Packed(Matrix, kind="packed"):
    """A weight in packed sections (docs/architecture.md), which are its buffers ``values``, ``masks``,
    ``scales`` and ``offsets`` (None where the layout or the values have none).

    Not trainable; gradients flow through it to the activations. ``module.to(dtype)`` leaves it as it is:
    its bytes are its meaning. Integer values multiply int8 activations, bfloat16 ones bfloat16 activations.
    The sections are checked when the matrix is made and when a state dict is loaded.
    """

    values: Tensor
    masks: Tensor | None
    scales: Tensor | None
    offsets: Tensor | None
    _leaf: Leaf | None

    def __init__(
        self,
        sections: dict[str, Tensor],
        *,
        layout: str,
        values: str,
        shape: tuple[int, int],
        group: int = GROUP,
        clamped: int = 0,
    ) -> None:
        super().__init__()
        self.layout = parse_layout(layout).name
        self.value_type = value_type(values)
        self.group = group
        self.clamped = clamped
        self._shape = (int(shape[0]), int(shape[1]))
        check_sections(sections, self.value_type, layout, self._shape, group)
        for name in SECTION_DTYPES:
            self.register_buffer(name, sections.get(name))
        self._forget()

    # --- making ---

    @classmethod
    def pack(
        cls,
        weight: Matrix | Tensor | Quantized,
        values: str | None = None,
        layout: str = "auto",
        group: int | None = None,
        mask: Tensor | None = None,
        *,
        importance: Tensor | None = None,
    ) -> Packed:
        """A Dense or Sparse leaf, a tensor ``(out, in)`` or codes with their scales, as a packed leaf.

        ``values``: one of `VALUES`, such as bfloat16 or nl3 (default: int4, or the codes' own); ``layout``:
        dense, columns, bitmap, 16x4, n:64, or ``auto`` (:func:`choose_layout`); ``group``: inputs a scale, 64
        (default) or 32; ``mask``: bool, True = kept (default: the leaf's own, or all).
        Floats become integers by rounding to nearest under scales of least squared error, weighted by
        ``importance`` (``(in,)``, the Gram diagonal). The layouts dense and columns keep pruned
        weights as zeros and forget the mask. Raises MatrixError, on NaN weights too.
        """
        if isinstance(weight, Matrix):
            weight, own = _leaf(weight)
            mask = own if mask is None else mask
        if isinstance(weight, Quantized):
            kind, group = _same_format(weight, values, group)
            quantized: Quantized | None = weight
            plain = weight.q
        else:
            kind = value_type(values or "int4")
            group = GROUP if group is None or not kind.is_integer else group
            check_target(weight, None)
            plain = weight.detach()
            quantized = quantize(plain.float(), kind, group, mask, importance) if kind.is_integer else None
            plain = plain if quantized is None else quantized.q
        if layout == "auto":
            layout = choose_layout(mask, kind)
        scales = None if quantized is None else quantized.scales
        sections = pack_sections(plain, kind, layout, mask=mask, scales=scales, group=group)
        return cls(
            sections,
            layout=layout,
            values=kind.name,
            shape=shape_of(plain),
            group=group,
            clamped=0 if quantized is None else quantized.clamped,
        )

    @classmethod
    def fit(cls, target: Tensor, gram: Tensor | None = None, **structure: Any) -> Packed:
        """Round to nearest, scales weighted by the Gram diagonal; ``structure``: as :meth:`pack`."""
        check_target(target, gram)
        importance = None if gram is None else gram.diagonal().float().clamp_min(0)
        return cls.pack(target, importance=importance, **structure)

    @classmethod
    def from_tensors(cls, description: Description, tensors: dict[str, Tensor]) -> Packed:
        layout, values = description.get("layout"), description.get("values")
        group, clamped = description.get("group", GROUP), description.get("clamped", 0)
        if not isinstance(layout, str) or not isinstance(values, str):
            raise MatrixError(f"a packed weight names its layout and values, got {layout!r} and {values!r}")
        if type(group) is not int or type(clamped) is not int:
            raise MatrixError(f"group and clamped are integers, got {group!r} and {clamped!r}")
        check_group(group)
        shape = described_shape(description)
        return cls(tensors, layout=layout, values=values, shape=shape, group=group, clamped=clamped)

    def repack(self, layout: str) -> Packed:
        """The same weight in another layout: float values bit for bit, integer codes and scales exactly, so
        that integer products are equal bit for bit.

        A sparse ``layout`` keeps the mask; ``dense`` and ``columns`` store pruned weights as zeros and forget
        that they were pruned. Raises MatrixError where ``layout`` has no room for the mask.
        """
        plain = self.unpack()
        sections = pack_sections(
            plain.weight, self.value_type, layout, mask=plain.mask, scales=plain.scales, group=self.group
        )
        return Packed(
            sections,
            layout=layout,
            values=self.values_name,
            shape=self._shape,
            group=self.group,
            clamped=self.clamped,
        )

    # --- what it is ---

    @property
    def values_name(self) -> str:
        """The number format, one of `VALUES`."""
        return self.value_type.name

    @property
    def shape(self) -> tuple[int, int]:
        return self._shape

    def tensors(self) -> dict[str, Tensor]:
        held = ((name, getattr(self, name)) for name in SECTION_DTYPES)
        return {name: section for name, section in held if section is not None}

    def describe(self) -> Description:
        """Layout, values, and for integers the group and how many scales were clamped."""
        description = {**super().describe(), "layout": self.layout, "values": self.value_type.name}
        if self.value_type.is_integer:
            description |= {"group": self.group, "clamped": self.clamped}
        return description

    def unpack(self) -> Unpacked:
        """The weight (or codes q) ``(out, in)``, its mask (None: all kept) and scales, exactly as packed."""
        return unpack_sections(self.tensors(), self.value_type, self.layout, self._shape, self.group)

    def quantized(self) -> Quantized:
        """Codes and scales of integer values; raises MatrixError for floats."""
        plain = self.unpack()
        if plain.scales is None:
            raise MatrixError(f"{self.value_type.name} values have no codes: use unpack")
        return Quantized(plain.weight, plain.scales, self.group, self.value_type, self.clamped)

    def mask(self) -> Tensor:
        """bool ``(out, in)``, True = kept (all of it in the layouts dense and columns)."""
        mask = self.unpack().mask
        return torch.ones(self._shape, dtype=torch.bool) if mask is None else mask

    @property
    def kept(self) -> int:
        out, width = self._shape
        counts = self._counts()
        return out * width if counts is None else int(counts.sum())

    @property
    def most_kept(self) -> int:
        """The most weights that one output keeps of a group of 64 inputs: the least n of an n:64 layout that
        holds the mask (64 where there is none)."""
        counts = self._counts()
        return GROUP if counts is None else int(counts.max())

    def _counts(self) -> Array | None:
        """How many weights each output of each panel-group keeps, or None where there is no mask."""
        if self.masks is None:
            return None
        kind = parse_layout(self.layout)
        if kind.unit > 1:  # a step's bit stands for the padding in it too
            return output_counts(pack_bits(to_stream(self.mask(), self._shape, 0).numpy()))
        panels, groups = grid(self._shape)
        return output_counts(mask_bytes(self.masks, kind, panels * groups))

    def to_dense(self) -> Tensor:
        """float32 ``(out, in)``."""
        if self.value_type.is_integer:
            return self.quantized().to_dense()
        return self.unpack().weight.float()

    def transpose(self) -> Matrix:
        """Wᵀ as a float32 Dense, or Sparse with the same mask; not trainable. Scales run along inputs, so
        integers have no exact transpose in their own format."""
        if self.masks is None:
            return Dense(self.to_dense().T.contiguous(), trainable=False)
        return Sparse(self.mask().T.contiguous(), self.to_dense().T.contiguous(), trainable=False)

    def rows(self, index: Tensor) -> Tensor:
        """float32 rows; from the dense layout's bytes alone, else from the unpacked whole."""
        if self.layout != "dense":
            return self.to_dense()[index]
        flat = dense_rows(self.tensors(), self.value_type, self._shape, self.group, index.reshape(-1))
        return flat.reshape(*index.shape, self._shape[1])

    def extra_repr(self) -> str:
        group = f", group {self.group}" if self.value_type.is_integer else ""
        return f"{super().extra_repr()}, {self.layout}, {self.value_type.name}{group}"

    # --- multiplying ---

    def matmul(self, x: Tensor) -> Tensor:
        self._check_inputs(x)
        leaf = self.leaf()
        return product(leaf if isinstance(leaf, kernels.Handle) else [[(leaf, 1, -1)]], x, self)

    @property
    def is_packed(self) -> bool:
        return True

    def terms(self, source: int, stages: Stages) -> list[Term]:
        return [(self.leaf(), 1, source)]

    def leaf(self) -> Leaf:
        """This weight as kernels hold it or, where they are missing, as their reference takes it."""
        if self._leaf is None:
            if kernels.native_available():
                self._leaf = kernels.make_handle(
                    self.layout, self.value_type.name, *self._shape, self.group, self.tensors()
                )
            else:
                plain = self.unpack()
                self._leaf = reference.Weight(plain.weight, plain.scales, self.group)
        return self._leaf

    def _forget(self) -> None:
        """Drops what was derived from the buffers: they moved, or hold other bytes."""
        self._leaf = None

    # --- being a module ---

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        def keep_dtype(tensor: Tensor) -> Tensor:
            changed = fn(tensor)
            return changed if changed.dtype == tensor.dtype else tensor.to(changed.device)

        super()._apply(keep_dtype, recurse)  # type: ignore[no-untyped-call]
        self._forget()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        own = {name: tuple(section.shape) for name, section in self.tensors().items()}
        names = [name for name in SECTION_DTYPES if f"{prefix}{name}" in state_dict]
        given = {name: tuple(state_dict[f"{prefix}{name}"].shape) for name in names}
        if given and given != own:
            place = prefix.rstrip(".") or "the weight"
            raise MatrixError(
                f"{place} is {self.values_name} in the layout {self.layout}, with "
                f"sections {_sizes(own)}, and the state has {_sizes(given)}: it was packed in another format "
                "or under another mask; pack this layer as that one was"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._forget()
        if not self.values.is_meta:
            check_sections(self.tensors(), self.value_type, self.layout, self._shape, self.group)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_leaf": None}


def _sizes(sections: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sections.items())


def _leaf(matrix: Matrix) -> tuple[Tensor, Tensor | None]:
    """The weight and mask of one leaf."""
    if isinstance(matrix, Packed):
        return matrix.to_dense(), matrix.unpack().mask
    if isinstance(matrix, Sparse):
        return matrix.to_dense(), matrix.mask
    if isinstance(matrix, Dense):
        return matrix.to_dense(), None
    raise MatrixError(f"a {matrix.kind} is not one leaf: use pack_tree")


def _same_format(quantized: Quantized, values: str | None, group: int | None) -> tuple[ValueType, int]:
    """The format of ``quantized``; raises MatrixError where another one is asked for."""
    kind = quantized.values
    if values not in (None, kind.name) or group not in (None, quantized.group):
        raise MatrixError(
            f"the codes are {kind.name} in groups of {quantized.group}, but {values or kind.name} in groups "
            f"of {group or quantized.group} was asked for: quantize the weight itself"
        )
    return kind, quantized.group


def pack(
    weight: Matrix | Tensor | Quantized,
    values: str | None = None,
    layout: str = "auto",
    group: int | None = None,
    mask: Tensor | None = None,
    *,
    importance: Tensor | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Any:
    """`Packed.pack` of one weight, `pack_tree` of a matrix made of others: a Packed, or a tree of them.

    ``mask`` is for one weight, ``overrides`` for a tree; raises MatrixError for the other way round too.
    """
    if isinstance(weight, Composite):
        if mask is not None:
            raise MatrixError(f"a {weight.kind} has no one mask: its Sparse leaves bring their own")
        return pack_tree(weight, values, layout, group, importance=importance, overrides=overrides)
    if overrides:
        raise MatrixError("overrides are for the leaves of a sum, product or block-diagonal matrix")
    return Packed.pack(weight, values, layout, group, mask, importance=importance)


def pack_tree(
    matrix: Matrix,
    values: str | None = None,
    layout: str = "auto",
    group: int | None = None,
    *,
    importance: Tensor | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
) -> Matrix:
    """``matrix`` with every Dense and Sparse leaf packed; leaves that are packed stay as they are.

    ``values``, ``layout``, ``group``: as `Packed.pack`, for every leaf; ``importance``: ``(in,)``, for the
    leaves that see the activations themselves (in a product: the last). ``overrides``: other values, layout
    or group for some leaves, by the numbers of the parts that lead to them: ``{"0.1": {"values": "int8"}}``
    for the second part of the first one, ``{"0": ...}`` for all leaves of the first. Blocks that do not end
    with a panel of 16 outputs become one sparse leaf; dense leaves with fewer inputs than a group lie in 16x4
    where that saves their padding. Raises MatrixError as `Packed.pack` does, and for an override that leads
    nowhere.
    """
    overrides = overrides or {}
    used = set()

    def visit(matrix: Matrix, place: str, options: dict[str, Any], importance: Tensor | None) -> Matrix:
        if place in overrides:
            used.add(place)
            options = {**options, **overrides[place]}
        if isinstance(matrix, BlockDiagonal):
            matrix = matrix.packable()
        if isinstance(matrix, Packed):
            return matrix
        if not isinstance(matrix, Composite):
            if place and options["layout"] == "auto" and isinstance(matrix, Dense):
                options = {**options, "layout": _factor_layout(matrix.shape, options["values"])}
            return Packed.pack(matrix, **options, importance=importance)
        whole = matrix

        def change(index: int, part: Matrix) -> Matrix:
            seen = None if importance is None else whole.part_importance(index, importance)
            return visit(part, f"{place}.{index}" if place else f"{index}", options, seen)

        return whole.map_parts(change)

    packed = visit(matrix, "", {"values": values, "layout": layout, "group": group}, importance)
    if unused := set(overrides) - used:
        raise MatrixError(f"overrides lead to no part: {', '.join(sorted(unused))}")
    return packed


def _factor_layout(shape: tuple[int, int], values: str | None) -> str:
    """How a dense leaf of a tree lies: with fewer inputs than a group in 16x4, which leaves out the padding,
    where that takes fewer bytes (1 to 7 % faster in all for a rank of 32: benchmarks/composites.py)."""
    if shape[1] >= GROUP:
        return "dense"
    kept, kind = torch.ones(shape, dtype=torch.bool), value_type(values or "int4")
    return min(("dense", "16x4"), key=lambda layout: packed_bytes(kept, kind, layout))
