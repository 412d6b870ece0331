"""The one geometry of packed weights: panels, groups, storage order, and what each layout holds.

A *stream* is the 1,024 weights of each panel-group in storage order, ``(panel_groups, 1024)``:
weight (output ``16 p + o``, input ``64 g + 4 s + k``) is entry ``e = 64 s + 4 o + k`` of row ``p G + g``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.errors import MatrixError
from gossamer.matrices.values import ValueType

PANEL = 16  # outputs a panel
GROUP = 64  # inputs a panel-group
ENTRIES = PANEL * GROUP
STEP = PANEL * 4  # entries of one step
COLUMN_UNIT = 128  # outputs that the layout columns is padded to
COLUMN_PANEL = 256  # and outputs of its panels
ALIGNMENT = 64  # every section is padded to a multiple of so many bytes
SECTION_DTYPES = {
    "values": torch.uint8,
    "masks": torch.int64,
    "scales": torch.float16,
    "offsets": torch.int64,
}

Array = NDArray[Any]


@dataclass(frozen=True)
class Layout:
    """A storage layout: ``dense``, ``columns``, ``bitmap``, ``16x4``, or ``n:64`` with its ``n``."""

    name: str
    n: int = GROUP

    @property
    def sparse(self) -> bool:
        return self.name not in ("dense", "columns")

    @property
    def by_columns(self) -> bool:
        """Input-major, in panels and an order of its own (`gossamer.matrices.columns`)."""
        return self.name == "columns"

    @property
    def outputs(self) -> int:
        """Outputs are padded to a multiple of so many."""
        return COLUMN_UNIT if self.by_columns else PANEL

    @property
    def room(self) -> int | None:
        """Stored values a panel-group, or None where each has its own count."""
        return None if self.name in ("bitmap", "16x4") else PANEL * self.n

    @property
    def unit(self) -> int:
        """Consecutive entries of a stream that one bit of the masks stands for: 1, or a step of 16 outputs x
        4 inputs."""
        return STEP if self.name == "16x4" else 1


def parse_layout(name: str) -> Layout:
    """``dense``, ``columns``, ``bitmap``, ``16x4`` or ``n:64`` with 1 <= n <= 63; raises MatrixError with the
    accepted forms."""
    if name in ("dense", "columns", "bitmap", "16x4"):
        return Layout(name)
    if (match := re.fullmatch(r"([1-9]\d?):64", name)) and int(match[1]) < GROUP:
        return Layout(name, int(match[1]))
    raise MatrixError(
        f"unknown layout {name!r}: use dense, columns, bitmap, 16x4 or n:64 with n from 1 to 63 (32:64)"
    )


def check_holds(layout: Layout, values: ValueType) -> None:
    """Raises MatrixError where ``layout`` cannot hold such values."""
    if not holds(layout, values):
        raise MatrixError(
            f"the layout columns holds float32, bfloat16, int8 and int4 values, not {values.name}"
        )


def holds(layout: Layout, values: ValueType) -> bool:
    """Whether ``layout`` can hold such values."""
    return not (layout.by_columns and (values.bits == 3 or values.levels))


def grid(shape: tuple[int, int], outputs: int = PANEL) -> tuple[int, int]:
    """Panels and groups of a weight ``(out, in)`` whose outputs are padded to a multiple of ``outputs``;
    raises MatrixError where a side is empty."""
    out, width = shape
    if out < 1 or width < 1:
        raise MatrixError(f"a packed weight has at least one output and one input, got shape {shape}")
    return -(-out // outputs) * (outputs // PANEL), -(-width // GROUP)


def shape_of(weight: Tensor) -> tuple[int, int]:
    """``(out, in)`` of a weight; raises MatrixError where it has other than two dimensions."""
    if weight.dim() != 2:
        raise MatrixError(f"a weight is (out_features, in_features), got shape {tuple(weight.shape)}")
    return int(weight.shape[0]), int(weight.shape[1])


def section_names(values: ValueType, layout: Layout) -> tuple[str, ...]:
    """Which sections a weight of this kind has, in their order."""
    has = {
        "values": True,
        "masks": layout.sparse,
        "scales": values.is_integer,
        "offsets": layout.room is None,
    }
    return tuple(name for name in SECTION_DTYPES if has[name])


def value_bytes(counts: Array, values: ValueType) -> Array:
    """Bytes in ``values`` of panel-groups with so many stored values each."""
    if values.bits == 4:
        return np.asarray((counts + 1) // 2)
    if values.bits == 3:
        return np.asarray((counts + 3) // 4 + (counts + 7) // 8)
    return np.asarray(counts * (values.bits // 8))


def padded_size(size: int) -> int:
    """``size`` bytes rounded up to a whole section."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def to_stream(plain: Tensor, shape: tuple[int, int], padding: int) -> Tensor:
    """``(out, in)`` of any dtype to streams ``(panel_groups, 1024)``, padded with ``padding``."""
    panels, groups = grid(shape)
    if shape != (panels * PANEL, groups * GROUP):
        padded = plain.new_full((panels * PANEL, groups * GROUP), padding)
        padded[: shape[0], : shape[1]] = plain
        plain = padded
    ordered = plain.reshape(panels, PANEL, groups, GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    return ordered.reshape(panels * groups, ENTRIES)


def from_stream(stream: Tensor, shape: tuple[int, int]) -> Tensor:
    """The inverse of :func:`to_stream`, without the padding."""
    panels, groups = grid(shape)
    plain = stream.reshape(panels, groups, GROUP // 4, PANEL, 4).permute(0, 3, 1, 2, 4)
    return plain.reshape(panels * PANEL, groups * GROUP)[: shape[0], : shape[1]].contiguous()


def mask_bytes(masks: Tensor, layout: Layout, count: int) -> Array:
    """The section ``masks`` of ``count`` panel-groups as bytes ``(count, 128)``, or ``(count, 2)`` where a
    bit stands for a step."""
    width = ENTRIES // layout.unit // 8
    return masks.numpy().view(np.uint8)[: count * width].reshape(count, width)


def output_counts(packed: Array) -> Array:
    """How many weights each output of each panel-group keeps: ``(..., 16)`` from the 128 mask bytes of a
    panel-group, uint8 ``(..., 128)``. Each byte holds one step's four inputs of two outputs."""
    pairs = _NIBBLE_COUNTS[packed].reshape(*packed.shape[:-1], GROUP // 4, PANEL // 2)
    sums = pairs.sum(axis=-2, dtype=np.uint16)
    return np.stack([sums & 255, sums >> 8], axis=-1).reshape(*packed.shape[:-1], PANEL)


# for each byte: bits set in the low nibble, and 256 times those in the high one
_NIBBLE_COUNTS = np.array([(b & 15).bit_count() + 256 * (b >> 4).bit_count() for b in range(256)], np.uint16)


def check_room(kept: Array, layout: Layout, shape: tuple[int, int]) -> None:
    """Raises MatrixError where an output keeps more than n of 64 inputs; ``kept``: see output_counts."""
    if kept.max() > layout.n:
        where, output = divmod(int(kept.argmax()), PANEL)
        panel, group = divmod(where, grid(shape)[1])
        raise MatrixError(
            f"output {panel * PANEL + output} keeps {int(kept.max())} of the 64 inputs from {group * GROUP} "
            f"on; the layout {layout.name} has room for {layout.n}"
        )
