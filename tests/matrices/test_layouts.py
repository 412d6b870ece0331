"""Packed bytes against a scalar writer that follows docs/architecture.md word by word, and round trips."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.errors import MatrixError
from gossamer.matrices.geometry import SECTION_DTYPES, parse_layout
from gossamer.matrices.layouts import (
    choose_layout,
    most_bytes,
    pack_sections,
    packed_bytes,
    unpack_sections,
)
from gossamer.matrices.validation import check_sections
from gossamer.matrices.values import VALUES, ValueType, value_type
from gossamer.sparse import NM, mask_from_scores

ALL = tuple(VALUES)
LAYOUTS = ("dense", "columns", "bitmap", "16x4", "32:64", "7:64")
MISSING = [(name, "columns") for name in ("int3", "nl4", "nl3")]
FORMATS = [(name, layout) for layout in LAYOUTS for name in ALL if (name, layout) not in MISSING]


# --- the oracle: one weight at a time ---------------------------------------------------------------------


def scalar_fields(codes: list[int], fields: int) -> bytes:
    width, packed = 8 // fields, bytearray()
    for start in range(0, len(codes), 64 * fields):
        block = codes[start : start + 64 * fields]
        h = math.ceil(len(block) / fields)
        for i in range(h):
            byte = 0
            for j in range(fields):
                if j * h + i < len(block):
                    byte |= block[j * h + i] << (j * width)
            packed.append(byte)
    return bytes(packed)


def scalar_values(stored: list[float], name: str) -> bytes:
    """``stored``: floats, or unsigned codes."""
    if name == "float32":
        return struct.pack(f"<{len(stored)}f", *stored)
    if name == "bfloat16":  # exact bfloat16 values: the upper half of the float32
        return b"".join(struct.pack("<f", x)[2:] for x in stored)
    codes = [int(x) for x in stored]
    if name == "int8":
        return bytes(codes)
    if name in ("int4", "nl4"):
        return scalar_fields(codes, 2)
    plane = bytearray(math.ceil(len(codes) / 8))
    for i, code in enumerate(codes):
        plane[i // 8] |= (code >> 2) << (i % 8)
    return scalar_fields([code & 3 for code in codes], 4) + bytes(plane)


def pad64(data: bytes) -> bytes:
    return data + bytes(-len(data) % 64)


def code_of(q: float, values: ValueType) -> float:
    return values.levels.index(int(q)) if values.levels else q + values.zero_code


def scalar_columns(
    plain: list[list[float]],
    kept_at: list[list[bool]],
    values: ValueType,
    zero: float,
    scales: list[list[float]] | None,
    group: int,
) -> dict[str, bytes]:
    units, groups = math.ceil(len(plain) / 128), math.ceil(len(plain[0]) / 64)

    def stored(row: int, col: int) -> float:
        if row >= len(plain) or col >= len(plain[0]) or not kept_at[row][col]:
            return zero
        return plain[row][col] + zero if values.is_integer else plain[row][col]

    body, scale_bytes = bytearray(), bytearray()
    for first in range(0, units, 2):
        panel = range(first, min(first + 2, units))
        for col in range(64 * groups):
            for unit in panel:
                column = [stored(128 * unit + o, col) for o in range(128)]
                if values.name == "bfloat16":
                    column = [
                        column[32 * n + 16 * k + i] for n in range(4) for i in range(16) for k in range(2)
                    ]
                if values.is_integer:
                    bytes_of = [(p // 4 % 4, p // 16, p % 4) for p in range(64)]
                    low = [int(column[16 * r + 4 * lane + j]) for r, lane, j in bytes_of]
                    high = [int(column[64 + 16 * r + 4 * lane + j]) for r, lane, j in bytes_of]
                    paired = values.bits == 4
                    column = [a + 16 * b for a, b in zip(low, high, strict=True)] if paired else low + high
                body += bytes(column) if values.is_integer else scalar_values(column, values.name)
        for part in range(64 // group * groups if scales else 0):
            for row in range(128 * panel.start, 128 * panel.stop):
                ok = row < len(scales) and part < len(scales[0])
                scale_bytes += struct.pack("<e", scales[row][part] if ok else 0.0)
    return {"values": bytes(body)} | ({"scales": bytes(scale_bytes)} if scales else {})


def scalar_pack(
    weight: Tensor, values: ValueType, layout: str, mask: Tensor, scales: Tensor | None, group: int
) -> dict[str, bytes]:
    out, width = weight.shape
    zero = float(values.zero_code) if values.is_integer else 0.0
    plain, kept_at = weight.tolist(), mask.tolist()
    if layout == "columns":
        return scalar_columns(
            plain, kept_at, values, zero, None if scales is None else scales.tolist(), group
        )
    scale_rows = None if scales is None else scales.float().tolist()
    body, masks, scale_bytes, offsets = bytearray(), bytearray(), bytearray(), [0]
    for p in range(math.ceil(out / 16)):
        for g in range(math.ceil(width / 64)):
            stored, whole = [], 0
            for s in range(16):
                word = 0
                step = [row[64 * g + 4 * s : 64 * g + 4 * s + 4] for row in kept_at[16 * p : 16 * p + 16]]
                stored_anyway = layout == "dense" or (layout == "16x4" and any(map(any, step)))
                whole |= stored_anyway << s
                for o in range(16):
                    for k in range(4):
                        row, col = 16 * p + o, 64 * g + 4 * s + k
                        inside = row < out and col < width
                        value = zero
                        if inside and kept_at[row][col]:
                            word |= 1 << (4 * o + k)
                            value = code_of(plain[row][col], values) if values.is_integer else plain[row][col]
                            if not stored_anyway:
                                stored.append(value)
                        if stored_anyway:
                            stored.append(value)
                masks += b"" if layout == "16x4" else struct.pack("<Q", word)
            masks += struct.pack("<H", whole) if layout == "16x4" else b""
            if ":" in layout:
                stored += [zero] * (16 * int(layout.split(":")[0]) - len(stored))
            body += scalar_values(stored, values.name)
            if scale_rows is not None:
                for part in range(64 // group):
                    for o in range(16):
                        row, at = 16 * p + o, (64 // group) * g + part
                        ok = row < out and at < len(scale_rows[0])
                        scale_bytes += struct.pack("<e", scale_rows[row][at] if ok else 0.0)
        offsets.append(len(body))
    sections = {"values": pad64(bytes(body))}
    if layout != "dense":
        sections["masks"] = pad64(bytes(masks))
    if scale_rows is not None:
        sections["scales"] = pad64(bytes(scale_bytes))
    if layout in ("bitmap", "16x4"):
        sections["offsets"] = pad64(struct.pack(f"<{len(offsets)}q", *offsets))
    return sections


# --- random weights ---------------------------------------------------------------------------------------


def limit(mask: Tensor, layout: str) -> Tensor:
    """``mask`` with what an n:64 layout has no room for taken away; of 16x4, whole steps by their corner."""
    if layout == "16x4":
        return mask[::16, ::4].repeat_interleave(16, 0).repeat_interleave(4, 1)[: len(mask), : mask.shape[1]]
    if ":" not in layout:
        return mask
    parts = [part & (part.cumsum(dim=1) <= int(layout.split(":")[0])) for part in mask.split(64, dim=1)]
    return torch.cat(parts, dim=1)


def sample(
    name: str, layout: str, out: int, width: int, density: float, group: int, seed: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A weight, its mask and scales; pruned weights are not zero in it, and floats include odd ones."""
    generator = torch.Generator().manual_seed(seed)
    mask = limit(torch.rand(out, width, generator=generator) < density, layout)
    values = value_type(name)
    if values.is_integer:
        levels = torch.tensor(values.levels or range(values.qmin, values.qmax + 1), dtype=torch.int8)
        weight = levels[torch.randint(0, len(levels), (out, width), generator=generator)]
        scales = torch.randn(out, math.ceil(width / group), generator=generator).half()
        return weight, mask, scales
    weight = torch.randn(out, width, generator=generator).to(values.dtype)
    odd = torch.tensor([-0.0, 0.0, 1e-40, -1e-41, float("inf"), 3e38, 2.0**-133]).to(values.dtype)
    at = torch.rand(out, width, generator=generator) < 0.2
    picks = odd[torch.randint(0, len(odd), (out, width), generator=generator)]
    return torch.where(at, picks, weight), mask, None


