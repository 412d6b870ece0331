"""Loads checkpoints: a transformers model whose structured matrices lie in memory-mapped files.

A checkpoint is a Hugging Face folder (config.json, tokenizer) with gossamer.json (see `manifest`) and one
gossamer.safetensors: a matrix of the parameter NAME as tensors ``NAME.values``, ``NAME.masks``,
``NAME.scales``, ``NAME.offsets`` (docs/architecture.md, "Packed weights"; other kinds of matrices as their
own tensors), and all else under its own name and dtype. config.json is that of the dense model, so
transformers reads it; the weights have a name of their own, so that plain ``from_pretrained`` refuses the
folder and does not start from random ones: load with this module, or export a dense folder first.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import CheckpointError, GossamerError
from gossamer.matrices import Matrix
from gossamer.models.contents import Contents, Verify, open_checkpoint
from gossamer.models.manifest import is_checkpoint, read_file, read_manifest
from gossamer.models.naming import state_of
from gossamer.models.place import place_matrix
from gossamer.models.skeleton import empty_model
from gossamer.nn.experts import take_apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["is_checkpoint", "load_checkpoint", "read_manifest"]

_LAYER_COUNT = re.compile(r"(n|num)(_\w+)?_layers?")
_CONFIG_LIMIT = 64 << 20  # bytes
_BUFFER_LIMIT = 1 << 30  # bytes of rotary tables and the like that a configuration may ask for


def load_checkpoint(
    path: str | Path,
    *,
    verify: Verify = "crc",
    dtype: torch.dtype | None = None,
    huge_pages: bool = False,
) -> PreTrainedModel:
    """The model of the checkpoint in the folder ``path``, ready to run: evaluation mode, no gradients.

    Its linears and embeddings are StructuredLinear and StructuredEmbedding over memory-mapped sections,
    which are checked (sizes, offsets, the popcount of every group) before any kernel reads them. ``verify``:
    ``"crc"`` also reads every byte once and compares checksums; ``"none"`` leaves that out. ``dtype``: of
    what is not packed and of activations; None keeps each tensor as it is stored. ``huge_pages``: weights are
    read into memory of huge pages instead of mapped (`open_tensors`).

    Raises CheckpointError for whatever is missing or damaged, naming the tensor or file. The files must not
    be truncated in place while the model lives (the system ends a process that reads a mapped page that is
    gone); replacing the folder by another is fine.
    """
    contents = open_checkpoint(Path(path), verify, huge_pages=huge_pages)
    model = _empty_model(contents)
    sources = _sources(contents, model)
    activations = dtype or _common_dtype(contents)
    _place_plain(contents, model, sources, dtype)
    matrices: dict[str, Matrix] = {}
    for name, stored in sources.items():
        if stored in contents.manifest.matrices:
            if stored not in matrices:
                matrices[stored] = contents.matrix(stored)
            try:
                place_matrix(model, name, matrices[stored], activations)
            except GossamerError as error:
                raise CheckpointError(f"{contents.path}: the matrix {stored!r}: {error}") from error
    model.requires_grad_(False)
    model.config.dtype = activations
    _set_generation_config(contents, model)
    return model.eval()


def _empty_model(contents: Contents) -> PreTrainedModel:
    """The model of config.json with parameters on the meta device, after its size was seen to be that of the
    stored tensors: a damaged configuration must not cost memory or time."""
    file = contents.path / "config.json"
    _check_layer_counts(contents, file)
    try:
        with torch.device("meta"):
            sketch = sketch_of(contents)
    except Exception as error:  # a damaged configuration may break transformers anywhere
        raise CheckpointError(f"{file} describes no model: {error}") from error
    _sources(contents, sketch)
    for name, tensor in state_of(sketch):
        _check_shape(contents, name, tensor)
    size = sum(buffer.numel() * buffer.element_size() for buffer in sketch.buffers())
    if size > _BUFFER_LIMIT:
        raise CheckpointError(f"{file} asks for {size:,} bytes of tables beside the weights: damaged")
    try:
        return sketch_of(contents)
    except Exception as error:
        raise CheckpointError(f"{file} describes no model: {error}") from error


def sketch_of(contents: Contents) -> PreTrainedModel:
    """The model of a checkpoint's config.json, parameters on the meta device, with the layers that it stores:
    experts are apart but where they were left fused."""
    model = empty_model(contents.path)
    take_apart(model, keep={*contents.manifest.matrices, *contents.plain})
    return model


def _check_layer_counts(contents: Contents, file: Path) -> None:
    try:
        config = json.loads(read_file(file, _CONFIG_LIMIT))
        for key, value in _numbers(config):
            if _LAYER_COUNT.fullmatch(key) and value > len(contents.weights.names):
                raise CheckpointError(
                    f"{file} says {key} = {value}, but there are only {len(contents.weights.names)} tensors"
                )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            if isinstance(inner, (int, float)):
                yield key, inner
            yield from _numbers(inner)


def _sources(contents: Contents, model: nn.Module) -> dict[str, str]:
    """Every parameter and saved buffer of ``model``, by each of its names, to the stored matrix or tensor
    that it takes its value from. Raises CheckpointError naming what is missing, and what nobody asks for."""
    manifest = contents.manifest
    stored = {*manifest.matrices, *contents.plain}
    for name, target in manifest.ties.items():
        if target not in stored or name in stored:
            raise CheckpointError(f"{contents.path}: the tie of {name!r} to {target!r} leads nowhere")
    found: dict[str, str] = {}
    by_tensor: dict[int, str] = {}
    state = list(state_of(model))
    for name, tensor in state:
        source = manifest.ties.get(name, name)
        if source in stored:
            found[name] = source
            by_tensor.setdefault(id(tensor), source)
    for name, tensor in state:
        if name not in found:
            if id(tensor) not in by_tensor:
                raise CheckpointError(f"{contents.path}: the parameter {name!r} is missing")
            found[name] = by_tensor[id(tensor)]
    for name in [*sorted(stored), *manifest.ties]:
        if name not in found:
            raise CheckpointError(f"{contents.path}: config.json describes no parameter {name!r}")
    return found


def _check_shape(contents: Contents, name: str, tensor: Tensor) -> None:
    source = contents.manifest.ties.get(name, name)
    if source in contents.weights:
        shape = contents.weights.shape(source)
        if shape != tuple(tensor.shape):
            raise CheckpointError(
                f"{contents.path}: the tensor {source!r} is {list(shape)}, but config.json asks for "
                f"{list(tensor.shape)}"
            )
        if contents.weights.dtype(source).is_floating_point != tensor.dtype.is_floating_point:
            raise CheckpointError(
                f"{contents.path}: the tensor {source!r} is {contents.weights.dtype(source)}, "
                f"but the model holds {tensor.dtype}"
            )
    elif source in contents.manifest.matrices:
        described = contents.manifest.matrices[source].get("shape")
        if described not in (list(tensor.shape), list(tensor.shape)[::-1]):
            raise CheckpointError(
                f"{contents.path}: the matrix {source!r} is {described}, but config.json asks for "
                f"{list(tensor.shape)}"
            )


def _common_dtype(contents: Contents) -> torch.dtype:
    """The dtype that most unpacked floating tensors are stored in: that of activations."""
    dtypes = [contents.weights.dtype(name) for name in contents.plain]
    counts = Counter(dtype for dtype in dtypes if dtype.is_floating_point)
    return counts.most_common(1)[0][0] if counts else torch.float32


def _place_plain(
    contents: Contents, model: nn.Module, sources: dict[str, str], dtype: torch.dtype | None
) -> None:
    made: dict[str, nn.Parameter] = {}
    for name, stored in sources.items():
        if stored in contents.manifest.matrices:
            continue
        module_name, _, last = name.rpartition(".")
        module = model.get_submodule(module_name)
        tensor = contents.weights.tensor(stored)
        if last in module._buffers:
            module._buffers[last] = tensor.clone()
            continue
        if stored not in made:
            value = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
            made[stored] = nn.Parameter(value, requires_grad=False)
        module._parameters[last] = made[stored]


def _set_generation_config(contents: Contents, model: PreTrainedModel) -> None:
    if "generation_config.json" not in contents.manifest.files:
        return
    from transformers import GenerationConfig

    try:
        model.generation_config = GenerationConfig.from_pretrained(contents.path, local_files_only=True)
    except Exception as error:  # a damaged file may break transformers anywhere
        raise CheckpointError(f"{contents.path / 'generation_config.json'} is damaged: {error}") from error
