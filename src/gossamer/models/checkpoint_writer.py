"""Writes checkpoints: a Hugging Face folder with packed tensors and gossamer.json, whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gossamer.errors import CheckpointError, OutputError
from gossamer.matrices import Matrix
from gossamer.matrices.atomic import atomic_file, atomic_folder, check_free
from gossamer.matrices.checksums import Checksums, Digest
from gossamer.matrices.storage import nbytes, write_tensors
from gossamer.matrices.tensor_header import DTYPE_NAMES
from gossamer.models.checkpoint import load_checkpoint
from gossamer.models.manifest import (
    MANIFEST,
    SCHEMA,
    WEIGHTS,
    FileRecord,
    Manifest,
    TensorRecord,
    plain_json,
    render_manifest,
)
from gossamer.progress import Progress, silent

# what a model needs besides weights: transformers' names for configuration, tokenizer and chat template
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "chat_template.json",
    "LICENSE",
    "LICENSE.txt",
    "LICENSE.md",
    "NOTICE",
    "gossamer_shrink.json",  # which blocks an earlier step took away
)


METADATA = {"format": "gossamer"}  # of the weight file


class CheckpointWriter:
    """Collects the parameters of one model and writes them as a checkpoint.

    ``out``: the folder to make; it must not exist, or be empty. ``base``: a Hugging Face folder whose
    configuration and tokenizer files are copied. ``scratch``: where the folder grows before it takes its name
    (emptied first, on the same disk); else ``OUT.tmp-…`` beside it. ``progress``: stage "writing", in bytes.

    Nothing is copied until `finish`, and then one tensor at a time: give tensors over memory maps
    (`open_tensors`, `read_part`) and a model of any size takes no more memory than one block.
    Raises OutputError where ``out`` is taken or ``base`` has no config.json.
    """

    def __init__(
        self, out: Path, base: Path, *, scratch: Path | None = None, progress: Progress = silent
    ) -> None:
        self.out, self.base, self.scratch = Path(out), Path(base), scratch
        self.progress = progress
        self._matrices: dict[str, Matrix] = {}
        self._plain: dict[str, Tensor] = {}
        self._ties: dict[str, str] = {}
        self._files: dict[str, bytes] = {}
        self._names: dict[int, str] = {}  # by the identity of what is stored, which the tables keep alive
        check_free(self.out)
        if not (self.base / "config.json").is_file():
            raise OutputError(f"{self.base} is no Hugging Face model folder: it has no config.json")

    def add_matrix(self, name: str, matrix: Matrix) -> None:
        """Adds the weight of the parameter ``name`` (such as ``model.layers.0.mlp.up_proj.weight``). The
        same object under a second name is stored once. Raises OutputError where the name is taken."""
        self._check_name(name)
        if not self._tied(name, matrix):
            self._matrices[name] = matrix

    def add_tensor(self, name: str, tensor: Tensor) -> None:
        """Adds a parameter or persistent buffer as it is, in its own dtype. The same object under a second
        name is stored once. Raises OutputError where the name is taken."""
        self._check_name(name)
        if not self._tied(name, tensor):
            self._plain[name] = tensor

    def add_file(self, name: str, content: bytes) -> None:
        """Adds a file of its own to the folder, listed and checked with the others; raises OutputError where
        the name is taken."""
        if name in self._files or name in (*COMPANIONS, WEIGHTS, MANIFEST):
            raise OutputError(f"the file {name!r} was added to the checkpoint twice")
        self._files[name] = content

    def finish(self, made: Mapping[str, Any]) -> Path:
        """Writes everything, loads it once to see that it is a whole model, and gives it the name ``out``.

        ``made``: how the model was made, as plain JSON (numbers that are not finite become null). The same
        input gives the same bytes, so put neither times nor paths into it. Returns ``out``. Raises
        OutputError where that is taken, the disk is full, or what was added is not a whole model of
        ``base``'s configuration; nothing of ``out`` exists then.
        """
        record = plain_json(dict(made))
        with atomic_folder(self.out, scratch=self.scratch) as folder:
            files = copy_companions(self.base, folder)
            for name, content in self._files.items():
                files[name] = _write(content, folder / name)
            stored = self._stored_tensors()
            total = sum(nbytes(tensor) for tensor in stored.values())
            written = write_tensors(
                folder / WEIGHTS,
                stored,
                metadata=METADATA,
                progress=lambda done: self.progress("writing", done, total),
            )
            files[WEIGHTS] = written.file
            manifest = Manifest(
                format="gossamer",
                schema=SCHEMA,
                files={name: FileRecord.of(checksums) for name, checksums in files.items()},
                made=record,
                matrices={name: plain_json(m.describe(), name) for name, m in self._matrices.items()},
                tensors={
                    name: TensorRecord(
                        dtype=DTYPE_NAMES[tensor.dtype], shape=list(tensor.shape), crc32=written.crc32[name]
                    )
                    for name, tensor in stored.items()
                },
                ties=self._ties,
            )
            data = render_manifest(manifest)
            # last of all: a folder without it is no checkpoint
            with atomic_file(folder / MANIFEST, needed=len(data)) as file:
                file.write(data)
            try:
                load_checkpoint(folder, verify="none")
            except CheckpointError as error:
                raise OutputError(f"{self.out} was not written, since it would not load: {error}") from error
        return self.out

    def _check_name(self, name: str) -> None:
        if name in self._matrices or name in self._plain or name in self._ties:
            raise OutputError(f"the parameter {name!r} was added to the checkpoint twice")

    def _tied(self, name: str, value: object) -> bool:
        first = self._names.setdefault(id(value), name)
        if first != name:
            self._ties[name] = first
        return first != name

    def _stored_tensors(self) -> dict[str, Tensor]:
        stored = dict(self._plain)
        for name, matrix in self._matrices.items():
            for section, tensor in matrix.tensors().items():
                full = f"{name}.{section}"
                if full in stored:
                    raise OutputError(f"two parameters of the checkpoint would both be stored as {full!r}")
                stored[full] = tensor
        return stored


def copy_companions(base: Path, folder: Path, without: tuple[str, ...] = ()) -> dict[str, Checksums]:
    """Copies configuration, tokenizer and licence files from ``base`` to ``folder``; checksums by name."""
    names = [name for name in COMPANIONS if name not in without and (base / name).is_file()]
    return {name: _copy(base / name, folder / name) for name in names}


def _copy(source: Path, target: Path) -> Checksums:
    digest = Digest()
    with open(source, "rb") as reader, atomic_file(target, needed=source.stat().st_size) as writer:
        while piece := reader.read(1 << 20):
            writer.write(piece)
            digest.update(piece)
    return digest.result()


def _write(content: bytes, target: Path) -> Checksums:
    digest = Digest()
    digest.update(content)
    with atomic_file(target, needed=len(content)) as writer:
        writer.write(content)
    return digest.result()