def bits_of(x: Tensor) -> Tensor:
    return x.view({4: torch.int32, 2: torch.int16, 1: torch.int8}[x.element_size()])


cases = settings(max_examples=25, deadline=None)
shapes = {
    "out": st.integers(1, 40),
    "width": st.integers(1, 200),
    "density": st.sampled_from([0, 0.1, 0.5, 0.9, 1]),
}


@pytest.mark.parametrize(("name", "layout"), FORMATS)
@cases
@given(**shapes, group=st.sampled_from([32, 64]), seed=st.integers(0, 10**6))
def test_round_trip(
    name: str, layout: str, out: int, width: int, density: float, group: int, seed: int
) -> None:
    values = value_type(name)
    weight, mask, scales = sample(name, layout, out, width, density, group, seed)
    sections = pack_sections(weight, values, layout, mask=mask, scales=scales, group=group)
    check_sections(sections, values, layout, (out, width), group)
    again = unpack_sections(sections, values, layout, (out, width), group)
    assert again.weight.dtype == values.dtype
    expected = torch.where(mask, bits_of(weight), 0)
    assert torch.equal(bits_of(again.weight), expected)
    if layout in ("dense", "columns"):
        assert again.mask is None
    else:
        assert again.mask is not None
        assert torch.equal(again.mask, mask)
    if scales is None:
        assert again.scales is None
    else:
        assert again.scales is not None
        assert torch.equal(bits_of(again.scales), bits_of(scales))
    size = sum(part.numel() * part.element_size() for part in sections.values())
    assert size == packed_bytes(mask, values, layout, group)
    assert all(part.numel() * part.element_size() % 64 == 0 for part in sections.values())


