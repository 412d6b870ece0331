"""The header of a safetensors file: every rule of the format checked when read, fixed bytes when written.

The format (https://huggingface.co/docs/safetensors): 8 bytes of little-endian header length, a JSON header
``{name: {"dtype", "shape", "data_offsets": [begin, end]}}``, then the data without holes.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch

from gossamer.errors import CheckpointError, OutputError

ALIGNMENT = 64
HEADER_LIMIT = 100_000_000  # bytes; the limit of the safetensors library too
RANK_LIMIT = 8
METADATA = "__metadata__"

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file; ``begin`` and ``end`` are byte positions in the file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def render_header(
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None
) -> bytes:
    """The first bytes of a file that holds ``tensors`` (name, dtype, shape) in this order: length and JSON,
    padded with spaces to a multiple of 64. Raises OutputError for what the format or this library cannot
    hold."""
    table: dict[str, Any] = {}
    if metadata:
        table[METADATA] = dict(metadata)
    begin = 0
    for name, dtype, shape in tensors:
        if name == METADATA:
            raise OutputError(f"a tensor cannot be named {METADATA!r} in a safetensors file")
        if dtype not in DTYPE_NAMES:
            raise OutputError(f"the tensor {name!r} is {dtype}, which a tensor file does not store")
        if len(shape) > RANK_LIMIT:
            raise OutputError(f"the tensor {name!r} has {len(shape)} dimensions, more than {RANK_LIMIT}")
        end = begin + math.prod(shape) * dtype.itemsize
        table[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": [int(n) for n in shape],
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > HEADER_LIMIT:
        raise OutputError(f"the header of {len(table)} tensors takes more than {HEADER_LIMIT:,} bytes")
    return len(text).to_bytes(8, "little") + text


class _HeaderError(ValueError):
    """What is wrong with a header, before the file's name is put in front."""


def check_header_length(path: Path, size: int, length: int) -> None:
    """Raises CheckpointError unless a file of ``size`` bytes may have a JSON header of ``length`` bytes."""
    if size < 8:
        raise CheckpointError(f"{path} has {size} bytes, fewer than the 8 that say how long its header is")
    if length > HEADER_LIMIT:
        raise CheckpointError(
            f"{path} declares a header of {length:,} bytes, more than the {HEADER_LIMIT:,} allowed: "
            "damaged, or not a safetensors file"
        )
    if length < 2 or length > size - 8:
        raise CheckpointError(
            f"{path} declares a header of {length:,} bytes, but {size - 8:,} follow: truncated or damaged"
        )


def parse_header(path: Path, header: bytes, size: int) -> tuple[list[Entry], dict[str, str]]:
    """The tensors of a JSON ``header``, in the order of their bytes, and its metadata.

    ``size``: bytes of the whole file. Checked: JSON without duplicate keys, known dtypes, shapes whose
    product times the item size is the size of the data, data without holes or overlaps up to the end of the
    file. Raises CheckpointError naming ``path`` and the tensor.
    """
    try:
        table = parse_json(header)
        metadata = _metadata(table.pop(METADATA, {}))
        start = 8 + len(header)
        entries = [_entry(name, value, start) for name, value in table.items()]
        entries.sort(key=lambda entry: (entry.begin, entry.end, entry.name))
        _check_cover(entries, start, size)
    except ValueError as error:
        raise CheckpointError(f"the header of {path} is damaged: {error}") from error
    return entries, metadata


def parse_json(text: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8, strictly: no duplicate keys, no NaN; raises ValueError, however deep."""
    if text[:1] != b"{":
        raise _HeaderError("it does not begin with '{'")
    try:
        table = json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError as error:
        raise _HeaderError("its JSON is nested too deeply") from error
    assert isinstance(table, dict)  # it began with a brace
    return table


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        twice = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise _HeaderError(f"the key {twice!r} appears twice")
    return table


def _no_constant(text: str) -> NoReturn:
    raise _HeaderError(f"{text} is not JSON")


def _metadata(value: Any) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise _HeaderError(f"{METADATA!r} is not a table of strings")
    return value


def _entry(name: str, value: Any, start: int) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise _HeaderError(f"the tensor {name!r} is not described by dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise _HeaderError(f"the tensor {name!r} has the dtype {_short(kind)}; known are {', '.join(DTYPES)}")
    if not isinstance(shape, list) or len(shape) > RANK_LIMIT or not all(map(_is_count, shape)):
        raise _HeaderError(
            f"the tensor {name!r} has the shape {_short(shape)}, not at most {RANK_LIMIT} sizes below 2^63"
        )
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_count, offsets)):
        raise _HeaderError(f"the tensor {name!r} has the data_offsets {_short(offsets)}, not [begin, end]")
    begin, end = offsets
    # Python's integers do not overflow; the strides of an empty tensor must not either
    if math.prod(max(1, n) for n in shape) >= 1 << 63:
        raise _HeaderError(f"the tensor {name!r} has the impossible shape {_short(shape)}")
    nbytes = math.prod(shape) * DTYPES[kind].itemsize
    if end - begin != nbytes:
        raise _HeaderError(
            f"the tensor {name!r} of shape {shape} in {kind} takes {nbytes:,} bytes, "
            f"but its data_offsets [{begin}, {end}] give {end - begin:,}"
        )
    return Entry(name, DTYPES[kind], tuple(shape), start + begin, start + end)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _check_cover(entries: list[Entry], start: int, size: int) -> None:
    at, before = start, None
    for entry in entries:
        if entry.begin != at:
            kind = "overlaps" if entry.begin < at else "leaves a hole after"
            neighbour = f"the tensor {before!r}" if before is not None else "the header"
            raise _HeaderError(f"the tensor {entry.name!r} {kind} {neighbour}")
        if entry.end > size:
            raise _HeaderError(
                f"the tensor {entry.name!r} ends at byte {entry.end:,}, "
                f"but the file has {size:,} bytes: truncated"
            )
        at, before = entry.end, entry.name
    if at != size:
        raise _HeaderError(f"{size - at:,} bytes follow the last tensor")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
