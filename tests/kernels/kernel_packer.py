"""A slow packer for tests, from docs/architecture.md alone: one panel-group at a time, code by code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

BITS = {"int8": 8, "int4": 4, "int3": 3, "nl4": 4, "nl3": 3}
LEVELS = {
    "nl4": [-62, -48, -39, -31, -24, -17, -11, -5, 0, 6, 12, 19, 26, 34, 44, 58],
    "nl3": [-30, -19, -11, -5, 0, 6, 13, 23],
}


def integers(values: str) -> list[int]:
    """What the codes 0, 1, .. stand for."""
    half = 2 ** (BITS[values] - 1)
    return LEVELS.get(values) or list(range(-half, half))


def zero_code(values: str) -> int:
    return integers(values).index(0)


@dataclass
class Weight:
    """What is packed, and what the packed bytes mean."""

    layout: str
    values: str
    group: int
    mask: np.ndarray  # bool (out, in)
    stored: np.ndarray  # (out, in): integer q, or float32 values exact in the value type; 0 where pruned
    scales: np.ndarray | None  # float16 (out, ceil(in / group))

    def sections(self) -> dict[str, Tensor]:
        return pack(self)

    def reference(self, x: Tensor) -> Tensor:
        """The product that kernels must give, by kernels/reference.py: float32 ``(rows, out)``."""
        from gossamer.kernels import reference

        if self.values in BITS:
            return reference.matmul_int(
                torch.from_numpy(self.stored), torch.from_numpy(self.scales), x.float(), self.group
            )
        dtype = torch.bfloat16 if self.values == "bfloat16" else torch.float32
        return reference.matmul_float(torch.from_numpy(self.stored).to(dtype), x.float())


def random_weight(
    layout: str, values: str, out: int, cols: int, group: int = 64, density: float = 0.5, seed: int = 0
) -> Weight:
    """A weight with random values and a random mask that the layout allows: of nothing at density 0 (but
    dense), of all that there is room for at 1."""
    rng = np.random.default_rng(seed)
    if layout in ("dense", "columns"):
        mask = np.ones((out, cols), bool)
    elif layout == "bitmap":
        mask = rng.random((out, cols)) < density
    elif layout == "16x4":
        steps = rng.random((math.ceil(out / 16), math.ceil(cols / 4))) < density
        mask = steps.repeat(16, 0).repeat(4, 1)[:out, :cols]
    else:
        n = int(layout.split(":")[0])
        mask = np.zeros((out, cols), bool)
        for o in range(out):
            for start in range(0, cols, 64):
                width = min(64, cols - start)
                most, share = min(n, width), rng.random()
                keep = most if share < density else int(most * density * share)
                mask[o, start + rng.permutation(width)[:keep]] = True
    return with_mask(layout, values, mask, group, rng)


def with_mask(layout: str, values: str, mask: np.ndarray, group: int, rng: np.random.Generator) -> Weight:
    out, cols = mask.shape
    if values in BITS:
        stored = np.where(mask, rng.choice(integers(values), (out, cols)), 0)
        scales = (rng.standard_normal((out, math.ceil(cols / group))) * 0.05).astype(np.float16)
        return Weight(layout, values, group, mask, stored, scales)
    stored = rng.standard_normal((out, cols)).astype(np.float32)
    if values == "bfloat16":
        stored = torch.from_numpy(stored).to(torch.bfloat16).float().numpy()
    return Weight(layout, values, group, mask, np.where(mask, stored, np.float32(0)), None)


# ---- the format


def bit_field(codes: list[int], fields: int) -> bytes:
    """Blocks of 64 * fields codes; field j of byte i of a block holds its code j * h + i."""
    width = 8 // fields
    packed = bytearray()
    for start in range(0, len(codes), 64 * fields):
        block = codes[start : start + 64 * fields]
        h = math.ceil(len(block) / fields)
        for i in range(h):
            byte = 0
            for j in range(fields):
                if j * h + i < len(block):
                    byte |= block[j * h + i] << (width * j)
            packed.append(byte)
    return bytes(packed)


def value_bytes(values: str, kept: list) -> bytes:
    """The stored values of one panel-group; ``kept`` holds codes or floats in order of e."""
    if values == "float32":
        return np.array(kept, "<f4").tobytes()
    if values == "bfloat16":
        return torch.tensor(kept, dtype=torch.float32).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    if values == "int8":
        return bytes(kept)
    if BITS[values] == 4:
        return bit_field(kept, 2)
    high = bytearray(math.ceil(len(kept) / 8))
    for i, code in enumerate(kept):
        high[i // 8] |= (code >> 2) << (i % 8)
    return bit_field([code & 3 for code in kept], 4) + bytes(high)


def unit_bytes(values: str, column: list) -> bytes:
    """128 outputs of one input in the layout columns; ``column`` holds codes or floats."""
    if values == "float32":
        return value_bytes(values, column)
    if values == "bfloat16":
        pairs = [(column[32 * n + i], column[32 * n + 16 + i]) for n in range(4) for i in range(16)]
        return value_bytes(values, [value for pair in pairs for value in pair])
    places = [16 * r + 4 * lane + j for lane in range(4) for r in range(4) for j in range(4)]
    low, high = ([column[first + place] for place in places] for first in (0, 64))
    return (
        bytes(low + high) if values == "int8" else bytes(a | b << 4 for a, b in zip(low, high, strict=True))
    )


def pack_columns(w: Weight) -> dict[str, Tensor]:
    out, cols = w.mask.shape
    outputs, inputs = 128 * math.ceil(out / 128), 64 * math.ceil(cols / 64)
    zero = zero_code(w.values) if w.values in BITS else 0
    padded = np.zeros((outputs, inputs), w.stored.dtype)
    padded[:out, :cols] = w.stored
    parts = inputs // w.group
    scales = np.zeros((outputs, parts), np.float16)
    if w.scales is not None:
        scales[:out, : w.scales.shape[1]] = w.scales
    values, scale_list = [], []
    for panel in range(0, outputs, 256):
        units = range(panel, min(panel + 256, outputs), 128)
        for i in range(inputs):
            for unit in units:
                values.append(unit_bytes(w.values, (padded[unit : unit + 128, i] + zero).tolist()))
        for part in range(parts):
            for unit in units:
                scale_list.append(scales[unit : unit + 128, part])
    sections = {"values": np.frombuffer(b"".join(values), np.uint8)}
    if w.scales is not None:
        sections["scales"] = np.concatenate(scale_list)
    return {name: torch.from_numpy(pad(array)) for name, array in sections.items()}


def pack(w: Weight) -> dict[str, Tensor]:
    if w.layout == "columns":
        return pack_columns(w)
    out, cols = w.mask.shape
    panels, groups = math.ceil(out / 16), math.ceil(cols / 64)
    zero = zero_code(w.values) if w.values in BITS else 0
    codes = {q: code for code, q in enumerate(integers(w.values))} if w.values in BITS else {}
    padded = np.zeros((panels * 16, groups * 64), w.stored.dtype)
    padded[:out, :cols] = w.stored
    kept = np.zeros((panels * 16, groups * 64), bool)
    kept[:out, :cols] = w.mask
    parts = 64 // w.group
    if w.scales is not None:
        scales = np.zeros((panels * 16, groups * parts), np.float16)
        scales[: w.scales.shape[0], : w.scales.shape[1]] = w.scales

    values, masks, scale_list, offsets = b"", [], [], []
    for p in range(panels):
        offsets.append(len(values))
        for g in range(groups):
            tile = padded[16 * p : 16 * p + 16, 64 * g : 64 * g + 64]
            bits = kept[16 * p : 16 * p + 16, 64 * g : 64 * g + 64]
            stored = []
            if w.layout == "16x4":
                whole = [bool(bits[:, 4 * s : 4 * s + 4].any()) for s in range(16)]
                masks.append(sum(kept_step << s for s, kept_step in enumerate(whole)))
                bits = bits | np.repeat(whole, 4)[None, :]  # padding inside a kept step is stored
            for s in range(16):
                word = 0
                for o in range(16):
                    for k in range(4):
                        if bits[o, 4 * s + k]:
                            word |= 1 << (4 * o + k)
                        if bits[o, 4 * s + k] or w.layout == "dense":
                            stored.append(tile[o, 4 * s + k])
                if w.layout != "16x4":
                    masks.append(word)
            if w.values in BITS:
                stored = [codes[int(q)] for q in stored]
            if w.layout.endswith(":64"):
                room = 16 * int(w.layout.split(":")[0])
                stored += [zero] * (room - len(stored))
            values += value_bytes(w.values, stored)
            if w.scales is not None:
                for part in range(parts):
                    scale_list.extend(scales[16 * p : 16 * p + 16, parts * g + part])
    offsets.append(len(values))

    sections = {"values": np.frombuffer(values, np.uint8)}
    if w.layout != "dense":
        words = np.array(masks, np.uint16 if w.layout == "16x4" else np.uint64)
        sections["masks"] = pad(words).view(np.int64)
    if w.scales is not None:
        sections["scales"] = np.array(scale_list, np.float16)
    if w.layout in ("bitmap", "16x4"):
        sections["offsets"] = np.array(offsets, np.int64)
    return {name: torch.from_numpy(pad(array)) for name, array in sections.items()}


def pad(array: np.ndarray) -> np.ndarray:
    """Zeros up to the next multiple of 64 bytes."""
    missing = -array.nbytes % 64 // array.itemsize
    return np.concatenate([array, np.zeros(missing, array.dtype)])
