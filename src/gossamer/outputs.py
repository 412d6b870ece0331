"""Where a job keeps what is not finished."""

from __future__ import annotations

import os
from pathlib import Path

from gossamer.errors import OutputError


def work_of(out: Path) -> Path:
    """The folder beside the output ``out`` that holds its unfinished work."""
    out = out if out.name not in ("", "..") else Path(os.path.abspath(out))
    if not out.name:
        raise OutputError(f"{out} cannot be an output: name a folder that does not exist yet")
    return out.with_name(out.name + ".work")
