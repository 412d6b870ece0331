"""Named tensors in one safetensors file: a streaming writer with fixed bytes, and a memory-mapping reader.

What the writer adds within the format: tensors are ordered so that all whose size is a multiple of 64 bytes
(packed sections are) come first, by name, and the header is padded with spaces, so those start at a multiple
of 64 in the file and in a memory map; all others are aligned at least to their item size. The same tensors
give the same bytes.
"""

from __future__ import annotations

import math
import mmap
import os
import stat
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gossamer.errors import CheckpointError, OutputError
from gossamer.matrices.atomic import atomic_file
from gossamer.matrices.checksums import Checksums, Digest
from gossamer.matrices.tensor_header import (
    ALIGNMENT,
    Entry,
    check_header_length,
    parse_header,
    render_header,
)

_WRITE_PIECE = 4 << 20  # bytes written and hashed at once


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is made only when its turn to be written comes, and let go afterwards."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]


@dataclass(frozen=True)
class Written:
    """What a write gave: checksums of the whole file, and the CRC-32 of each tensor's bytes."""

    file: Checksums
    crc32: dict[str, int]


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    *,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Written:
    """Writes ``tensors`` to the safetensors file ``path``, one after another, atomically.

    Only one tensor's bytes are in memory beyond what the caller holds. ``metadata``: at most one key (the
    order of more is not fixed by other tools). ``progress``: is told how many bytes of data are written.
    Raises OutputError where a dtype or name cannot be stored, a lazy tensor is not what it said, or the file
    cannot be written (nothing is left behind then).
    """
    if metadata is not None and len(metadata) > 1:
        raise OutputError(f"a tensor file carries at most one metadata key, got {sorted(metadata)}")
    order, header = _order_and_header(tensors, metadata)
    needed = len(header) + sum(nbytes(tensor) for tensor in tensors.values())
    digest, crcs, done = Digest(), {}, 0
    with atomic_file(path, needed=needed) as file:
        file.write(header)
        digest.update(header)
        for name in order:
            crc = 0
            for piece in _pieces(name, tensors[name]):
                file.write(piece)
                digest.update(piece)
                crc = zlib.crc32(piece, crc)
                done += len(piece)
                if progress is not None:
                    progress(done)
            crcs[name] = crc
    return Written(digest.result(), crcs)


def _order_and_header(
    tensors: Mapping[str, Tensor | LazyTensor], metadata: Mapping[str, str] | None
) -> tuple[list[str], bytes]:
    order = sorted(tensors, key=lambda name: (-_size_alignment(tensors[name]), name))
    return order, render_header(
        [(name, tensors[name].dtype, tuple(tensors[name].shape)) for name in order], metadata
    )


def file_bytes(
    tensors: Mapping[str, Tensor | LazyTensor], *, metadata: Mapping[str, str] | None = None
) -> int:
    """Bytes of the file that `write_tensors` would make, header included; nothing is loaded."""
    header = _order_and_header(tensors, metadata)[1]
    return len(header) + sum(nbytes(tensor) for tensor in tensors.values())


