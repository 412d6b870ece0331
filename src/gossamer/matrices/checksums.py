"""Checksums of files: sha256 for keeping, and a CRC per 4 MiB for checking in parallel at load."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CHUNK = 4 << 20  # bytes for each CRC


@dataclass(frozen=True)
class Checksums:
    """``size`` in bytes, ``sha256`` in hex, and the CRC-32 (zlib's) of each 4 MiB, the last one shorter."""

    size: int
    sha256: str
    crc32: tuple[int, ...]


class Digest:
    """Checksums of bytes that arrive piece by piece."""

    def __init__(self) -> None:
        self._size = 0
        self._sha256 = hashlib.sha256()
        self._crcs: list[int] = []

    def update(self, data: bytes | memoryview) -> None:
        """Adds the next bytes (a contiguous buffer of single bytes)."""
        view = memoryview(data)
        self._sha256.update(view)
        while len(view):
            filled = self._size % CHUNK
            part = view[: CHUNK - filled]
            if filled == 0:
                self._crcs.append(0)
            self._crcs[-1] = zlib.crc32(part, self._crcs[-1])
            self._size += len(part)
            view = view[len(part) :]

    def result(self) -> Checksums:
        """The checksums of everything so far."""
        return Checksums(self._size, self._sha256.hexdigest(), tuple(self._crcs))


def checksums_of(path: Path) -> Checksums:
    """Reads the file ``path`` once. Raises OSError."""
    digest = Digest()
    with open(path, "rb") as file:
        while piece := file.read(CHUNK):
            digest.update(piece)
    return digest.result()


def damaged_chunks(data: memoryview, crc32: Sequence[int]) -> list[int]:
    """Indices of the 4 MiB chunks of ``data`` whose CRC is not the given one, in rising order.

    Runs in threads (zlib's CRC lets the interpreter go), so pages of a memory map come in at the disk's
    speed. ``crc32`` must hold one entry a chunk, else every chunk past the shorter one counts as damaged.
    """
    count = -(-len(data) // CHUNK)
    both = min(count, len(crc32))

    def wrong(index: int) -> bool:
        return zlib.crc32(data[index * CHUNK : (index + 1) * CHUNK]) != crc32[index]

    if both <= 1:
        bad = [index for index in range(both) if wrong(index)]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            bad = [index for index, is_wrong in enumerate(pool.map(wrong, range(both))) if is_wrong]
    return bad + list(range(both, max(count, len(crc32))))
