"""A packed weight as kernels hold it: sections checked once, then used in place."""

from __future__ import annotations

import itertools
import re
import weakref
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import KernelError, MatrixError
from gossamer.kernels.native import native

PANEL = 16  # outputs of a panel
GROUP = 64  # inputs of a group
COLUMN_UNIT = 128  # outputs that the layout columns is padded to
ALIGNMENT = 64  # bytes: a section starts at, and is padded to, a multiple

_VALUES = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3, "int3": 4, "nl4": 5, "nl3": 6}
_IN_COLUMNS = ("float32", "bfloat16", "int8", "int4")
_DTYPES = {
    "values": torch.uint8,
    "masks": torch.int64,
    "scales": torch.float16,
    "offsets": torch.int64,
}

_ids = itertools.count(1)
_live: weakref.WeakValueDictionary[int, Operand] = weakref.WeakValueDictionary()


class Operand:
    """What kernels multiply by: a matrix ``(out_features, in_features)`` as a native program that passed its
    check.

    ``id`` names it in ``torch.ops.gossamer.packed_matmul`` as long as it lives; ids are never used again.
    """

    __slots__ = ("__weakref__", "id", "in_features", "out_features", "program")

    def __init__(self, program: Any) -> None:
        self.program = program
        self.in_features: int = program.in_features
        self.out_features: int = program.out_features
        self.id = next(_ids)
        _live[self.id] = self


class Handle(Operand):
    """A validated packed weight; made by ``make_handle``, opaque to callers. ``in_features``: activations of
    a row, which are more than its inputs where it is `reading` some of them."""

    __slots__ = ("group", "layout", "packed", "sections", "values")

    def __init__(
        self, packed: Any, layout: str, values: str, group: int, sections: dict[str, Tensor]
    ) -> None:
        program = native().Program()
        program.add_term(packed, 1, -1)
        super().__init__(program)
        self.packed = packed
        self.layout = layout
        self.values = values
        self.group = group
        self.sections = sections

    def reading(self, inputs: Tensor, width: int) -> Handle:
        """The same weight where it reads some of ``width`` activations: its inputs are those that ``inputs``
        lists, int32 ``(in_features,)``, rising. Raises MatrixError for any other list."""
        count = self.in_features
        if inputs.dtype != torch.int32 or tuple(inputs.shape) != (count,) or not inputs.is_contiguous():
            raise MatrixError(
                f"the inputs of a weight are {count} int32 numbers, got {inputs.dtype} {tuple(inputs.shape)}"
            )
        packed = self.packed.reading(inputs.data_ptr(), width)
        fault = packed.check_inputs()
        if fault:
            raise MatrixError(f"the inputs of a weight {self.out_features} x {count} are wrong: {fault}")
        return Handle(packed, self.layout, self.values, self.group, {**self.sections, "inputs": inputs})

    def __repr__(self) -> str:
        return f"Handle({self.layout} {self.values}, {self.out_features} x {self.in_features})"


def live_operand(number: int) -> Operand:
    """The operand of this id; raises KernelError where it is gone."""
    operand = _live.get(number)
    if operand is None:
        raise KernelError(f"packed weight number {number} does not exist any more")
    return operand


def _layout(layout: str) -> tuple[int, int]:
    """Layout code, and n of n:64 (0 for the others)."""
    if layout == "dense":
        return 0, 0
    if layout == "bitmap":
        return 1, 0
    if layout == "16x4":
        return 3, 0
    if layout == "columns":
        return 4, 0
    match = re.fullmatch(r"([1-9]\d?):64", layout)
    if match and int(match[1]) <= GROUP:
        return 2, int(match[1])
    raise MatrixError(
        f"unknown layout {layout!r}; there are 'dense', 'columns', 'bitmap', '16x4' and 'n:64' such as "
        "'32:64'"
    )


def _stored_bytes(values: str, count: int) -> int:
    """Bytes of ``count`` stored values of a panel-group (docs/architecture.md, "Values")."""
    if values in ("float32", "bfloat16", "int8"):
        return count * {"float32": 4, "bfloat16": 2, "int8": 1}[values]
    if values in ("int4", "nl4"):
        return count // 128 * 64 + (count % 128 + 1) // 2
    return count // 256 * 64 + (count % 256 + 3) // 4 + (count + 7) // 8


