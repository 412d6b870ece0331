"""What a model or checkpoint is, by its configuration, manifest and file headers: no weights are loaded."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gossamer.matrices.tensor_header import DTYPES
from gossamer.models.folders import read_about
from gossamer.models.manifest import MANIFEST, Manifest, is_checkpoint, read_manifest
from gossamer.models.verify import misfits
from gossamer.paths import expanded
from gossamer.progress import Progress, silent


@dataclass(frozen=True)
class LayerError:
    """Relative squared error of layers' outputs on the calibration inputs (``kind`` output_error), or of
    their weights where none were needed (weight_error): the mean over layers and the worst."""

    kind: str
    mean: float
    worst: float
    worst_layer: str


@dataclass(frozen=True)
class CheckpointFacts:
    """A Gossamer checkpoint. ``parameters``: of the whole model, pruned ones counted, tied ones once;
    ``linear_parameters``, ``linear_bytes``: of the compressed layers inside the blocks, as stored;
    ``sparsity``: what the masks prune of them, as the maker recorded it; ``file_bytes``: of the folder;
    ``weight_file_bytes``: of its weights; ``layouts``: how many matrices lie in which layout and values;
    ``uncompressed``: parameters by name of tensors of two dimensions or more that no matrix holds, such as
    experts that cannot be taken apart; ``unreached``: layers (of experts) that no calibration token came by,
    pruned by their weights alone; ``made``: all that the maker recorded; ``problems``: files
    that are missing or not of the size they were written with (`gossamer verify` reads them whole)."""

    label: str
    parameters: int
    linear_layers: int
    linear_parameters: int
    linear_bytes: int
    file_bytes: int
    weight_file_bytes: int
    layouts: dict[str, int]
    uncompressed: dict[str, int]
    unreached: int
    sparsity: float | None
    sparsity_requested: float | None
    sparsity_of: str | None
    layer_error: LayerError | None
    made: dict[str, Any]
    problems: tuple[str, ...]

    @property
    def linear_bits(self) -> float:
        """Bits per weight of the compressed layers alone: values, masks, scales, offsets, padding."""
        return 8 * self.linear_bytes / self.linear_parameters if self.linear_parameters else 0.0

    @property
    def all_bits(self) -> float:
        """Bits per weight, all in: the weight file over all parameters."""
        return 8 * self.weight_file_bytes / self.parameters if self.parameters else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        told = {"kind": "checkpoint", "linear_bits": self.linear_bits, "all_bits": self.all_bits}
        return {**told, **asdict(self)}


@dataclass(frozen=True)
class ModelFacts:
    """A model that is no checkpoint. ``prunable_layers``, ``prunable_parameters``: linear layers inside the
    ``blocks``; ``head_parameters``: 0 for a head that is ``tied`` to the embeddings; ``dtypes``: how many
    parameters are stored as what; ``weight_file_bytes``: of its safetensors files; ``source_bytes``: of the
    file that these were made from, where it is another."""

    label: str
    architecture: str
    license: str | None
    origin: str | None
    parameters: int
    blocks: int
    prunable_layers: int
    prunable_parameters: int
    embedding_parameters: int
    head_parameters: int
    tied: bool
    dtypes: dict[str, int]
    weight_file_bytes: int
    source_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"kind": "model", **asdict(self)}


def describe(source: str | Path, progress: Progress = silent) -> CheckpointFacts | ModelFacts:
    """The facts of a Gossamer checkpoint or of any model that can be compressed. Raises CheckpointError,
    ModelError where it cannot be walked, or TextError."""
    path = expanded(source)
    return describe_checkpoint(path) if is_checkpoint(path) else describe_model(str(source), progress)


def describe_checkpoint(path: Path) -> CheckpointFacts:
    """The facts of the checkpoint in the folder ``path``, by gossamer.json and the sizes of its files. Raises
    CheckpointError."""
    manifest = read_manifest(path)
    made = manifest.made
    layers = [layer for layer in made.get("layers", ()) if isinstance(layer, dict)]
    sections = _sections(manifest)
    linear = [name for name in manifest.matrices if any(part.isdigit() for part in name.split("."))]
    packed = {tensor for names in sections.values() for tensor in names}
    plain = {name: tensor.shape for name, tensor in manifest.tensors.items() if name not in packed}
    shapes = [description["shape"] for description in manifest.matrices.values()]
    return CheckpointFacts(
        label=path.resolve().name,
        parameters=sum(math.prod(shape) for shape in [*shapes, *plain.values()]),
        linear_layers=len(linear),
        linear_parameters=sum(math.prod(manifest.matrices[name]["shape"]) for name in linear),
        linear_bytes=sum(_bytes(manifest, tensor) for name in linear for tensor in sections[name]),
        file_bytes=sum(file.size for file in manifest.files.values()) + (path / MANIFEST).stat().st_size,
        weight_file_bytes=sum(f.size for name, f in manifest.files.items() if name.endswith(".safetensors")),
        layouts=dict(Counter(_form(description) for description in manifest.matrices.values())),
        uncompressed={name: math.prod(shape) for name, shape in plain.items() if len(shape) > 1},
        unreached=sum(bool(layer.get("unreached")) for layer in layers),
        sparsity=made.get("sparsity"),
        sparsity_requested=made.get("sparsity_requested"),
        sparsity_of=made.get("sparsity_of"),
        layer_error=_layer_error(layers),
        made=made,
        problems=misfits(path, manifest),
    )


def describe_model(source: str, progress: Progress = silent) -> ModelFacts:
    """The facts of the model that ``source`` names; parameters are counted on the meta device. Raises
    ModelError."""
    from gossamer.models.skeleton import WeightFiles, empty_model
    from gossamer.models.sources import resolve
    from gossamer.models.walk import find_parts, prunable, weight_of
    from gossamer.nn.experts import take_apart

    found = resolve(source, progress=progress)
    files = WeightFiles(found.folder)
    model = empty_model(found.folder)
    take_apart(model)
    parts = find_parts(model)
    linears = [weight_of(layer).numel() for block in parts.blocks for layer in prunable(block).values()]
    dtypes: Counter[str] = Counter()
    for name in files.names():
        dtypes[str(files.dtype(name)).removeprefix("torch.")] += math.prod(files.shape(name))
    head = 0 if parts.tied or parts.head is None else _size(model.get_submodule(parts.head))
    return ModelFacts(
        label=found.label,
        architecture=type(model).__name__,
        license=found.license,
        origin=found.origin,
        parameters=_size(model),
        blocks=len(parts.blocks),
        prunable_layers=len(linears),
        prunable_parameters=sum(linears),
        embedding_parameters=sum(_size(model.get_submodule(name)) for name in parts.embeddings),
        head_parameters=head,
        tied=parts.tied,
        dtypes=dict(dtypes),
        weight_file_bytes=weight_bytes(found.folder),
        source_bytes=source_bytes(found.folder),
    )


def weight_bytes(folder: Path) -> int:
    """Bytes of a folder's safetensors files."""
    return sum(path.stat().st_size for path in Path(folder).glob("*.safetensors"))


