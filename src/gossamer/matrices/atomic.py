"""Files and folders that appear whole or not at all: written beside, synced, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from gossamer.errors import OutputError

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def atomic_file(path: Path, *, needed: int | None = None) -> Iterator[BinaryIO]:
    """A binary file that takes the name ``path`` only when the block ends without an error.

    It is written as ``NAME.tmp-…`` beside ``path``, flushed, synced and renamed, and the folder is
    synced; on any error, Ctrl-C included, the temporary file is removed and ``path`` is as before.
    ``needed``: the bytes that will be written, for the message where the disk is full. Raises OutputError
    for every operating-system error.
    """
    path = Path(path)
    beside = path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        with open(beside, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
        sync_folder(path.parent)
    except BaseException as error:
        with suppress(OSError):
            beside.unlink()
        if isinstance(error, OSError):
            raise output_error(error, path, needed) from error
        raise


@contextmanager
def atomic_folder(path: Path, *, scratch: Path | None = None) -> Iterator[Path]:
    """A folder that takes the name ``path`` only when the block ends without an error.

    Yields an empty folder to write in: ``scratch`` where given (emptied first; on the file system of
    ``path``), else ``NAME.tmp-…`` beside ``path``. At the end every file in it is synced, and the folder
    is renamed; on any error it is removed. A process that is killed may leave it behind, but never
    under the name ``path``. Raises OutputError where ``path`` exists and is not an empty folder
    (nothing is overwritten), and for every operating-system error.
    """
    path = Path(path)
    check_free(path)
    beside = Path(scratch) if scratch else path.with_name(f"{path.name}.tmp-{secrets.token_hex(4)}")
    try:
        if scratch is not None and beside.exists():
            shutil.rmtree(beside)
        beside.mkdir(parents=True)
        yield beside
        _sync_tree(beside)
        path.parent.mkdir(parents=True, exist_ok=True)
        check_free(path)
        if path.exists():
            path.rmdir()
        os.rename(beside, path)
        sync_folder(path.parent)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        if isinstance(error, OSError):
            raise output_error(error, path, None) from error
        raise


def check_free(path: Path) -> None:
    """Raises OutputError unless ``path`` does not exist or is an empty folder, but not the current one."""
    path = Path(path)
    if not (path.exists() or path.is_symlink()):
        return
    if path.is_dir() and not path.is_symlink() and not any(path.iterdir()):
        if path.samefile("."):
            raise OutputError(f"{path} is the current folder, which cannot be replaced: name another output")
        return
    raise OutputError(f"{path} exists already, and nothing is overwritten: name another output, or remove it")


def sync_folder(folder: Path) -> None:
    """Makes renames inside ``folder`` survive a power cut, where the system can sync folders."""
    if os.name == "nt":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def output_error(error: OSError, path: Path, needed: int | None) -> OutputError:
    """What ``error`` means for somebody who wanted to write ``path``."""
    if error.errno in _NO_ROOM:
        wanted = "" if needed is None else f"{needed:,} bytes are needed, "
        return OutputError(
            f"cannot write {path}: {os.strerror(error.errno or 0)} "
            f"({wanted}{_free_bytes(path)} are free on that disk); make room there or name another output"
        )
    return OutputError(f"cannot write {path}: {error.strerror or error}")


def _free_bytes(path: Path) -> str:
    for folder in [path, *path.parents]:
        with suppress(OSError):
            return f"{shutil.disk_usage(folder).free:,}"
    return "an unknown number of"


def _sync_tree(folder: Path) -> None:
    for root, _, names in os.walk(folder):
        for name in names:
            handle = os.open(os.path.join(root, name), os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(root))
