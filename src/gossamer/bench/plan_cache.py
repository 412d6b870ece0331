"""What plans measured, kept for this machine: one JSON file in the user's cache, never in a checkpoint."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from gossamer import kernels
from gossamer.bench.machine import cpu_name, last_level_cache
from gossamer.errors import OutputError
from gossamer.kernels.native import native
from gossamer.matrices.atomic import atomic_file
from gossamer.models.cache import cache_folder
from gossamer.version import VERSION

FORMAT = 1  # of the file: another number measures anew


class PlanCache:
    """JSON values by name, of one machine and one way to compute (`fingerprint`).

    A file that is damaged, or of another machine, is as good as none; one that cannot be written is not
    missed, since a plan stands without it. ``refresh``: what was there is not used, and replaced.
    """

    def __init__(self, threads: int, *, refresh: bool = False, folder: Path | None = None) -> None:
        self._of = fingerprint(threads)
        name = hashlib.sha256(json.dumps(self._of, sort_keys=True).encode()).hexdigest()[:32]
        self.path = (folder or cache_folder() / "plans") / f"{name}.json"
        self._held = {} if refresh else self._read()

    def get(self, name: str) -> Any:
        """The value, or None."""
        return self._held.get(name)

    def put(self, name: str, value: Any) -> None:
        """Keeps ``value``, beside whatever another process has put there meanwhile."""
        self._held[name] = value
        content = {"format": FORMAT, "of": self._of, "measured": {**self._read(), **self._held}}
        data = json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
        with suppress(OSError, OutputError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(self.path, needed=len(data)) as file:
                file.write(data)

    def _read(self) -> dict[str, Any]:
        with suppress(OSError, ValueError, RecursionError):
            found = json.loads(self.path.read_text(encoding="utf-8"))
            if isinstance(found, dict) and (found.get("format"), found.get("of")) == (FORMAT, self._of):
                measured = found.get("measured")
                return measured if isinstance(measured, dict) else {}
        return {}


def fingerprint(threads: int) -> dict[str, Any]:
    """All that decides how long a product takes, and is the same for every weight: the processor, its caches,
    threads, instruction set, and the code."""
    return {
        "cpu": cpu_name(),
        "cache": last_level_cache(),
        "threads": threads,
        "isa": kernels.isa(),
        "gossamer": VERSION,
        "kernels": hashlib.sha256(Path(native().__file__).read_bytes()).hexdigest(),
        "torch": torch.__version__,
    }