@pytest.mark.parametrize(("name", "layout"), FORMATS)
@pytest.mark.parametrize(
    ("out", "width", "density", "group"),
    [(16, 64, 0.5, 64), (17, 65, 0.4, 32), (5, 130, 0.9, 32), (33, 3, 1, 64), (260, 70, 1, 64)],
)
def test_bytes_follow_the_document(
    name: str, layout: str, out: int, width: int, density: float, group: int
) -> None:
    values = value_type(name)
    weight, mask, scales = sample(name, layout, out, width, density, group, seed=out)
    got = pack_sections(weight, values, layout, mask=mask, scales=scales, group=group)
    wanted = scalar_pack(weight, values, layout, mask, scales, group)
    assert {part: bytes(section.numpy().tobytes()) for part, section in got.items()} == wanted
    assert {part: section.dtype for part, section in got.items()} == {
        part: SECTION_DTYPES[part] for part in got
    }


# --- literal bytes, read off the document by hand ---------------------------------------------------------


def test_literal_dense_int4() -> None:
    # one panel-group; block b holds steps 2b (low nibble) and 2b + 1 (high nibble), byte 4 o + k
    q = torch.zeros(1, 8, dtype=torch.int8)
    q[0] = torch.tensor([-8, -7, 0, 7, 1, 2, 3, 4])
    sections = pack_sections(q, value_type("int4"), "dense", scales=torch.tensor([[1.5]]).half())
    raw = sections["values"].numpy().tobytes()
    assert len(raw) == 512
    # codes of output 0: step 0 = 0, 1, 8, 15; step 1 = 9, 10, 11, 12
    assert raw[:4] == bytes([0x90, 0xA1, 0xB8, 0xCF])
    assert raw[4:] == b"\x88" * 508  # everything else is the zero code, twice
    scale = sections["scales"].numpy().tobytes()
    assert scale == b"\x00\x3e" + bytes(62)  # 1.5 in float16 is 0x3e00; 15 padded outputs, then padding


def test_literal_columns() -> None:
    # an input is 64 bytes: outputs 0..63 in low nibbles, 64..127 in high ones; byte 16 L + 4 r + j = output
    # 16 r + 4 L + j
    q = torch.zeros(66, 2, dtype=torch.int8)
    q[1, 0], q[4, 0], q[16, 0], q[65, 0], q[63, 1] = -7, -6, -5, -4, 7
    raw = pack_sections(q, value_type("int4"), "columns", scales=torch.ones(66, 1).half())["values"].tolist()
    first, second = [0x88] * 64, [0x88] * 64
    first[1], first[16], first[4], second[63] = 0x41, 0x82, 0x83, 0x8F
    assert raw == first + second + [0x88] * 64 * 62
    # 384 outputs: a panel of 256, and one of 128
    w = torch.arange(384.0)[:, None] * torch.tensor([[1.0, 1000.0]])
    raw = pack_sections(w, value_type("float32"), "columns")["values"].view(torch.float32)
    assert raw[:512].tolist() == [*range(256), *range(0, 256000, 1000)]
    assert raw[64 * 256 :][:256].tolist() == [*range(256, 384), *range(256000, 384000, 1000)]


