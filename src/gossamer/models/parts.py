"""A few matrices in one file: what a job keeps of finished work until it writes the whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.errors import CheckpointError, MatrixError
from gossamer.matrices import Matrix, from_description
from gossamer.matrices.storage import open_tensors, write_tensors

_KEY = "gossamer_part"


def write_part(path: Path, matrices: Mapping[str, Matrix]) -> None:
    """Writes matrices by name into the safetensors file ``path``, atomically and with fixed bytes. Raises
    OutputError."""
    tensors = {
        f"{name}/{section}": tensor
        for name, matrix in matrices.items()
        for section, tensor in matrix.tensors().items()
    }
    descriptions = {name: matrix.describe() for name, matrix in matrices.items()}
    about = json.dumps(descriptions, sort_keys=True, separators=(",", ":"), allow_nan=False)
    write_tensors(path, tensors, metadata={_KEY: about})


def read_part(path: Path) -> dict[str, Matrix]:
    """What `write_part` wrote, memory-mapped, by name in sorted order. Raises CheckpointError where the file
    is missing or damaged."""
    file = open_tensors(path)
    try:
        descriptions: dict[str, Any] = json.loads(file.metadata[_KEY])
        shares: dict[str, dict[str, Tensor]] = {name: {} for name in descriptions}
        for full in file.names:
            name, _, section = full.rpartition("/")
            shares[name][section] = file.tensor(full)
        return {name: from_description(descriptions[name], shares[name]) for name in sorted(shares)}
    except (KeyError, ValueError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} was not written by Gossamer, or is damaged") from error
    except MatrixError as error:
        raise CheckpointError(f"{path} is damaged: {error}") from error
