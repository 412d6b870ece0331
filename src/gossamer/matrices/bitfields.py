"""Bit fields: small codes to bytes and back, in the blocks that one vector load and a shift take apart.

A stream of c codes with f fields to a byte is cut into blocks of ``64 f`` codes, the last one shorter. A
block of L codes takes ``h = ceil(L / f)`` bytes; field j (from the low bits) of byte i holds code ``j h + i``
of the block. Codes of 4 bits: f = 2. Codes of 3 bits: their low two bits with f = 4, then a bit plane of the
high bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]  # uint8 codes and bytes, integer counts


def pack_bits(bits: Array) -> Array:
    """Bool ``(streams, n)`` to bytes ``(streams, ceil(n / 8))``: bit ``i % 8`` of byte ``i / 8`` is i's."""
    return np.packbits(bits, axis=-1, bitorder="little")


def unpack_bits(packed: Array) -> Array:
    """The inverse of :func:`pack_bits` for whole bytes: bool ``(streams, 8 * bytes)``."""
    return np.unpackbits(packed, axis=-1, bitorder="little").view(np.bool_)


def pack_codes(codes: Array, counts: Array | None, bits: int) -> Array:
    """Flat bytes of uint8 codes of 4 or 3 ``bits``: ``(streams, n)``, or flat with ``counts`` a stream.

    Streams follow each other without gaps, each from a byte on.
    """
    if bits == 4:
        return _pack_fields(codes, counts, 2)[0]
    low, low_starts = _pack_fields(codes & 3, counts, 4)
    high, high_starts = _pack_plane(codes >> 2, counts)
    return _interleave((low, low_starts), (high, high_starts))


def unpack_codes(packed: Array, counts: Array | int, bits: int) -> Array:
    """The inverse of :func:`pack_codes`: uint8 ``(streams, n)`` from ``(streams, bytes)`` where ``counts`` is
    the n of all, else a flat array of ``sum(counts)`` codes from a flat one."""
    if isinstance(counts, int):
        if bits == 4:
            return _unpack_uniform(packed, counts, 2)
        split = -(-counts // 4)
        low = _unpack_uniform(packed[:, :split], counts, 4)
        high: Array = unpack_bits(packed[:, split:])[:, :counts].view(np.uint8)
        return np.asarray(low | high << 2)
    if bits == 4:
        return _unpack_ragged(packed, _starts((counts + 1) // 2), counts, 2)
    lows, highs = (counts + 3) // 4, (counts + 7) // 8
    starts = _starts(lows + highs)
    low = _unpack_ragged(packed, starts, counts, 4)
    stream, position = _positions(counts)
    byte = packed[(starts + lows)[stream] + (position >> 3)]
    return np.asarray(low | ((byte >> (position & 7).astype(np.uint8)) & 1) << 2)


def _starts(sizes: Array) -> Array:
    return np.cumsum(sizes) - sizes


def _positions(counts: Array) -> tuple[Array, Array]:
    """For each entry of concatenated streams: which stream it belongs to, and its index there (int32)."""
    stream = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    position = np.arange(len(stream)) - _starts(counts)[stream]
    return stream, position.astype(np.int32)


def _field_table(count: int, fields: int) -> Array:
    """``(bytes, fields)``: which code of a stream of ``count`` each field holds, ``count`` where none."""
    codes = np.full((-(-count // fields), fields), count)
    for start in range(0, count, 64 * fields):
        length = min(64 * fields, count - start)
        h = -(-length // fields)
        index = np.arange(fields)[None, :] * h + np.arange(h)[:, None]
        codes[start // fields : start // fields + h] = np.where(index < length, start + index, count)
    return codes


def _pack_fields(codes: Array, counts: Array | None, fields: int) -> tuple[Array, Array]:
    """Packed bytes (flat) and the number of bytes of each stream."""
    width = 8 // fields
    if counts is None:
        streams, count = codes.shape
        table = _field_table(count, fields)
        padded = np.concatenate([codes, np.zeros((streams, 1), dtype=np.uint8)], axis=1)
        packed = padded[:, table[:, 0]]
        for field in range(1, fields):
            packed |= padded[:, table[:, field]] << (field * width)
        return packed.reshape(-1), np.full(streams, len(table))
    sizes = -(-counts // fields)
    stream, position, h, length = _blocks(sizes, counts, fields)
    first = _starts(counts)[stream] + (position - position % 64) * fields
    padded = np.append(codes, np.uint8(0))
    packed = np.zeros(len(stream), dtype=np.uint8)
    for field in range(fields):
        index = field * h + position % 64
        where = np.where(index < length, first + index, len(codes))
        packed |= padded[where] << (field * width)
    return packed, sizes


def _blocks(sizes: Array, counts: Array, fields: int) -> tuple[Array, Array, Array, Array]:
    """For each byte of concatenated streams: its stream, its index there, and its block's h and L."""
    stream, position = _positions(sizes)
    length = np.minimum(counts.astype(np.int32)[stream] - (position >> 6) * (64 * fields), 64 * fields)
    return stream, position, -(-length // fields), length


def _pack_plane(high: Array, counts: Array | None) -> tuple[Array, Array]:
    if counts is None:
        packed = pack_bits(high)
        return packed.reshape(-1), np.full(len(packed), packed.shape[1])
    sizes = (counts + 7) // 8
    stream, position = _positions(counts)
    padded = np.zeros(int(sizes.sum()) * 8, dtype=np.uint8)
    padded[(_starts(sizes) * 8)[stream] + position] = high
    return pack_bits(padded), sizes


def _interleave(first: tuple[Array, Array], second: tuple[Array, Array]) -> Array:
    """Stream by stream: the bytes of ``first``, then those of ``second`` (each flat bytes and sizes)."""
    total = first[1] + second[1]
    is_first = np.repeat(
        np.tile([True, False], len(total)), np.stack([first[1], second[1]], axis=1).reshape(-1)
    )
    packed = np.empty(int(total.sum()), dtype=np.uint8)
    packed[is_first], packed[~is_first] = first[0], second[0]
    return packed


def _unpack_uniform(packed: Array, count: int, fields: int) -> Array:
    width = 8 // fields
    codes = np.empty((len(packed), count + 1), dtype=np.uint8)  # one column takes what no field holds
    table = _field_table(count, fields)
    for field in range(fields):
        codes[:, table[:, field]] = (packed >> (field * width)) & ((1 << width) - 1)
    return codes[:, :count]


def _unpack_ragged(packed: Array, starts: Array, counts: Array, fields: int) -> Array:
    width = 8 // fields
    stream, position = _positions(counts)
    block = position // (64 * fields)
    inside = position - block * (64 * fields)
    h = -(-np.minimum(counts.astype(np.int32)[stream] - block * (64 * fields), 64 * fields) // fields)
    field = inside // h
    byte = packed[starts[stream] + block * 64 + inside - field * h]
    return np.asarray((byte >> (field * width).astype(np.uint8)) & np.uint8((1 << width) - 1))
