"""A run's state on disk, so that a killed one goes on to the bit.

    OUT.work/
        state-000120.safetensors   what is tuned and the optimizer's moments, after step 120
        best-000080.safetensors    what was tuned at the best held-out loss
        loop.json                  which two files count, their checksums, and the loop's own numbers

Files are written beside and renamed, ``loop.json`` last, and older ones are removed after it.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from gossamer.calibrate import WorkFolder
from gossamer.errors import CheckpointError, ResumeError
from gossamer.matrices.storage import open_tensors, write_tensors

LOOP = "loop.json"


class Saves:
    """The states in the folder ``work``."""

    def __init__(self, work: WorkFolder) -> None:
        self.work = work

    def save(
        self,
        step: int,
        numbers: Mapping[str, Any],
        state: Mapping[str, Tensor],
        best: tuple[int, Mapping[str, Tensor]] | None,
    ) -> None:
        """Keeps ``state`` after ``step`` with the loop's ``numbers``; ``best``: the step and the values of
        the best held-out loss, None where those on disk still are. Raises OutputError where the disk is
        full."""
        record = self._record() or {"files": {}}
        files = {kind: found for kind, found in record["files"].items() if kind == "best"}
        for kind, at, tensors in [("state", step, state), *([("best", *best)] if best else [])]:
            name = f"{kind}-{at:06d}.safetensors"
            written = write_tensors(self.work.path / name, tensors)
            files[kind] = {"name": name, "crc32": dict(written.crc32)}
        self.work.write(LOOP, json.dumps({"numbers": dict(numbers), "files": files}).encode())
        kept = {found["name"] for found in files.values()}
        for path in self.work.path.glob("*-*.safetensors*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    def numbers(self) -> dict[str, Any] | None:
        """The loop's numbers of the last save, or None where there is none."""
        record = self._record()
        return None if record is None else record["numbers"]

    def tensors(self, kind: str) -> dict[str, Tensor]:
        """Those of ``state`` or ``best``, memory-mapped; raises ResumeError where they are damaged."""
        record = self._record()
        try:
            assert record is not None
            found = record["files"][kind]
            file = open_tensors(self.work.path / found["name"])
            for name in file.names:
                if zlib.crc32(file.bytes_of(name)) != found["crc32"][name]:
                    raise CheckpointError(name)
            return {name: file.tensor(name) for name in file.names}
        except (CheckpointError, KeyError, TypeError) as error:
            raise ResumeError(self._damaged(f"its {kind}")) from error

    def _record(self) -> dict[str, Any] | None:
        path = self.work.path / LOOP
        if not path.exists():
            return None
        try:
            record: dict[str, Any] = json.loads(path.read_text())
            return {"numbers": dict(record["numbers"]), "files": dict(record["files"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ResumeError(self._damaged(LOOP)) from error

    def _damaged(self, what: str) -> str:
        return f"{what} in {self.work.path.name} is damaged; delete {self.work.path.name}"
