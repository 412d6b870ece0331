"""What a result depends on besides what was asked, so that unfinished work is never mixed with other work."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from gossamer import kernels
from gossamer.calibrate import fast_dtype
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


def sha256_of(*tokens: Tensor) -> str:
    """Of token ids, one tensor after the other."""
    return hashlib.sha256(b"".join(part.numpy().tobytes() for part in tokens)).hexdigest()