def section_bytes(
    layout: str, values: str, out_features: int, in_features: int, group: int = GROUP
) -> dict[str, int | None]:
    """Bytes of each section that a packed weight of this shape has, padding included.

    ``values`` of the layouts bitmap and 16x4 is None: it depends on the masks. ``group``: inputs that share
    a scale, 64 or 32 (integer values only). Raises MatrixError for an unknown layout, value type or group,
    and for an empty shape.
    """
    code, keep = _layout(layout)
    if values not in _VALUES:
        raise MatrixError(f"unknown values {values!r}; there are: {', '.join(_VALUES)}")
    if group not in (64, 32):
        raise MatrixError(f"a scale is shared by 64 or 32 inputs, not by {group}")
    if out_features < 1 or in_features < 1:
        raise MatrixError(f"a packed weight needs outputs and inputs, not {out_features} x {in_features}")
    if code == 4 and values not in _IN_COLUMNS:
        raise MatrixError(f"the layout columns holds {', '.join(_IN_COLUMNS)}, not {values}")
    unit = COLUMN_UNIT if code == 4 else PANEL
    panels, groups = -(-out_features // unit) * (unit // PANEL), -(-in_features // GROUP)
    stored = PANEL * GROUP if code in (0, 4) else PANEL * keep
    sizes: dict[str, int | None] = {
        "values": None if code in (1, 3) else _padded(panels * groups * _stored_bytes(values, stored))
    }
    if code == 3:  # 16 bits a panel-group
        sizes["masks"] = _padded(panels * groups * 2)
    elif code in (1, 2):
        sizes["masks"] = panels * groups * GROUP // 4 * 8
    if values not in ("float32", "bfloat16"):
        sizes["scales"] = _padded(panels * groups * (GROUP // group) * PANEL * 2)
    if code in (1, 3):
        sizes["offsets"] = _padded((panels + 1) * 8)
    return sizes


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor itself where it starts at a multiple of 64 bytes, else a copy that does."""
    if tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    size = tensor.numel() * tensor.element_size()
    room = torch.empty(size + ALIGNMENT, dtype=torch.uint8)
    start = -room.data_ptr() % ALIGNMENT
    copy = room[start : start + size].view(tensor.dtype)
    return copy.copy_(tensor)


def make_handle(
    layout: str,
    values: str,
    out_features: int,
    in_features: int,
    group: int,
    sections: dict[str, Tensor],
) -> Handle:
    """Checks the sections of a packed weight and gives the handle that kernels take.

    ``layout``: ``dense``, ``columns``, ``bitmap``, ``16x4`` or ``n:64`` such as ``32:64``; ``values``:
    ``float32``, ``bfloat16``, ``int8``, ``int4``, ``int3``, ``nl4`` or ``nl3``; ``group``: inputs that
    share a scale, 64 or 32; ``sections``: flat tensors ``values`` uint8, ``masks`` int64, ``scales`` float16,
    ``offsets`` int64, those that the layout has (docs/architecture.md). They are kept and used in place,
    memory maps too (one that does not start at a multiple of 64 bytes is copied once), and must not be
    changed afterwards.

    Raises MatrixError saying which section, panel and group is wrong: sizes, offsets that fall or leave the
    values, masks that keep padding or more than there is room for, scales that are not finite. KernelError
    where the native kernels are missing.
    """
    what = f"{layout} {values} weight {out_features} x {in_features}"
    sizes = section_bytes(layout, values, out_features, in_features, group)
    if set(sections) != set(sizes):
        raise MatrixError(f"a {what} has the sections {sorted(sizes)}, not {sorted(sections)}")
    for name, tensor in sections.items():
        if tensor.dtype != _DTYPES[name]:
            raise MatrixError(f"section {name!r} of a {what} is {_DTYPES[name]}, not {tensor.dtype}")
        if tensor.device.type != "cpu" or tensor.dim() != 1 or not tensor.is_contiguous():
            raise MatrixError(
                f"section {name!r} of a {what} must be a flat contiguous CPU tensor, "
                f"not {tuple(tensor.shape)} on {tensor.device}"
            )
        have, want = tensor.numel() * tensor.element_size(), sizes[name]
        if want is not None and have != want:
            raise MatrixError(f"section {name!r} of a {what} has {have} bytes instead of {want}")
    kept = {name: _aligned(tensor.detach()) for name, tensor in sections.items()}
    code, keep = _layout(layout)
    packed = native().Packed(
        out_features,
        in_features,
        code,
        _VALUES[values],
        keep,
        GROUP // group,
        kept["values"].data_ptr(),
        kept["values"].numel(),
        *(kept[name].data_ptr() if name in kept else 0 for name in ("masks", "scales", "offsets")),
    )
    fault = packed.check(torch.get_num_threads())
    if fault:
        raise MatrixError(f"a {what} is damaged: {fault}")
    return Handle(packed, layout, values, group, kept)
