"""The work folder: what an interrupted run needs to go on, and the proof that it is the same run.

    OUT.work/
        state.json        fingerprint of the run, next block, checksums of its inputs (the one truth)
        inputs-007.bin    the next block's inputs: windows x seqlen x hidden, raw
        dense-007.bin     the same as the dense model has them, where somebody asks for them
        block-000.*       results of finished blocks, written by whoever walks
        lock              empty; locked by the run at work

Every file is written beside and renamed, ``state.json`` last: a run killed at any moment either has
finished a block or has not.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from gossamer.errors import GossamerError, OutputError, ResumeError

if sys.platform != "win32":
    import fcntl

CHUNK = 16 << 20
_STATE = "state.json"
_LOCK = "lock"
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


class WorkFolder:
    """A folder that one run owns. ``fingerprint`` is all that the result depends on, JSON-able: settings,
    model, tokens, versions, threads, instruction set. As a context it is locked against other runs, and
    leaves nothing behind where work is refused by a GossamerError before any result was kept, so that the
    mended command may begin.

    Raises ResumeError where the folder belongs to another run, one is at work in it, or it is no work folder
    at all.
    """

    def __init__(self, path: Path, fingerprint: dict[str, Any]) -> None:
        self.path = path
        self.fingerprint = json.loads(json.dumps(fingerprint))
        self.resumed = False
        self.next_block = 0
        self._crcs: dict[str, int | None] = {}  # of the next block's inputs, by stream
        self._lock: BinaryIO | None = None
        if path.exists():
            self._resume()
        else:
            try:
                path.mkdir(parents=True)
            except OSError as error:
                raise OutputError(f"cannot make the work folder {path}: {error.strerror}") from error
            self._save()

    def _resume(self) -> None:
        state_file = self.path / _STATE
        if not state_file.is_file():
            if not self.path.is_dir() or any(self.path.iterdir()):
                raise ResumeError(f"{self.path.name} exists and is no work folder of gossamer; move it away")
            self._save()
            return
        self._acquire()  # nothing is read or swept away while another run writes
        self._release()
        try:
            state = json.loads(state_file.read_text())
            theirs, self.next_block = state["fingerprint"], int(state["next_block"])
            self._crcs = dict(state["inputs"])
        except (ValueError, KeyError, TypeError) as error:
            raise ResumeError(f"{self.path.name}/state.json is damaged; delete {self.path.name}") from error
        if theirs != self.fingerprint:
            changed = _changed(theirs, self.fingerprint)
            key = changed[0]
            was, now = theirs.get(key), self.fingerprint.get(key)
            if isinstance(was, dict) and isinstance(now, dict):  # of settings, say, the first that differs
                inner = _changed(was, now)[0]
                key, was, now = f"{key}.{inner}", was.get(inner), now.get(inner)
            raise ResumeError(
                f"{self.path.name} holds work of another run: it differs in {', '.join(changed)} "
                f"({key} was {was!r}, now {now!r}). Run the same command as before to go on, or delete "
                f"{self.path.name} to start anew"
            )
        self.resumed = True
        for stale in self.path.glob("*.tmp"):
            stale.unlink()

    def _save(self) -> None:
        state = {
            "fingerprint": self.fingerprint,
            "next_block": self.next_block,
            "inputs": self._crcs,
        }
        data = json.dumps(state, indent=1, sort_keys=True).encode()
        self.write(_STATE, data)

    def write(self, name: str, data: bytes) -> None:
        """Writes ``data`` to the file ``name`` atomically; raises OutputError where that cannot be."""
        beside = self.path / (name + ".tmp")
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, self.path / name)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise _unwritten(f"{name} in {self.path.name}", error) from error

    def block_file(self, index: int, suffix: str = ".safetensors") -> Path:
        return self.path / f"block-{index:03d}{suffix}"

    def inputs_file(self, index: int, stream: str = "inputs") -> Path:
        """The inputs of block ``index``: ``inputs`` as the walk hands them on, or ``dense``."""
        return self.path / f"{stream}-{index:03d}.bin"

    def block_done(self, index: int, **following: Inputs | None) -> None:
        """Block ``index`` and the next one's inputs by stream are on disk: a run goes on from here."""
        self.next_block = index + 1
        self._crcs = {stream: inputs.crc for stream, inputs in following.items() if inputs is not None}
        self._save()
        for stale in self.path.glob(f"*-{index:03d}.bin"):
            stale.unlink(missing_ok=True)

    def open_inputs(self, shape: tuple[int, ...], dtype: torch.dtype, stream: str = "inputs") -> Inputs:
        """The next block's inputs; raises ResumeError where they are missing or damaged."""
        return self.checked(self.inputs_file(self.next_block, stream), stream, shape, dtype)

    def streams(self) -> list[str]:
        """The streams that the last finished block left."""
        return list(self._crcs)

    def checked(self, path: Path, stream: str, shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
        """The stream that lies at ``path``; raises ResumeError where it is missing or damaged."""
        inputs = Inputs(path, shape, dtype)
        crc = self._crcs.get(stream)
        if crc is not None and inputs.checksum() != crc:
            raise ResumeError(f"{inputs.path.name} in {self.path.name} is damaged; delete {self.path.name}")
        inputs.crc = crc
        return inputs

    def __enter__(self) -> WorkFolder:
        self._acquire()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, GossamerError) and not self._holds_results():
            self.remove()
        self._release()

    def _acquire(self) -> None:
        """Locks the folder until `_release` or the end of this process; on Windows nothing is locked."""
        if sys.platform == "win32":
            return
        try:
            self._lock = (self.path / _LOCK).open("ab")
        except OSError as error:
            raise _unwritten(f"{_LOCK} in {self.path.name}", error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._release()
            raise ResumeError(
                f"another run is at work in {self.path.name}: wait for it, or stop it"
            ) from error
        except OSError:
            pass  # a file system without locks

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _holds_results(self) -> bool:
        """Whether more lies there than the first block's inputs, which cost one pass to have again."""
        return self.next_block > 0 or any(
            file.name not in (_STATE, _LOCK) and file.suffix not in (".bin", ".tmp")
            for file in self.path.iterdir()
        )

    def remove(self) -> None:
        self._release()  # some network file systems keep files that are open
        shutil.rmtree(self.path, ignore_errors=True)


class Inputs:
    """Hidden states ``(windows, seqlen, hidden)`` on disk, read and written a few windows at a time: the
    page cache keeps them in memory as long as there is room, and they spill where there is not."""

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.path, self.shape, self.dtype = path, shape, dtype
        self.crc: int | None = None

    @property
    def window_bytes(self) -> int:
        return int(np.prod(self.shape[1:])) * self.dtype.itemsize

    def read(self, start: int, stop: int) -> Tensor:
        """Windows ``start`` to ``stop`` as a tensor of their own."""
        stop = min(stop, self.shape[0])
        data = bytearray((stop - start) * self.window_bytes)
        with open(self.path, "rb") as file:
            file.seek(start * self.window_bytes)
            if file.readinto(data) != len(data):
                raise ResumeError(f"{self.path.name} is shorter than its windows")
        return torch.frombuffer(data, dtype=self.dtype).reshape(stop - start, *self.shape[1:])

    def checksum(self) -> int:
        crc = 0
        try:
            with open(self.path, "rb") as file:
                while chunk := file.read(CHUNK):
                    crc = zlib.crc32(chunk, crc)
        except OSError as error:
            raise ResumeError(f"{self.path.name} is missing from the work folder") from error
        return crc

    def written(self, parts: Iterator[Tensor]) -> Inputs:
        """Writes ``parts`` one after another, beside and then in place; returns itself."""
        beside = self.path.with_suffix(".tmp")
        crc = 0
        try:
            with open(beside, "wb") as file:
                for part in parts:
                    data = part.contiguous().to(self.dtype).view(torch.uint8).reshape(-1).numpy().data
                    crc = zlib.crc32(data, crc)
                    file.write(data)
            os.replace(beside, self.path)
        except OSError as error:
            beside.unlink(missing_ok=True)
            raise _unwritten(self.path.name, error) from error
        self.crc = crc
        return self


def _unwritten(what: str, error: OSError) -> OutputError:
    again = "make room and run" if error.errno in _NO_ROOM else "run"
    return OutputError(
        f"cannot write {what}: {error.strerror or error}. Finished blocks are kept; {again} the same command "
        "again"
    )


def _changed(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(key for key in one.keys() | other.keys() if one.get(key) != other.get(key))