def test_literal_bitmap_int4() -> None:
    # kept: (0, 1), (0, 5), (2, 0): bits 1 of word 0, 1 of word 1, 8 of word 0; order of e: 1, 8, 65
    q = torch.zeros(3, 8, dtype=torch.int8)
    mask = torch.zeros(3, 8, dtype=torch.bool)
    q[0, 1], q[2, 0], q[0, 5] = 3, -2, 7
    mask[0, 1] = mask[2, 0] = mask[0, 5] = True
    sections = pack_sections(q, value_type("int4"), "bitmap", mask=mask, scales=torch.ones(3, 1).half())
    words = sections["masks"].tolist()
    assert words == [0b1_0000_0010, 0b10, *[0] * 14]
    # codes 11, 6, 15: a block of 3 takes 2 bytes: (code 0, code 2), (code 1, nothing)
    assert sections["values"].tolist() == [0xFB, 0x06, *[0] * 62]
    assert sections["offsets"].tolist() == [0, 2, *[0] * 6]


def test_literal_bitmap_int3() -> None:
    # nine kept codes q + 4 = 0..7, 5: low bits 0,1,2,3,0,1,2,3,1 in a block of 9: h = 3, fields 3 apart
    q = torch.tensor([[-4, -3, -2, -1, 0, 1, 2, 3, 1]], dtype=torch.int8)
    sections = pack_sections(q, value_type("int3"), "bitmap", scales=torch.ones(1, 1).half())
    # byte i = code i | code (3 + i) << 2 | code (6 + i) << 4
    low = [0 | 3 << 2 | 2 << 4, 1 | 0 << 2 | 3 << 4, 2 | 1 << 2 | 1 << 4]
    high = [0b1111_0000, 0b1]  # codes 4..7 and the ninth have bit 2 set
    assert sections["values"].tolist() == [*low, *high, *[0] * 59]


def test_literal_nl3() -> None:
    q = torch.zeros(1, 64, dtype=torch.int8)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    q[0, 3], q[0, 9] = 23, -11  # codes 7 and 2; what is kept and zero has code 4
    mask[0, 3] = mask[0, 4] = mask[0, 9] = True
    sections = pack_sections(q, value_type("nl3"), "bitmap", mask=mask, scales=torch.ones(1, 1).half())
    assert sections["values"].tolist() == [3 | 0 << 2 | 2 << 4, 0b011, *[0] * 62]
    assert torch.equal(unpack_sections(sections, value_type("nl3"), "bitmap", (1, 64)).weight, q)
    with pytest.raises(MatrixError, match="nl3 integers are -30, -19"):
        pack_sections(torch.ones_like(q), value_type("nl3"), "bitmap", scales=torch.ones(1, 1).half())


def test_literal_n_of_64_keeps_its_room() -> None:
    q = torch.zeros(1, 64, dtype=torch.int8)
    mask = torch.zeros(1, 64, dtype=torch.bool)
    q[0, 63], mask[0, 63] = -128, True
    mask[0, 4] = True  # kept, and zero: stays kept
    sections = pack_sections(q, value_type("int8"), "2:64", mask=mask, scales=torch.ones(1, 1).half())
    assert sections["values"].tolist() == [128, 0, *[128] * 30, *[0] * 32]
    assert sections["masks"].tolist() == [0, 1, *[0] * 13, 0b1000]
    assert "offsets" not in sections


def test_literal_floats() -> None:
    w = torch.tensor([[1.0, -0.0, 1.00390625]])  # 1 + 2^-8 is a tie: rounds to even, 1.0
    brief = pack_sections(w, value_type("bfloat16"), "bitmap")["values"].numpy().tobytes()
    assert brief[:6] == b"\x80\x3f\x00\x80\x80\x3f"
    full = pack_sections(w, value_type("float32"), "bitmap")["values"].numpy().tobytes()
    assert full[:12] == struct.pack("<3f", 1.0, -0.0, 1.00390625)


