"""Packed layouts: weights to section bytes and back, exactly as docs/architecture.md draws them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import MatrixError
from gossamer.matrices.bitfields import pack_bits, pack_codes, unpack_bits, unpack_codes
from gossamer.matrices.columns import order_scales, pack_columns, plain_scales, unpack_columns
from gossamer.matrices.geometry import (
    ENTRIES,
    GROUP,
    PANEL,
    SECTION_DTYPES,
    STEP,
    Array,
    Layout,
    check_holds,
    check_room,
    from_stream,
    grid,
    mask_bytes,
    output_counts,
    padded_size,
    parse_layout,
    shape_of,
    to_stream,
    value_bytes,
)
from gossamer.matrices.values import ValueType, check_group, overflows


@dataclass(frozen=True)
class Unpacked:
    """What :func:`unpack_sections` gives back.

    ``weight``: ``(out, in)`` float32, bfloat16 or int8 codes q, 0 where pruned; ``mask``: bool like it, or
    None (dense: all kept); ``scales``: float16 ``(out, ceil(in / group))``, or None for floats.
    """

    weight: Tensor
    mask: Tensor | None
    scales: Tensor | None


def pack_sections(
    weight: Tensor,
    values: ValueType,
    layout: str,
    *,
    mask: Tensor | None = None,
    scales: Tensor | None = None,
    group: int = GROUP,
) -> dict[str, Tensor]:
    """The sections of a packed weight: flat tensors by name, as they lie in memory and on disk.

    ``weight``: ``(out, in)``, floats for float values (bfloat16 rounds to nearest even), integer codes q
    for integer ones; ``mask``: bool like it, True = kept (None: all); ``scales``: float16
    ``(out, ceil(in / group))``, integer values only. The layouts dense and columns hold pruned weights as
    zeros and forget that they were pruned. Raises MatrixError where shapes, codes or layout do not fit.
    """
    kind = parse_layout(layout)
    check_holds(kind, values)
    shape = shape_of(weight)
    if mask is not None and (tuple(mask.shape) != shape or mask.dtype != torch.bool):
        raise MatrixError(f"the mask is bool {shape} like the weight, got {mask.dtype} {tuple(mask.shape)}")
    stored = _to_stored(weight, values)
    if mask is not None:
        stored = torch.where(mask, stored, _zero(values))
    sections: dict[str, Tensor] = {}
    if kind.by_columns:
        sections["values"] = _section(pack_columns(stored, values, _zero(values)).numpy())
    elif not kind.sparse:
        stream = to_stream(stored, shape, _zero(values)).numpy()
        sections["values"] = _section(_pack_values(stream, None, values))
    else:
        stream = to_stream(stored, shape, _zero(values)).numpy()
        kept = torch.ones(shape, dtype=torch.bool) if mask is None else mask
        bits, masks = _mask_bits(kept, kind)
        counts = bits.sum(axis=1, dtype=np.int64)
        if kind.room is None:
            packed = _pack_values(stream[bits], counts, values)
            sizes = value_bytes(counts, values).reshape(grid(shape)).sum(axis=1)
            sections["offsets"] = _section(np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))
        else:
            check_room(output_counts(masks), kind, shape)
            room = np.full((len(stream), kind.room), _zero(values), dtype=stream.dtype)
            room[np.arange(kind.room) < counts[:, None]] = stream[bits]
            packed = _pack_values(room, None, values)
        sections["values"] = _section(packed)
        sections["masks"] = _section(masks.reshape(-1)).view(torch.int64)
    if values.is_integer:
        sections["scales"] = _pack_scales(scales, shape, group, kind)
    elif scales is not None:
        raise MatrixError(f"{values.name} values have no scales")
    return {name: sections[name] for name in SECTION_DTYPES if name in sections}


def unpack_sections(
    sections: dict[str, Tensor], values: ValueType, layout: str, shape: tuple[int, int], group: int = GROUP
) -> Unpacked:
    """The inverse of :func:`pack_sections`: kept float values bit for bit, integer codes exactly.

    The sections must have passed :func:`gossamer.matrices.validation.check_sections`.
    """
    kind = parse_layout(layout)
    scales = _unpack_scales(sections["scales"], shape, group, kind) if values.is_integer else None
    if kind.by_columns:
        plain = unpack_columns(sections["values"], values, shape)
        return Unpacked(_from_stored(plain, values), None, scales)
    count = grid(shape)[0] * grid(shape)[1]
    stored = sections["values"].numpy()
    mask = None
    if kind.room is not None:
        size = int(value_bytes(np.array([kind.room]), values)[0])
        dense = _unpack_values(stored[: count * size].reshape(count, size), kind.room, values)
    if kind.sparse:
        bits = unpack_bits(mask_bytes(sections["masks"], kind, count)).repeat(kind.unit, axis=1)
        mask = from_stream(torch.from_numpy(bits), shape)
        stream = np.full((count, ENTRIES), _zero(values), dtype=_stored_dtype(values))
        counts = bits.sum(axis=1, dtype=np.int64)
        if kind.room is None:
            stream[bits] = _unpack_values(stored, counts, values)
        else:
            stream[bits] = dense[np.arange(kind.room) < counts[:, None]]
    else:
        stream = dense
    weight = _from_stored(from_stream(torch.from_numpy(stream), shape), values)
    return Unpacked(weight, mask, scales)


def choose_layout(mask: Tensor | None, values: ValueType) -> str:
    """The layout that holds ``mask`` bool ``(out, in)`` (None: all kept) in the fewest bytes.

    ``16x4`` where it prunes whole steps of 16 outputs x 4 inputs; else ``n:64`` where every output keeps
    exactly n of each full group of 64 inputs, and at most n of a ragged last one (a 2:4 mask is a valid
    32:64); else ``bitmap``; and ``dense`` where nothing is pruned or where the sparse layout would take no
    fewer bytes.
    """
    if mask is None or bool(mask.all()):
        return "dense"
    shape = shape_of(mask)
    full = shape[1] - shape[1] % GROUP
    kept = mask[:, :full].reshape(shape[0], -1, GROUP).sum(dim=2)
    choice = "bitmap"
    if keeps_whole_steps(mask):
        choice = "16x4"
    elif full and 0 < int(kept.min()) == int(kept.max()) < GROUP:
        n = int(kept[0, 0])
        if int(mask[:, full:].sum(dim=1).max()) <= n:
            choice = f"{n}:64"
    return choice if packed_bytes(mask, values, choice) < packed_bytes(mask, values, "dense") else "dense"


def packed_bytes(mask: Tensor, values: ValueType, layout: str, group: int = GROUP) -> int:
    """Bytes of all sections that :func:`pack_sections` would make for ``mask`` bool ``(out, in)``."""
    kind = parse_layout(layout)
    shape = shape_of(mask)
    stored = 0
    if kind.room is None:
        counts = _mask_bits(mask, kind)[0].sum(axis=1)
        stored = int(value_bytes(counts, values).sum())
    return sum(_section_bytes(shape, values, kind, group, stored).values())


def most_bytes(
    shape: tuple[int, int], kept: int, values: ValueType, layout: str, group: int = GROUP
) -> dict[str, int]:
    """Bytes of each section of a weight ``(out, in)`` that keeps ``kept`` weights, known without its mask.

    Exact where the room is fixed (dense, columns, n:64); else at most so many: counts of panel-groups may all
    round up in a bitmap, and 16x4 is taken to keep whole steps.
    """
    kind = parse_layout(layout)
    panels, groups = grid(shape, kind.outputs)
    counts = np.arange(8) * kind.unit
    worst = float((value_bytes(counts, values) - counts * values.bits / 8).max())
    stored = math.floor(kept * values.bits / 8 + worst * panels * groups)
    return _section_bytes(shape, values, kind, group, stored)


def _section_bytes(
    shape: tuple[int, int], values: ValueType, kind: Layout, group: int, stored: int
) -> dict[str, int]:
    """Bytes by section; ``stored``: of values, where the layout does not fix them."""
    panels, groups = grid(shape, kind.outputs)
    if kind.room is not None:
        stored = int(value_bytes(np.array([kind.room]), values)[0]) * panels * groups
    sizes = {"values": stored}
    if kind.sparse:
        sizes["masks"] = panels * groups * ENTRIES // kind.unit // 8
    if values.is_integer:
        sizes["scales"] = panels * groups * (GROUP // group) * PANEL * 2
    if kind.room is None:
        sizes["offsets"] = 8 * (panels + 1)
    return {name: padded_size(size) for name, size in sizes.items()}


def keeps_whole_steps(mask: Tensor) -> bool:
    """Whether bool ``(out, in)`` keeps or prunes each step of 16 outputs x 4 inputs as a whole."""
    steps, real = _steps(mask), _steps(torch.ones_like(mask))
    return bool(((steps == 0) | (steps == real)).all())


def _steps(mask: Tensor) -> Tensor:
    """How many weights of each step are kept: ``(panel_groups, 16)``."""
    return to_stream(mask, shape_of(mask), 0).reshape(-1, ENTRIES // STEP, STEP).sum(dim=2)


def _mask_bits(mask: Tensor, kind: Layout) -> tuple[Array, Array]:
    """Which entries of each panel-group are stored, bool ``(panel_groups, 1024)``, and the mask bytes."""
    if kind.unit == 1:
        bits = to_stream(mask, shape_of(mask), 0).numpy()
        return bits, pack_bits(bits)
    if not keeps_whole_steps(mask):
        raise MatrixError("the layout 16x4 keeps or prunes whole steps of 16 outputs x 4 inputs")
    steps = (_steps(mask) > 0).numpy()
    return steps.repeat(kind.unit, axis=1), pack_bits(steps)


def _zero(values: ValueType) -> int:
    return values.zero_code if values.is_integer else 0


def _stored_dtype(values: ValueType) -> Any:
    return {32: np.int32, 16: np.int16}.get(values.bits, np.uint8)


def _to_stored(weight: Tensor, values: ValueType) -> Tensor:
    """Floats as their bit patterns (int32, int16), integers as their codes (uint8)."""
    weight = weight.detach()
    if not values.is_integer:
        if not weight.is_floating_point():
            raise MatrixError(f"{values.name} values are packed from floats, got {weight.dtype}")
        patterns = torch.int32 if values.bits == 32 else torch.int16
        rounded = weight.to(values.dtype)
        if overflows(weight, rounded):
            raise MatrixError(f"finite weights are too large for {values.name}")
        return rounded.contiguous().view(patterns)
    if weight.is_floating_point() or weight.dtype == torch.bool:
        raise MatrixError(f"{values.name} values are packed from integer codes, got {weight.dtype}")
    if bool((weight < values.qmin).any()) or bool((weight > values.qmax).any()):
        raise MatrixError(f"{values.name} codes lie in [{values.qmin}, {values.qmax}]")
    return values.codes(weight)


def _from_stored(stored: Tensor, values: ValueType) -> Tensor:
    if not values.is_integer:
        return stored.view(values.dtype)
    return values.integers(stored)


def _section(array: Array) -> Tensor:
    """A flat array as a tensor, zero-padded to a multiple of 64 bytes. It is PyTorch's memory, which
    starts at such a multiple (numpy's does not), so that kernels use it in place."""
    flat = torch.from_numpy(np.ascontiguousarray(array).reshape(-1))
    used = flat.numel() * flat.element_size()
    section = torch.zeros(padded_size(used) // flat.element_size(), dtype=flat.dtype)
    section[: flat.numel()] = flat
    return section


def _pack_values(stored: Array, counts: Array | None, values: ValueType) -> Array:
    """Bytes of stored values: ``(panel_groups, room)``, or flat with ``counts`` a panel-group."""
    if values.bits < 8:
        return pack_codes(stored, counts, values.bits)
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def _unpack_values(stored: Array, counts: Array | int, values: ValueType) -> Array:
    """The inverse: ``(panel_groups, room)`` from bytes ``(panel_groups, size)`` where ``counts`` is the room,
    else a flat array of ``sum(counts)`` from a flat one."""
    if values.bits < 8:
        return unpack_codes(stored, counts, values.bits)
    patterns = _stored_dtype(values)
    if isinstance(counts, int):
        return np.ascontiguousarray(stored).view(patterns)
    return stored[: int(counts.sum()) * np.dtype(patterns).itemsize].view(patterns)


def _pack_scales(scales: Tensor | None, shape: tuple[int, int], group: int, kind: Layout) -> Tensor:
    check_group(group)
    panels, groups = grid(shape, kind.outputs)
    wanted = (shape[0], -(-shape[1] // group))
    if scales is None or scales.dtype != torch.float16 or tuple(scales.shape) != wanted:
        got = "none" if scales is None else f"{scales.dtype} {tuple(scales.shape)}"
        raise MatrixError(
            f"the scales of a weight {shape} in groups of {group} are float16 {wanted}, got {got}"
        )
    vectors = GROUP // group
    padded = torch.zeros(panels * PANEL, groups * vectors, dtype=torch.float16)
    padded[: wanted[0], : wanted[1]] = scales.detach()
    if kind.by_columns:
        return _section(order_scales(padded).numpy())
    ordered = padded.reshape(panels, PANEL, groups, vectors).permute(0, 2, 3, 1)
    return _section(ordered.contiguous().numpy())


def _unpack_scales(section: Tensor, shape: tuple[int, int], group: int, kind: Layout) -> Tensor:
    panels, groups = grid(shape, kind.outputs)
    vectors = GROUP // group
    if kind.by_columns:
        plain = plain_scales(section, shape, groups * vectors)
    else:
        used = section[: panels * groups * vectors * PANEL].reshape(panels, groups, vectors, PANEL)
        plain = used.permute(0, 3, 1, 2).reshape(panels * PANEL, groups * vectors)
    return plain[: shape[0], : -(-shape[1] // group)].contiguous()
