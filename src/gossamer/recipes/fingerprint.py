"""What a result depends on besides what was asked, so that unfinished work is never mixed with other work."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gossamer import kernels
from gossamer.calibrate import fast_dtype
from gossamer.matrices.checksums import checksums_of
from gossamer.models.contents import open_checkpoint
from gossamer.models.manifest import is_checkpoint
from gossamer.models.skeleton import WeightFiles
from gossamer.version import VERSION


def surroundings() -> dict[str, Any]:
    """Versions, threads and instruction sets, as JSON: the same bits come of the same ones."""
    import transformers

    return {
        "gossamer": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "instruction set": f"{kernels.isa()} / {torch.backends.cpu.get_cpu_capability()}",
        "multiplied in": str(fast_dtype()),
    }


def made_with() -> dict[str, Any]:
    """Of the `surroundings` what a finished checkpoint says."""
    found = surroundings()
    return {key: found[key] for key in ("gossamer", "torch", "transformers", "instruction set")}


def files_of(folder: Path) -> dict[str, str]:
    """The sha256 of each file of a checkpoint, or of a model's folder that of its configuration and of each
    weight file, by name."""
    if is_checkpoint(folder):
        return {name: entry.sha256 for name, entry in open_checkpoint(folder).manifest.files.items()}
    paths = (folder / "config.json", *WeightFiles(folder).paths)
    return {path.name: checksums_of(path).sha256 for path in paths}


def sha256_of(*tokens: Tensor) -> str:
    """Of token ids and their shapes, one tensor after the other."""
    parts = (str(tuple(part.shape)).encode() + part.numpy().tobytes() for part in tokens)
    return hashlib.sha256(b"".join(parts)).hexdigest()
