"""The one check of a packed weight, before any kernel touches a byte of it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import MatrixError
from gossamer.matrices.bitfields import unpack_bits
from gossamer.matrices.geometry import (
    ENTRIES,
    GROUP,
    PANEL,
    SECTION_DTYPES,
    Array,
    Layout,
    check_holds,
    check_room,
    grid,
    mask_bytes,
    output_counts,
    padded_size,
    parse_layout,
    section_names,
    value_bytes,
)
from gossamer.matrices.values import ValueType, check_group


def check_sections(
    sections: dict[str, Tensor], values: ValueType, layout: str, shape: tuple[int, int], group: int = GROUP
) -> None:
    """Raises MatrixError unless the sections are whole and agree: names, dtypes, sizes, finite scales, no
    kept weight in the padding, every panel-group's popcount against the layout's room or the offsets."""
    kind = parse_layout(layout)
    check_holds(kind, values)
    panels, groups = grid(shape, kind.outputs)
    names = section_names(values, kind)
    if set(sections) != set(names):
        raise MatrixError(f"a {layout} weight of {values.name} has sections {names}, got {sorted(sections)}")
    for name in names:
        part = sections[name]
        if part.dtype != SECTION_DTYPES[name] or part.dim() != 1 or not part.is_contiguous():
            raise MatrixError(
                f"the section {name} is flat {SECTION_DTYPES[name]}, got {part.dtype} {tuple(part.shape)}"
            )
    count = panels * groups
    if values.is_integer:
        check_group(group)
        _check_size("scales", sections["scales"], count * (GROUP // group) * PANEL * 2)
        if not bool(torch.isfinite(sections["scales"]).all()):
            raise MatrixError("the scales hold NaN or infinity: the weight is damaged")
    counts = np.empty(0)
    if kind.sparse:
        _check_size("masks", sections["masks"], count * ENTRIES // kind.unit // 8)
        counts = _check_masks(sections["masks"], kind, shape)
    if kind.room is None:
        ends = np.cumsum(value_bytes(counts, values).reshape(panels, groups).sum(axis=1))
        _check_size("offsets", sections["offsets"], 8 * (panels + 1))
        offsets = sections["offsets"].numpy()[: panels + 1]
        if offsets[0] != 0 or not np.array_equal(offsets[1:], ends):
            raise MatrixError("the offsets disagree with the masks' popcounts: the weight is damaged")
        size = int(ends[-1])
    else:
        size = count * int(value_bytes(np.array([kind.room]), values)[0])
    _check_size("values", sections["values"], size)


def _check_size(name: str, section: Tensor, used: int) -> None:
    size = padded_size(used)
    held = section.numel() * section.element_size()
    if held != size:
        raise MatrixError(f"the section {name} holds {held} bytes where the shape and masks ask for {size}")


def _check_masks(masks: Tensor, layout: Layout, shape: tuple[int, int]) -> Array:
    """The popcounts of all panel-groups; raises MatrixError on kept padding or too many kept."""
    panels, groups = grid(shape)
    packed = mask_bytes(masks, layout, panels * groups)
    if layout.unit > 1:
        steps = unpack_bits(packed)
        real = -(-(shape[1] - GROUP * (groups - 1)) // 4)
        if steps.reshape(panels, groups, -1)[:, -1, real:].any():
            raise MatrixError("the masks keep steps outside the shape: the weight is damaged")
        return np.asarray(layout.unit * steps.sum(axis=1, dtype=np.int64))
    kept = output_counts(packed)
    if layout.room is not None:
        check_room(kept, layout, shape)
    ragged_out, ragged_in = shape[0] % PANEL, shape[1] % GROUP
    outside = bool(ragged_out) and bool(kept.reshape(panels, groups, PANEL)[-1, :, ragged_out:].any())
    if ragged_in:
        last = unpack_bits(packed.reshape(panels, groups, -1)[:, -1]).reshape(panels, GROUP // 4, PANEL, 4)
        outside |= bool(last.transpose(0, 2, 1, 3).reshape(panels, PANEL, GROUP)[:, :, ragged_in:].any())
    if outside:
        raise MatrixError("the masks keep weights outside the shape: the weight is damaged")
    return np.asarray(kept.sum(axis=1, dtype=np.int64))
