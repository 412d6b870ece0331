"""The layout columns: every weight, input-major, so that a kernel reads those inputs only that are not zero.

Outputs are padded to units of 128 and lie in panels of `COLUMN_PANEL`; inside a panel one input follows the
other, each with all outputs of the panel (docs/architecture.md, "Columns").
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.matrices.geometry import COLUMN_PANEL, COLUMN_UNIT, GROUP, grid
from gossamer.matrices.values import ValueType

_WIDTH = COLUMN_PANEL // COLUMN_UNIT  # units of a panel


def pack_columns(stored: Tensor, values: ValueType, padding: int) -> Tensor:
    """The bytes of stored values ``(out, in)``, bit patterns or codes; what is padded holds ``padding``."""
    units, groups = _units(tuple(stored.shape))
    padded = stored.new_full((units * COLUMN_UNIT, groups * GROUP), padding)
    padded[: stored.shape[0], : stored.shape[1]] = stored
    ordered = padded.reshape(units, COLUMN_UNIT, -1)[:, _order(values)].transpose(1, 2).contiguous()
    if values.bits == 4:
        low, high = ordered.chunk(2, dim=2)
        ordered = low | high << 4
    return _join(ordered.view(torch.uint8))


def unpack_columns(section: Tensor, values: ValueType, shape: tuple[int, int]) -> Tensor:
    """The inverse of `pack_columns`, without the padding: ``(out, in)`` of int32, int16 or uint8."""
    units, groups = _units(shape)
    found = _split(section, units, groups * GROUP)
    if values.bits == 4:
        found = torch.cat([found & 15, found >> 4], dim=2)
    ordered = found.contiguous().view({32: torch.int32, 16: torch.int16}.get(values.bits, torch.uint8))
    plain = ordered.new_empty(units, COLUMN_UNIT, groups * GROUP)
    plain[:, _order(values)] = ordered.transpose(1, 2)
    return plain.reshape(units * COLUMN_UNIT, -1)[: shape[0], : shape[1]].contiguous()


def order_scales(scales: Tensor) -> Tensor:
    """Scales float16 ``(outputs, parts)``, padded to whole units, flat: panel by panel, part by part."""
    return _join(scales.reshape(-1, COLUMN_UNIT, scales.shape[1]).transpose(1, 2))


def plain_scales(section: Tensor, shape: tuple[int, int], parts: int) -> Tensor:
    """The inverse of `order_scales`, padding included; ``parts``: scales of an output."""
    units, _ = _units(shape)
    return _split(section, units, parts).transpose(1, 2).reshape(units * COLUMN_UNIT, parts)


def _units(shape: tuple[int, ...]) -> tuple[int, int]:
    panels, groups = grid((shape[0], shape[1]), COLUMN_UNIT)
    return panels * 16 // COLUMN_UNIT, groups


def _order(values: ValueType) -> Tensor:
    """Which output of a unit is stored at each of its 128 places."""
    place = torch.arange(COLUMN_UNIT)
    if values.bits == 32:
        return place
    if values.bits == 16:  # words of two: output 32 n + i below output 32 n + 16 + i
        return place // 32 * 32 + place % 2 * 16 + place % 32 // 2
    # byte 16 L + 4 r + j of 64 holds output 16 r + 4 L + j
    return place // 64 * 64 + place % 16 // 4 * 16 + place % 64 // 16 * 4 + place % 4


def _join(units: Tensor) -> Tensor:
    """``(units, rows, n)`` to flat: in each panel row by row."""
    return torch.cat([panel.transpose(0, 1).reshape(-1) for panel in torch.split(units, _WIDTH)])


def _split(flat: Tensor, units: int, rows: int) -> Tensor:
    """The inverse of `_join`."""
    wide = units // _WIDTH * _WIDTH
    pieces = flat.reshape(units, -1)
    n = pieces.shape[1] // rows
    whole = pieces[:wide].reshape(-1, rows, _WIDTH, n).transpose(1, 2).reshape(wide, rows, n)
    rest = pieces[wide:].reshape(rows, units - wide, n).transpose(0, 1)
    return torch.cat([whole, rest])