@pytest.mark.parametrize(
    ("name", "layout", "group", "bits"),
    [
        ("int4", "dense", 64, 4.25),
        ("int4", "32:64", 64, 3.25),
        ("int8", "dense", 64, 8.25),
        ("int3", "dense", 64, 3.25),
        ("int4", "dense", 32, 4.5),
        ("int3", "32:64", 64, 2.75),
        ("nl3", "32:64", 64, 2.75),
        ("nl4", "dense", 64, 4.25),
        ("bfloat16", "32:64", 64, 9.0),
        ("float32", "dense", 64, 32.0),
        ("int4", "columns", 64, 8.5),  # 64 outputs are padded to 128
    ],
)
def test_bits_per_weight(name: str, layout: str, group: int, bits: float) -> None:
    mask = torch.ones(64, 256, dtype=torch.bool)
    if layout not in ("dense", "columns"):
        mask[:, ::2] = False
    assert packed_bytes(mask, value_type(name), layout, group) * 8 / mask.numel() == bits


@pytest.mark.parametrize(("name", "layout"), FORMATS)
@settings(max_examples=10, deadline=None)
@given(**shapes, group=st.sampled_from([32, 64]), seed=st.integers(0, 10**6))
def test_bytes_are_known_without_the_mask(
    name: str, layout: str, out: int, width: int, density: float, group: int, seed: int
) -> None:
    values = value_type(name)
    weight, mask, scales = sample(name, layout, out, width, density, group, seed)
    sections = pack_sections(weight, values, layout, mask=mask, scales=scales, group=group)
    sizes = {name: part.nbytes for name, part in sections.items()}
    kept = int(mask.sum())
    if layout == "16x4":  # whole steps, padding included
        kept = 64 * sum(byte.bit_count() for byte in sections["masks"].view(torch.uint8).tolist())
    most = most_bytes((out, width), kept, values, layout, group)
    assert {**most, "values": 0} == {**sizes, "values": 0}
    slack = 0 if layout != "bitmap" else 2 * -(-out // 16) * -(-width // 64) + 64
    assert sizes["values"] <= most["values"] <= sizes["values"] + slack


# --- choosing ---------------------------------------------------------------------------------------------


def test_choose_layout() -> None:
    int4 = value_type("int4")
    generator = torch.Generator().manual_seed(0)
    two_of_four = torch.zeros(32, 128, dtype=torch.bool)
    two_of_four[:, 1::4] = two_of_four[:, 2::4] = True
    half = torch.rand(32, 128, generator=generator) < 0.5
    assert choose_layout(None, int4) == "dense"
    assert choose_layout(torch.ones(4, 4, dtype=torch.bool), int4) == "dense"
    assert choose_layout(two_of_four, int4) == "32:64"
    assert choose_layout(half, int4) == "bitmap"
    less = two_of_four.clone()
    less[3, 1] = False  # one weight fewer: the room is no longer exact
    assert choose_layout(less, int4) == "bitmap"
    ragged = two_of_four[:, :100]
    assert choose_layout(ragged, int4) == "32:64"
    ragged = torch.cat([two_of_four[:, :64], torch.ones(32, 36, dtype=torch.bool)], dim=1)
    assert choose_layout(ragged, int4) == "bitmap"
    steps = two_of_four[:16].any(0).reshape(32, 4).any(1)  # all of them, so far
    steps[::2] = False
    blocks = steps.repeat_interleave(4)[None, :].expand(32, -1)
    assert choose_layout(blocks, int4) == "16x4"
    assert choose_layout(blocks[:27, :101], int4) == "16x4"
    broken = blocks.clone()
    broken[3, 4] = False  # a corner of a kept step
    assert choose_layout(broken, int4) == "bitmap"
    # 10 % pruned saves 0.4 bits of int4 and costs one for the mask; of float32 it saves 3.2
    few = torch.rand(32, 128, generator=generator) < 0.9
    assert choose_layout(few, int4) == "dense"
    assert choose_layout(few, value_type("float32")) == "bitmap"


@pytest.mark.parametrize("cols", [9, 65, 66, 67, 73, 127, 191])
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(1, 4), NM(3, 8), NM(32, 64)])
def test_ragged_patterns_have_room(pattern: NM, cols: int) -> None:
    mask = mask_from_scores(torch.rand(20, cols, generator=torch.Generator().manual_seed(cols)), pattern)
    values, layout = value_type("float32"), choose_layout(mask, value_type("float32"))
    assert layout == (f"{64 // pattern.m * pattern.n}:64" if cols >= 64 else "bitmap")
    weight = torch.randn(20, cols) * mask
    sections = pack_sections(weight, values, layout, mask=mask)
    check_sections(sections, values, layout, (20, cols))
    again = unpack_sections(sections, values, layout, (20, cols))
    assert torch.equal(again.weight, weight)
    assert torch.equal(again.mask, mask)  # type: ignore[arg-type]


