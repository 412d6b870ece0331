"""What a layer of each contender in this process is made of: our packed weights, and PyTorch's ways.

Every maker takes a layer and gives its call, activations to result, and the bytes that it stores.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.kernel_protocol import GROUP, Layer, Structure
from gossamer import kernels
from gossamer.matrices.layouts import pack_sections
from gossamer.matrices.values import value_type
from gossamer.sparse import mask_from_scores, parse_pattern

Call = Callable[[Tensor], object]
Made = tuple[Call, int]

KINDS = 64  # different panel-groups that random weights are put together from


class Packed:
    """Our layers of one structure and value type.

    Where a panel-group may keep any step, a weight of each shape is packed, and copied; the others are put
    together from random panel-groups.
    """

    def __init__(self, structure: Structure, values: str, group: int = GROUP) -> None:
        self.structure, self.values, self.group = structure, values, group
        self.whole: dict[Layer, dict[str, Tensor]] = {}
        self.pieces = {} if structure.layout == "16x4" else random_pieces(structure, values, group)

    def __call__(self, layer: Layer) -> Made:
        sections = self.sections(layer)
        size = sum(t.nbytes for t in sections.values())
        handle = kernels.make_handle(self.structure.layout, self.values, *layer, self.group, sections)
        return partial(kernels.matmul, handle), size

    def sections(self, layer: Layer) -> dict[str, Tensor]:
        """The sections of one more layer, in memory of its own."""
        if self.pieces:
            return put_together(self.pieces, layer)
        if layer not in self.whole:
            self.whole[layer] = random_sections(self.structure, self.values, layer, self.group)
        return {name: t.clone() for name, t in self.whole[layer].items()}


def random_sections(
    structure: Structure, values: str, shape: Layer, group: int, weights: int = 1
) -> dict[str, Tensor]:
    """Sections of ``weights`` random ones of ``shape`` on top of each other, each with its own mask."""
    generator = torch.Generator().manual_seed(0)
    kind, rows = value_type(values), weights * shape[0]
    masks = None
    if structure.pattern:
        pattern = parse_pattern(structure.pattern)
        scores = (torch.rand(shape, generator=generator) for _ in range(weights))
        masks = torch.cat([mask_from_scores(s, pattern, structure.sparsity) for s in scores])
    if kind.is_integer:
        weight = torch.randint(kind.qmin, kind.qmax + 1, (rows, shape[1]), generator=generator)
        weight = weight.to(torch.int8)
        scales = torch.full((rows, shape[1] // group), 0.01, dtype=torch.float16)
    else:
        weight, scales = torch.randn(rows, shape[1], generator=generator), None
    return pack_sections(weight, kind, structure.layout, mask=masks, scales=scales, group=group)


def random_pieces(structure: Structure, values: str, group: int) -> dict[str, Tensor]:
    """Sections of `KINDS` random panel-groups of a layout, each section (KINDS, elements), one panel each.

    All panel-groups keep equally many weights, so that every section has pieces of one size.
    """
    sections = random_sections(structure, values, (16, 64), group, KINDS)
    pieces = {name: t.reshape(KINDS, -1) for name, t in sections.items() if name != "offsets"}
    if "offsets" in sections:
        sizes = sections["offsets"][: KINDS + 1].diff()
        assert int(sizes.min()) == int(sizes.max()) == pieces["values"].nbytes // KINDS
        pieces["offsets"] = sizes
    return pieces


def put_together(pieces: dict[str, Tensor], layer: Layer) -> dict[str, Tensor]:
    """The sections of one layer (multiples of 16 and 64) from random panel-groups."""
    panels, groups = layer[0] // 16, layer[1] // 64
    order = torch.randint(KINDS, (panels * groups,))
    sections = {}
    for name, piece in pieces.items():
        if name == "offsets":
            flat = torch.arange(panels + 1) * int(piece[0]) * groups
        else:
            flat = piece[order].reshape(-1)
        room = -flat.nbytes % 64 // flat.element_size()
        sections[name] = torch.cat([flat, flat.new_zeros(room)]) if room else flat
    return sections


def random_weight(layer: Layer, dtype: torch.dtype) -> Tensor:
    """(out, in) of random values, copied from a pool: making each anew would take longer than the timing."""
    count = layer[0] * layer[1]
    pool = _pool(dtype)
    weight = torch.empty(count, dtype=dtype)
    for start in range(0, count, pool.numel()):
        part = weight[start : start + pool.numel()]
        part.copy_(pool[: part.numel()])
    return weight.view(layer)


@cache
def _pool(dtype: torch.dtype) -> Tensor:
    count = 1 << 20
    if dtype == torch.int8:
        return torch.randint(-127, 128, (count,), dtype=dtype)
    return torch.randn(count).to(dtype)


def torch_plain(dtype: torch.dtype, layer: Layer) -> Made:
    weight = random_weight(layer, dtype)
    return lambda x: linear(x, weight), weight.nbytes


def torch_prepacked(dtype: torch.dtype, rows: int, layer: Layer) -> Made:
    """oneDNN's own order for this many rows, as `torch.compile` with freezing makes it."""
    weight = torch.ops.mkldnn._reorder_linear_weight(random_weight(layer, dtype), rows)
    multiply = torch.ops.mkldnn._linear_pointwise
    return lambda x: multiply(x, weight, None, "none", [], None), layer[0] * layer[1] * dtype.itemsize


def torch_int8(layer: Layer) -> Made:
    weight = random_weight(layer, torch.int8)
    scales = torch.full((layer[0],), 0.01, dtype=torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(x, weight, scales), weight.nbytes + scales.nbytes


def torch_qlinear(engine: str, layer: Layer) -> Made:
    torch.backends.quantized.engine = engine
    scales, zeros = torch.full((layer[0],), 0.01), torch.zeros(layer[0], dtype=torch.int64)
    weight = torch._make_per_channel_quantized_tensor(random_weight(layer, torch.int8), scales, zeros, 0)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    multiply = torch.ops.quantized.linear_dynamic
    return lambda x: multiply(x, packed, False), layer[0] * layer[1] + 4 * layer[0]


def torch_int4(layer: Layer) -> Made:
    out, cols = layer
    # the packed order is a permutation of nibbles: random bytes are a packed random weight
    weight = random_weight((out, cols // 2), torch.int8).view(torch.uint8)
    scales = torch.full((cols // GROUP, out, 2), 0.01, dtype=torch.bfloat16)
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return lambda x: multiply(x, weight, GROUP, scales), weight.nbytes + scales.nbytes
