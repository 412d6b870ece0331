"""The files of a checkpoint, opened and checked; no model is built here."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from gossamer import kernels
from gossamer.errors import CheckpointError, MatrixError
from gossamer.matrices import Matrix, Packed, from_description
from gossamer.matrices.checksums import CHUNK, damaged_chunks
from gossamer.matrices.storage import TensorFile, open_tensors
from gossamer.matrices.tensor_header import DTYPE_NAMES
from gossamer.models.manifest import WEIGHTS, FileRecord, Manifest, read_file, read_manifest

Verify = Literal["crc", "none"]
_SMALL = 1 << 30  # bytes of a configuration or tokenizer file that are read at all
_NAMED = 5  # damaged tensors that an error names


@dataclass(frozen=True)
class Contents:
    """What `open_checkpoint` found: tensors are memory-mapped, nothing is unpacked."""

    path: Path
    manifest: Manifest
    weights: TensorFile

    @cached_property
    def plain(self) -> tuple[str, ...]:
        """Names of the parameters and buffers that are stored as they are."""
        packed = {name for sections in self._sections.values() for name in sections.values()}
        return tuple(name for name in self.weights.names if name not in packed)

    @cached_property
    def _sections(self) -> dict[str, dict[str, str]]:
        """Matrix name to {section: tensor name}; of matrices whose names begin alike, the longest claims."""
        found: dict[str, dict[str, str]] = {name: {} for name in self.manifest.matrices}
        for tensor in self.weights.names:
            owner = tensor
            while "." in owner:
                owner = owner.rpartition(".")[0]
                if owner in found:
                    found[owner][tensor[len(owner) + 1 :]] = tensor
                    break
        return found

    def matrix(self, name: str) -> Matrix:
        """The matrix of a parameter over memory-mapped tensors, with sizes, offsets and the popcount of every
        group checked. Raises CheckpointError naming it."""
        tensors = {section: self.weights.tensor(full) for section, full in self._sections[name].items()}
        try:
            matrix = from_description(self.manifest.matrices[name], tensors)
            for leaf in matrix.modules():
                if isinstance(leaf, Packed):
                    _check_leaf(leaf)
        except Exception as error:  # a hostile description may break any kind of matrix in its own way
            raise CheckpointError(f"{self.path}: the matrix {name!r} is damaged: {error}") from error
        return matrix


def _check_leaf(leaf: Packed) -> None:
    """What making a Packed does not check itself: finite scales, and all that the native kernels rely on."""
    if leaf.scales is not None and not bool(leaf.scales.isfinite().all()):
        raise MatrixError("a scale is not finite")
    if kernels.native_available():
        leaf.leaf()


def open_checkpoint(path: Path, verify: Verify = "crc", *, huge_pages: bool = False) -> Contents:
    """Opens the checkpoint in the folder ``path`` and checks its files.

    Always: gossamer.json, the header of the weights file, and that names, dtypes and shapes are the ones
    gossamer.json lists. With ``verify="crc"`` also every byte of every file, per 4 MiB in parallel threads.
    ``huge_pages``: see `open_tensors`.
    Raises CheckpointError naming the file, and the tensor where the damage lies in one.
    """
    path = Path(path)
    manifest = read_manifest(path)
    weights = open_tensors(path / WEIGHTS, huge_pages=huge_pages)
    _check_tensors(weights, manifest)
    for name, record in manifest.files.items():
        data = weights.data if name == WEIGHTS else memoryview(read_file(path / name, _SMALL))
        if len(data) != record.size:
            raise CheckpointError(
                f"{path / name} has {len(data):,} bytes and was written with {record.size:,}"
            )
        if verify == "crc" and (bad := damaged_chunks(data, record.crc32)):
            where = damaged_places(weights, manifest, bad) if name == WEIGHTS else _bytes(bad[0], record)
            raise CheckpointError(f"{path / name} is damaged: its checksum is wrong for {where}")
    return Contents(path, manifest, weights)


def damaged_places(weights: TensorFile, manifest: Manifest, chunks: list[int]) -> str:
    """Names what lies damaged in the given 4 MiB chunks of the weights file: tensors, or its header."""
    touched = {name for index in chunks for name in weights.at(index * CHUNK, (index + 1) * CHUNK)}
    broken = [
        name for name in weights.names if name in touched and not tensor_intact(weights, manifest, name)
    ]
    if not broken:
        return "its header"
    more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
    named = ", ".join(repr(name) for name in broken[:_NAMED])
    return f"the tensor{'s' if len(broken) > 1 else ''} {named}{more}"


def tensor_intact(weights: TensorFile, manifest: Manifest, name: str) -> bool:
    """Whether the bytes of a tensor have the CRC-32 that they were written with."""
    return zlib.crc32(weights.bytes_of(name)) == manifest.tensors[name].crc32


def _bytes(chunk: int, record: FileRecord) -> str:
    return f"bytes {chunk * CHUNK:,} to {min(record.size, (chunk + 1) * CHUNK):,}"


def _check_tensors(weights: TensorFile, manifest: Manifest) -> None:
    _check_same_names(f"{weights.path}", weights.entries, manifest.tensors)
    for name, entry in weights.entries.items():
        record = manifest.tensors[name]
        kind = DTYPE_NAMES[entry.dtype]
        if (kind, list(entry.shape)) != (record.dtype, record.shape):
            raise CheckpointError(
                f"{weights.path}: the tensor {name!r} is {kind} {list(entry.shape)} there, "
                f"and was written as {record.dtype} {record.shape}"
            )


def _check_same_names(where: str, found: Mapping[str, object], wanted: Mapping[str, object]) -> None:
    for name in wanted:
        if name not in found:
            raise CheckpointError(f"{where}: the tensor {name!r} is missing")
    for name in found:
        if name not in wanted:
            raise CheckpointError(f"{where}: the tensor {name!r} was not written there by Gossamer")