def source_bytes(folder: Path) -> int:
    """Bytes of the weights as their source has them: a GGUF file is larger once it is safetensors."""
    noted = read_about(folder).get("weight_bytes")
    return noted if isinstance(noted, int) else weight_bytes(folder)


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _sections(manifest: Manifest) -> dict[str, list[str]]:
    """Names of the tensors that each matrix is stored as."""
    found: dict[str, list[str]] = {name: [] for name in manifest.matrices}
    for tensor in manifest.tensors:
        owner = tensor
        while "." in owner and owner not in found:
            owner = owner.rpartition(".")[0]
        if owner in found:
            found[owner].append(tensor)
    return found


def _bytes(manifest: Manifest, tensor: str) -> int:
    record = manifest.tensors[tensor]
    return math.prod(record.shape) * DTYPES[record.dtype].itemsize


def _form(description: dict[str, Any]) -> str:
    parts = [_form(part) for part in description.get("parts", ()) if isinstance(part, dict)]
    if description.get("kind") in ("sum", "selected") and parts:
        return " + ".join(parts)
    if "layout" in description:
        return f"{description['layout']} {description.get('values', '')}".strip()
    return str(description.get("kind", "unknown"))


def _layer_error(layers: list[dict[str, Any]]) -> LayerError | None:
    for kind in ("output_error", "weight_error"):
        errors = {str(layer["name"]): float(layer[kind]) for layer in layers if layer.get(kind) is not None}
        if errors:
            worst = max(errors, key=errors.__getitem__)
            return LayerError(kind, sum(errors.values()) / len(errors), errors[worst], worst)
    return None
