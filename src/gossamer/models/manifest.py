"""gossamer.json: what a checkpoint holds, how it was made, and by what one sees that it is undamaged.

```
{ "format": "gossamer", "schema": 1,
  "crc32":    CRC-32 of the canonical JSON of all else, so that damage to this file itself is noticed
  "files":    {name: {"size", "sha256", "crc32": [one per 4 MiB]}}, every file but this one
  "made":     how: method, sparsity, pattern, calibration, per-layer records; whatever the maker gave
  "matrices": {parameter name: description of a structured matrix},
  "tensors":  {name in gossamer.safetensors: {"dtype", "shape", "crc32"}},
  "ties":     {parameter name: the stored parameter that it shares} }
```

The canonical JSON has sorted keys, no spaces and ASCII only; the file itself is the same with an indent of
one space, and any other bytes count as damage.
"""

from __future__ import annotations

import json
import math
import stat
import zlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from gossamer.errors import CheckpointError, OutputError
from gossamer.matrices.checksums import CHUNK, Checksums
from gossamer.matrices.tensor_header import parse_json

SCHEMA = 1
MANIFEST = "gossamer.json"
WEIGHTS = "gossamer.safetensors"  # a name that plain transformers does not take for its own weights
SIZE_LIMIT = 256 << 20  # bytes of a manifest that are read at all

_Count = Annotated[int, Field(ge=0, lt=1 << 63)]
_Crc = Annotated[int, Field(ge=0, lt=1 << 32)]


class FileRecord(BaseModel):
    """Size and checksums of one file of the folder."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    size: _Count
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    crc32: list[_Crc]

    @classmethod
    def of(cls, checksums: Checksums) -> FileRecord:
        return cls(size=checksums.size, sha256=checksums.sha256, crc32=list(checksums.crc32))

    @model_validator(mode="after")
    def _one_crc_a_chunk(self) -> FileRecord:
        if len(self.crc32) != -(-self.size // CHUNK):
            raise ValueError(f"{len(self.crc32)} CRCs for {self.size} bytes")
        return self


class TensorRecord(BaseModel):
    """One tensor of the weights file; ``dtype`` in safetensors' words."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    dtype: str
    shape: list[_Count]
    crc32: _Crc


class Manifest(BaseModel):
    """The content of gossamer.json."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["gossamer"]
    schema_version: int = Field(alias="schema", ge=1)
    files: dict[str, FileRecord]
    made: dict[str, Any]
    matrices: dict[str, dict[str, Any]]
    tensors: dict[str, TensorRecord]
    ties: dict[str, str]

    @field_validator("files")
    @classmethod
    def _inside_the_folder(cls, files: dict[str, FileRecord]) -> dict[str, FileRecord]:
        for name in files:
            path = PurePosixPath(name)
            odd = "\\" in name or "\0" in name or str(path) != name or not path.parts
            if odd or path.is_absolute() or ".." in path.parts:
                raise ValueError(f"{name!r} is not a file of this folder")
        for name in (WEIGHTS, "config.json"):
            if name not in files:
                raise ValueError(f"{name} is not listed")
        if MANIFEST in files:
            raise ValueError(f"{MANIFEST} lists itself")
        return files


def render_manifest(manifest: Manifest) -> bytes:
    """The bytes of gossamer.json; raises OutputError where ``made`` or a description is not plain JSON."""
    try:
        table = manifest.model_dump(mode="python", by_alias=True)
        return _render({**table, "crc32": _crc(table)})
    except (TypeError, ValueError, RecursionError) as error:
        raise OutputError(f"what was to be written into {MANIFEST} is not plain JSON: {error}") from error


def read_manifest(path: Path) -> Manifest:
    """Reads and checks gossamer.json in the folder ``path``; nothing else is opened.

    Raises CheckpointError where it is missing, damaged, or of a newer schema.
    """
    file = Path(path) / MANIFEST
    data = read_file(file, SIZE_LIMIT)
    try:
        table = parse_json(data)
        schema = table.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise CheckpointError(
                f"{file} has schema {schema}, written by a newer Gossamer; this one reads up to {SCHEMA}: "
                "upgrade gossamer"
            )
        if data != _render(table):
            raise ValueError("its bytes are not those that Gossamer writes")
        if table.pop("crc32", None) != _crc(table):
            raise ValueError("its CRC-32 does not match its content")
        return Manifest.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the whole"
        raise CheckpointError(f"{file} is damaged: {where}: {first['msg']}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def is_checkpoint(path: Path) -> bool:
    """Whether ``path`` is a folder with a gossamer.json (which may still turn out to be damaged)."""
    return (Path(path) / MANIFEST).is_file()


def read_file(file: Path, limit: int) -> bytes:
    """All bytes of a regular file of at most ``limit`` bytes; raises CheckpointError."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{file} is not a regular file")
        if status.st_size > limit:
            raise CheckpointError(f"{file} has {status.st_size:,} bytes, more than the {limit:,} it may have")
        return file.read_bytes()
    except FileNotFoundError as error:
        if file.parent.is_dir():
            raise CheckpointError(
                f"{file.parent} is not a Gossamer checkpoint, or not a whole one: it has no {file.name}"
            ) from error
        raise CheckpointError(f"there is no folder {file.parent}") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror or error}") from error


def plain_json(value: Any, where: str = "made") -> Any:
    """``value`` as plain JSON: tuples become lists, numbers of numpy and PyTorch Python's, and numbers that
    are not finite null (JSON has no word for them). Raises OutputError naming the place of anything else."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise OutputError(f"{where} has the key {key!r}, which is not a text")
        return {key: plain_json(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_json(inner, f"{where}[{index}]") for index, inner in enumerate(value)]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return plain_json(value.item(), where)
    raise OutputError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def _render(table: dict[str, Any]) -> bytes:
    return json.dumps(table, sort_keys=True, indent=1, allow_nan=False).encode() + b"\n"


def _crc(table: dict[str, Any]) -> int:
    text = json.dumps(table, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return zlib.crc32(text.encode())