# --- what is refused --------------------------------------------------------------------------------------


def test_bad_input() -> None:
    q, ones = torch.zeros(4, 64, dtype=torch.int8), torch.ones(4, 1).half()
    int4 = value_type("int4")
    with pytest.raises(MatrixError, match="n:64"):
        parse_layout("64:64")
    with pytest.raises(MatrixError, match="columns holds float32, bfloat16, int8 and int4 values, not int3"):
        pack_sections(q, value_type("int3"), "columns", scales=ones)
    with pytest.raises(MatrixError, match="unknown layout"):
        pack_sections(q, int4, "csr", scales=ones)
    mask = torch.zeros(4, 64, dtype=torch.bool)
    mask[2, :33] = True
    with pytest.raises(MatrixError, match="output 2 keeps 33 of the 64 inputs from 0"):
        pack_sections(q, int4, "32:64", mask=mask, scales=ones)
    with pytest.raises(MatrixError, match=r"\[-8, 7\]"):
        pack_sections(q + 8, int4, "dense", scales=ones)
    with pytest.raises(MatrixError, match="integer codes"):
        pack_sections(q.float(), int4, "dense", scales=ones)
    with pytest.raises(MatrixError, match="from floats"):
        pack_sections(q, value_type("float32"), "dense")
    with pytest.raises(MatrixError, match="scales"):
        pack_sections(q, int4, "dense")
    with pytest.raises(MatrixError, match="scales"):
        pack_sections(q, int4, "dense", scales=ones, group=32)
    with pytest.raises(MatrixError, match="no scales"):
        pack_sections(q.float(), value_type("float32"), "dense", scales=ones)
    with pytest.raises(MatrixError, match="mask"):
        pack_sections(q, int4, "bitmap", mask=torch.ones(4, 63, dtype=torch.bool), scales=ones)
    with pytest.raises(MatrixError, match="at least one"):
        pack_sections(q[:0], int4, "dense", scales=ones[:0])
    with pytest.raises(MatrixError, match="out_features"):
        pack_sections(q[0], int4, "dense", scales=ones)


def test_damage_is_found() -> None:
    values, shape = value_type("int4"), (20, 100)
    weight, mask, scales = sample("int4", "bitmap", *shape, 0.5, 64, seed=3)
    good = pack_sections(weight, values, "bitmap", mask=mask, scales=scales)
    check_sections(good, values, "bitmap", shape)

    flipped = good["masks"].clone()
    flipped[0] ^= 1
    outside = good["masks"].clone()
    outside[-1] |= 1 << 60  # an output past the twentieth
    swapped = good["offsets"].clone()
    swapped[1] += 1
    for name, change, text in [
        ("masks", flipped, "popcounts|values"),
        ("masks", outside, "outside the shape"),
        ("masks", good["masks"][:-8], "masks holds"),
        ("offsets", swapped, "offsets disagree"),
        ("offsets", torch.cat([good["offsets"], good["offsets"]]), "offsets holds"),
        ("values", good["values"][:-64], "values holds"),
        ("scales", good["scales"][:32], "scales holds"),
        ("scales", good["scales"].float(), "flat torch.float16"),
        ("values", good["values"].reshape(2, -1), "flat torch.uint8"),
    ]:
        with pytest.raises(MatrixError, match=text):
            check_sections({**good, name: change}, values, "bitmap", shape)
    with pytest.raises(MatrixError, match="has sections"):
        check_sections({"values": good["values"]}, values, "bitmap", shape)
    with pytest.raises(MatrixError, match="scales holds"):
        check_sections(good, values, "bitmap", (10**9, 10**9))
    room = pack_sections(weight, values, "63:64", mask=limit(mask, "63:64"), scales=scales)
    with pytest.raises(MatrixError, match=r"has room for 9|values holds"):
        check_sections(room, values, "9:64", shape)
