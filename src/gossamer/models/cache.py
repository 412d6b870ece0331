"""Models made into folders once, kept by the checksum of what they came from, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gossamer.paths import expanded
from gossamer.progress import Progress

FORMAT = 2  # of the folders: another number makes them anew
PIECE = 1 << 22  # bytes read at once
_STALE_SECONDS = 24 * 3600


def cache_folder() -> Path:
    """Where the folders lie: ``GOSSAMER_CACHE``, else ``gossamer`` in the user's cache folder."""
    if chosen := os.environ.get("GOSSAMER_CACHE"):
        return expanded(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "gossamer"


def entry_folder(cache: Path, key: str) -> Path:
    """The folder made from what has the sha256 ``key``."""
    return cache / "models" / f"{key[:32]}-{FORMAT}"


def keep(entry: Path, fill: Callable[[Path], None]) -> None:
    """Makes the folder ``entry`` by ``fill``, unless it is there.

    Two processes may both do the work; the first to finish wins, and both go on with its result. Raises
    OutputError where the cache cannot be written.
    """
    if entry.is_dir():
        return
    # not at the top: a model that is in the cache is found without loading PyTorch
    from gossamer.errors import OutputError
    from gossamer.matrices.atomic import atomic_folder

    _remove_stale(entry.parent)
    try:
        with atomic_folder(entry) as folder:
            fill(folder)
    except OutputError:
        if not entry.is_dir():
            raise


def _remove_stale(folder: Path) -> None:
    """Leftovers of processes that were killed a day ago or longer."""
    for path in folder.glob("*.tmp-*"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def noted(note: Path, cache: Path) -> Path | None:
    """The folder that the file ``note`` points to, where both are there."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        entry = entry_folder(cache, str(json.loads(note.read_text(encoding="utf-8"))["sha256"]))
        if (entry / "config.json").is_file():
            return entry
    return None


def write_note(note: Path, key: str) -> None:
    """Lets the file ``note`` point to the folder of ``key``."""
    note.parent.mkdir(parents=True, exist_ok=True)
    beside = note.with_name(f"{note.name}.{os.getpid()}.tmp")
    beside.write_text(json.dumps({"sha256": key}), encoding="utf-8")
    os.replace(beside, note)


def sha256(path: Path, progress: Progress) -> str:
    """The sha256 of a file, in hexadecimal; ``progress``: stage "read", in bytes."""
    digest, done, total = hashlib.sha256(), 0, path.stat().st_size
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            done += len(piece)
            progress("read", done, total)
    return digest.hexdigest()
