"""Single rows of a dense packed weight, without unpacking the rest: what an embedding's look-up needs."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import MatrixError
from gossamer.matrices.geometry import GROUP, PANEL, grid
from gossamer.matrices.values import ValueType

STEPS = GROUP // 4  # 4 inputs a step


def dense_rows(
    sections: dict[str, Tensor], values: ValueType, shape: tuple[int, int], group: int, index: Tensor
) -> Tensor:
    """Rows of W as float32: ``index`` integers ``(n,)`` in ``[0, out)``, returns ``(n, in)``.

    ``sections`` are those of the ``dense`` layout. Raises MatrixError where an index is out of range.
    """
    outside = index[(index < 0) | (index >= shape[0])]
    if outside.numel():
        raise MatrixError(f"row {int(outside[0])} is asked for, but there are {shape[0]}")
    panels, groups = grid(shape)
    panel, output = index // PANEL, index % PANEL
    stored = sections["values"]
    if not values.is_integer:
        entries = stored[: panels * groups * PANEL * GROUP * (values.bits // 8)].view(values.dtype)
        lines = entries.view(panels, groups, STEPS, PANEL, 4)[panel, :, :, output]
        return lines.reshape(len(index), groups * GROUP)[:, : shape[1]].float()
    codes = _codes(stored, values, panels, groups, panel, output)
    vectors = GROUP // group
    scales = sections["scales"][: panels * groups * vectors * PANEL]
    scales = scales.view(panels, groups, vectors, PANEL)[panel, :, :, output].float()
    integers = values.integers(codes).float().view(len(index), groups, vectors, group)
    return (integers * scales[..., None]).reshape(len(index), groups * GROUP)[:, : shape[1]]


def _codes(
    stored: Tensor, values: ValueType, panels: int, groups: int, panel: Tensor, output: Tensor
) -> Tensor:
    """uint8 codes ``(n, groups * 64)`` of one output each: bytes ``4 o + k`` of every 64-byte step."""
    n, count = len(panel), panels * groups
    if values.bits == 8:
        steps = stored[: count * 1024].view(panels, groups, STEPS, PANEL, 4)
        return steps[panel, :, :, output].reshape(n, groups * GROUP)
    if values.bits == 4:  # a block of 128 codes is two steps: low and high nibbles
        blocks = stored[: count * 512].view(panels, groups, STEPS // 2, PANEL, 4)
        lines = blocks[panel, :, :, output]
        return torch.stack([lines & 15, lines >> 4], dim=3).reshape(n, groups * GROUP)
    # three bits: 256 bytes of low bits (a block of 256 codes is four steps); then 8 bytes of high bits a step
    cells = stored[: count * 384].view(panels, groups, 384)
    lows = cells[:, :, :256].view(panels, groups, STEPS // 4, PANEL, 4)[panel, :, :, output]
    low = torch.stack([(lows >> shift) & 3 for shift in (0, 2, 4, 6)], dim=3).reshape(n, groups, STEPS, 4)
    highs = cells[:, :, 256:].view(panels, groups, STEPS, PANEL // 2)[panel, :, :, output // 2]
    shifts = (4 * (output % 2))[:, None, None, None] + torch.arange(4)
    high = (highs[..., None] >> shifts) & 1
    return (low | high << 2).reshape(n, groups * GROUP)
