"""Tiny checkpoints with every kind of packed weight, and ways to damage them consistently."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gossamer.matrices import Matrix, Packed
from gossamer.matrices.checksums import checksums_of
from gossamer.models import CheckpointWriter, find_parts, prunable, weight_of
from tiny import tiny_model, tiny_tokenizer

MADE = {"method": "random", "pattern": "unstructured", "sparsity": 0.5, "layers": [{"error": 0.25}]}
# (values, layout) of a block's linears in turn: every layout and every kind of value
FORMATS = [
    ("int4", "bitmap"),
    ("int4", "32:64"),
    ("int8", "dense"),
    ("float32", "bitmap"),
    ("bfloat16", "bitmap"),
    ("int3", "32:64"),
    ("int3", "bitmap"),
    ("nl4", "dense"),
    ("nl3", "32:64"),
]
FLOATS = [("float32", "bitmap"), ("float32", "dense"), ("float32", "32:64")]


def base_folder(folder: Path, arch: str = "llama", **changes: Any) -> Path:
    """A Hugging Face folder of a tiny model with its tokenizer."""
    tiny_model(arch, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def half_mask(weight: torch.Tensor) -> torch.Tensor:
    """Keeps 32 of each 64 inputs, at random."""
    out, width = weight.shape
    scores = torch.rand(out, width, generator=torch.Generator().manual_seed(width))
    mask = torch.zeros(out, width, dtype=torch.bool)
    for start in range(0, width, 64):
        part = scores[:, start : start + 64]
        top = part.topk(part.shape[1] // 2, dim=1).indices
        mask[:, start : start + 64].scatter_(1, top, True)
    return mask


def tiny_matrices(model: Any, formats: list[tuple[str, str]], head: str = "int8") -> dict[str, Matrix]:
    """Packed weights for all prunable linears of ``model``, and one for its embedding and tied head."""
    made: dict[str, Matrix] = {}
    for block in find_parts(model).blocks:
        for index, (name, layer) in enumerate(prunable(block).items()):
            values, layout = formats[index % len(formats)]
            weight = weight_of(layer)
            mask = None if layout == "dense" else half_mask(weight)
            made[f"{block.name}.{name}.weight"] = Packed.pack(weight, values, layout, mask=mask)
    parts = find_parts(model)
    embedding = model.get_input_embeddings()
    name = next(n for n, m in model.named_modules() if m is embedding)
    made[f"{name}.weight"] = Packed.pack(embedding.weight.detach(), head, "dense")
    if parts.head is not None:
        weight = model.get_submodule(parts.head).weight.detach()
        made[f"{parts.head}.weight"] = (
            made[f"{name}.weight"] if parts.tied else Packed.pack(weight, head, "dense")
        )
    return made


def filled_writer(
    out: Path, base: Path, model: Any, matrices: dict[str, Matrix], **options: Any
) -> CheckpointWriter:
    """A writer that holds all of ``model``, ready to finish."""
    writer = CheckpointWriter(out, base, **options)
    for name, matrix in matrices.items():
        writer.add_matrix(name, matrix)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in matrices:
            writer.add_tensor(name, tensor)
    return writer


def tiny_checkpoint(
    folder: Path,
    arch: str = "llama",
    formats: list[tuple[str, str]] = FORMATS,
    head: str = "int8",
    **changes: Any,
) -> tuple[Path, Any, dict[str, Matrix]]:
    """Writes ``folder/base`` and the checkpoint ``folder/out``; returns it, the dense model, the matrices."""
    model = tiny_model(arch, **changes)
    base = base_folder(folder / "base", arch, **changes)
    matrices = tiny_matrices(model, formats, head)
    return filled_writer(folder / "out", base, model, matrices).finish(MADE), model, matrices


def densified(model: Any, matrices: dict[str, Matrix]) -> Any:
    """``model`` with the weights that ``matrices`` stand for, written in by plain PyTorch."""
    with torch.no_grad():
        for name, matrix in matrices.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            dense = matrix.to_dense().float()
            layer.weight.copy_(dense.T if type(layer).__name__ == "Conv1D" else dense)
    return model


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a safetensors file, by hand."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: dict[str, Any], data: bytes) -> None:
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % 64)
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def tampered(folder: Path, target: Path, change: Callable[[Path, dict[str, Any]], None]) -> Path:
    """A copy of a checkpoint after ``change(folder, manifest)``, with every checksum made right again."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(folder, target)
    manifest = json.loads((target / "gossamer.json").read_text())
    change(target, manifest)
    seal(target, manifest)
    return target


def seal(folder: Path, manifest: dict[str, Any]) -> None:
    """Writes gossamer.json with checksums of what lies in ``folder``."""
    files = manifest.get("files")
    for name in files if isinstance(files, dict) else ():
        if (folder / name).is_file():
            found = checksums_of(folder / name)
            files[name] = {"size": found.size, "sha256": found.sha256, "crc32": list(found.crc32)}
    try:
        header, data = read_header(folder / "gossamer.safetensors")
        for name, entry in header.items():
            if name in manifest["tensors"]:
                begin, end = entry["data_offsets"]
                manifest["tensors"][name]["crc32"] = zlib.crc32(data[begin:end])
    except (ValueError, KeyError, TypeError):
        pass
    manifest.pop("crc32", None)
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["crc32"] = zlib.crc32(text.encode())
    (folder / "gossamer.json").write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")


def patch_data(folder: Path, name: str, change: Callable[[bytearray], None]) -> None:
    """Changes the bytes of one tensor in place."""
    path = folder / "gossamer.safetensors"
    header, _ = read_header(path)
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    begin, end = header[name]["data_offsets"]
    part = raw[start + begin : start + end]
    change(part)
    raw[start + begin : start + end] = part
    path.write_bytes(raw)


def all_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` by its name."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