def nbytes(tensor: Tensor | LazyTensor) -> int:
    """Bytes that ``tensor`` takes in a file."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _size_alignment(tensor: Tensor | LazyTensor) -> int:
    """The largest power of two, at most 64, that divides the size: in falling order of it, every tensor
    starts at a multiple of its own."""
    return math.gcd(nbytes(tensor), ALIGNMENT)


def _pieces(name: str, tensor: Tensor | LazyTensor) -> Iterator[memoryview]:
    loaded = tensor.load() if isinstance(tensor, LazyTensor) else tensor
    if loaded.dtype != tensor.dtype or tuple(loaded.shape) != tuple(tensor.shape):
        raise OutputError(
            f"the tensor {name!r} was announced as {tensor.dtype} {tuple(tensor.shape)} and is "
            f"{loaded.dtype} {tuple(loaded.shape)}"
        )
    if loaded.numel() == 0:
        return
    view = loaded.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(view), _WRITE_PIECE):
        yield view[begin : begin + _WRITE_PIECE]


def open_tensors(path: Path, *, huge_pages: bool = False) -> TensorFile:
    """Opens a safetensors file: its header is checked whole, its data is memory-mapped and not yet read.

    ``huge_pages``: the file is read into memory of this process's own instead, for which the system is asked
    for huge pages (it may not have any), since those of files are small: reading from them is faster.

    Raises CheckpointError, naming the file and, where one is concerned, the tensor.
    """
    path = Path(path)
    try:
        # a pipe or device would block or never end
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise CheckpointError(f"{path} is not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            check_header_length(path, size, length)
            entries, metadata = parse_header(path, file.read(length), size)
            if huge_pages:
                mapped = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
                if hasattr(mmap, "MADV_HUGEPAGE"):
                    with suppress(OSError):  # a kernel may be built without them
                        mapped.madvise(mmap.MADV_HUGEPAGE)
                file.seek(0)
                if file.readinto(mapped) != size:
                    raise CheckpointError(f"{path} was changed while it was read")
            else:
                # private: a write to a tensor changes this process's copy of the page and never the file
                mapped = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror or error}") from error
    return TensorFile(path, mapped, entries, metadata)


class TensorFile:
    """The tensors of one safetensors file, memory-mapped.

    A tensor's memory is the file's pages: nothing is read before it is used, and the map lives as long as
    this object or any of its tensors. The map is private, so writing into a tensor changes neither the file
    nor other processes. A file that is truncated while it is mapped makes the operating system end the
    process (SIGBUS): replace files by renaming, as the writer does, never in place.
    """

    def __init__(self, path: Path, mapped: mmap.mmap, entries: list[Entry], metadata: dict[str, str]) -> None:
        self.path = path
        self.metadata = metadata
        self.entries = {entry.name: entry for entry in entries}  # in the order of the file
        self._mapped = mapped
        self._ordered = entries
        self._begins = [entry.begin for entry in entries]

    @property
    def names(self) -> list[str]:
        """The tensors' names in the order of the file."""
        return list(self.entries)

    @property
    def data(self) -> memoryview:
        """All bytes of the file, header included."""
        return memoryview(self._mapped)

    def __contains__(self, name: object) -> bool:
        return name in self.entries

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor; raises CheckpointError where there is none of that name."""
        if name not in self.entries:
            raise CheckpointError(f"{self.path} has no tensor {name!r}")
        return self.entries[name]

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self.entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.entry(name).shape

    def bytes_of(self, name: str) -> memoryview:
        """The bytes of a tensor."""
        entry = self.entry(name)
        return self.data[entry.begin : entry.end]

    def tensor(self, name: str) -> Tensor:
        """The tensor over the memory map, without a copy (one is made only where another tool's file
        places it against its item size). Raises CheckpointError on booleans that are neither 0 nor 1."""
        entry = self.entry(name)
        count = math.prod(entry.shape)
        if count == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        if entry.dtype == torch.bool and not set(self.bytes_of(name)) <= {0, 1}:
            raise CheckpointError(f"{self.path}: the boolean tensor {name!r} holds bytes other than 0 and 1")
        if entry.begin % entry.dtype.itemsize:
            copy = bytearray(self.bytes_of(name))
            return torch.frombuffer(copy, dtype=entry.dtype, count=count).reshape(entry.shape)
        mapped = torch.frombuffer(self._mapped, dtype=entry.dtype, count=count, offset=entry.begin)
        return mapped.reshape(entry.shape)

    def lazy(self, name: str) -> LazyTensor:
        """The tensor for `write_tensors`, read when its turn comes."""
        entry = self.entry(name)
        return LazyTensor(entry.dtype, entry.shape, lambda: self.tensor(name))

    def at(self, begin: int, end: int) -> list[str]:
        """Names of the tensors that have bytes in ``[begin, end)`` of the file."""
        first = max(0, bisect_right(self._begins, begin) - 1)
        found = []
        for entry in self._ordered[first:]:
            if entry.begin >= end:
                break
            if entry.begin < entry.end and entry.end > begin:
                found.append(entry.name)
        return found
