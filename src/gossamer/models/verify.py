"""Verifies a checkpoint to the last bit: sha256 of every file, and every matrix by itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import CheckpointError
from gossamer.matrices.checksums import CHUNK, Checksums, checksums_of
from gossamer.matrices.storage import open_tensors
from gossamer.models.contents import damaged_places, open_checkpoint
from gossamer.models.manifest import WEIGHTS, FileRecord, Manifest, read_manifest
from gossamer.progress import Progress, silent


@dataclass(frozen=True)
class FileReport:
    """One file: ``size`` in bytes and ``sha256`` as they were written, and what is wrong, or None."""

    name: str
    size: int
    sha256: str
    problem: str | None


@dataclass(frozen=True)
class VerifyReport:
    """All files of a checkpoint, how many matrices were checked, and ``problems`` (empty: all is well)."""

    path: Path
    files: tuple[FileReport, ...]
    matrices: int
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.problems


def verify_checkpoint(path: str | Path, progress: Progress = silent) -> VerifyReport:
    """Reads every file of the checkpoint ``path`` once and compares it with what was written, then checks
    every matrix as loading does.

    Damage is reported, not raised; only a gossamer.json that is missing or damaged, without which nothing can
    be compared, raises CheckpointError.
    """
    path = Path(path)
    manifest = read_manifest(path)
    files = []
    for index, (name, record) in enumerate(manifest.files.items()):
        progress("verifying files", index, len(manifest.files))
        files.append(FileReport(name, record.size, record.sha256, _problem(path, name, record, manifest)))
    progress("verifying files", len(files), len(files))
    problems = [f"{file.name}: {file.problem}" for file in files if file.problem]
    checked = 0
    if not problems:
        for problem in _matrix_problems(path, manifest):
            checked += problem is None
            problems += [problem] if problem else []
            progress("verifying matrices", checked + len(problems), len(manifest.matrices))
    return VerifyReport(path, tuple(files), checked, tuple(problems))


def misfits(path: Path, manifest: Manifest) -> tuple[str, ...]:
    """What a look at the files' sizes shows, without reading them: those that are missing, cut short or
    longer than written."""
    found = ((name, _size_problem(path / name, record)) for name, record in manifest.files.items())
    return tuple(f"{name}: {problem}" for name, problem in found if problem)


def _size_problem(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    return None if size == record.size else f"has {size:,} bytes and was written with {record.size:,}"


def _problem(path: Path, name: str, record: FileRecord, manifest: Manifest) -> str | None:
    if problem := _size_problem(path / name, record):
        return problem
    try:
        found = checksums_of(path / name)
    except OSError as error:
        return f"cannot be read: {error.strerror or error}"
    if found.sha256 == record.sha256:
        return None
    return f"is damaged: {_where(path, name, found, record, manifest)}"


def _where(path: Path, name: str, found: Checksums, record: FileRecord, manifest: Manifest) -> str:
    bad = [index for index, crc in enumerate(record.crc32) if found.crc32[index] != crc]
    if not bad:
        return "its sha256 differs, though its CRCs do not"
    if name == WEIGHTS:
        try:
            return f"the checksum is wrong for {damaged_places(open_tensors(path / name), manifest, bad)}"
        except (CheckpointError, KeyError) as error:
            return str(error)
    return f"the checksum is wrong for the 4 MiB from byte {bad[0] * CHUNK:,} on"


def _matrix_problems(path: Path, manifest: Manifest) -> Iterator[str | None]:
    try:
        contents = open_checkpoint(path, "none")
    except CheckpointError as error:
        yield str(error)
        return
    for name in manifest.matrices:
        try:
            contents.matrix(name)
            yield None
        except CheckpointError as error:
            yield str(error)
