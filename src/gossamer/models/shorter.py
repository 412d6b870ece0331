"""A model without some of its blocks, as a plain Hugging Face folder: names, configuration, weights."""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from gossamer.errors import ModelError
from gossamer.matrices.atomic import atomic_file, atomic_folder
from gossamer.matrices.storage import LazyTensor
from gossamer.models.checkpoint_writer import copy_companions
from gossamer.models.export import SHARD_BYTES, write_shards
from gossamer.models.naming import Source, state_of
from gossamer.models.skeleton import WeightFiles, empty_model, read_parameter
from gossamer.models.walk import find_parts
from gossamer.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RECORD = "gossamer_shrink.json"
_PLACES = frozenset({"layer_idx", "layer_id", "layer_number", "block_idx", "training"})


def shorter_config(config: PreTrainedConfig, removed: Collection[int]) -> PreTrainedConfig:
    """``config`` of a model without the blocks ``removed`` (indices from 0): their number, and every list
    that has one entry a block (``layer_types`` and the like). Raises ModelError where it counts no blocks."""
    facts = config.to_dict()
    key = getattr(config, "attribute_map", {}).get("num_hidden_layers", "num_hidden_layers")
    total = facts.get(key)
    if not isinstance(total, int):
        raise ModelError(f"the configuration {type(config).__name__} does not say how many blocks there are")
    for name, value in facts.items():
        if isinstance(value, list) and len(value) == total and "layer" in name:
            facts[name] = [entry for index, entry in enumerate(value) if index not in removed]
    facts[key] = total - len(set(removed))
    made: PreTrainedConfig = type(config).from_dict(facts)
    return made


def write_shorter(
    model: PreTrainedModel,
    files: WeightFiles,
    removed: Collection[int],
    out: Path,
    record: dict[str, Any],
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress = silent,
) -> Path:
    """Writes ``model`` (a skeleton over ``files``) without the blocks ``removed`` into the new folder.

    Experts must not be taken apart. Weights keep their stored dtype and ties, one is in memory at a time;
    tokenizer files are copied; ``record`` is kept beside, as RECORD. Raises ModelError where the config
    cannot describe what is left (such as one that says "every fourth block"), OutputError where ``out`` is
    taken or not writable.
    """
    parts = find_parts(model)
    kept = [index for index in range(len(parts.blocks)) if index not in removed]
    if getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise ModelError("this model scales attention by a block's place: no block can be taken away")
    with atomic_folder(out) as folder:
        copy_companions(files.folder, folder, without=("config.json", RECORD))
        config = shorter_config(model.config, removed)
        config.architectures = [type(model).__name__]
        config.save_pretrained(folder)
        _check_blocks(model, empty_model(folder), kept)
        write_shards(folder, _tensors(model, files, parts.blocks_name, kept), shard_bytes, progress)
        data = json.dumps(record, indent=1, sort_keys=True).encode() + b"\n"
        with atomic_file(folder / RECORD, needed=len(data)) as writer:
            writer.write(data)
    return out


def _tensors(
    model: PreTrainedModel, files: WeightFiles, blocks: str, kept: list[int]
) -> dict[str, LazyTensor]:
    """What is left by its new name, tied tensors once."""
    places = {str(old): str(new) for new, old in enumerate(kept)}
    found: dict[str, LazyTensor] = {}
    seen: set[int] = set()
    for name, tensor in state_of(model):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        new = name
        if name.startswith(f"{blocks}."):
            index, _, inner = name.removeprefix(f"{blocks}.").partition(".")
            if index not in places:
                continue
            new = f"{blocks}.{places[index]}.{inner}"
        source: Source = getattr(tensor, "gossamer_source", Source((name,)))
        dtype = files.dtype(source.names[0])
        found[new] = LazyTensor(dtype, tuple(tensor.shape), partial(read_parameter, tensor, name, files))
    return found


def _check_blocks(before: PreTrainedModel, after: PreTrainedModel, kept: list[int]) -> None:
    """Raises ModelError where a block that is left would be built otherwise in its new place."""
    old, new = find_parts(before).blocks, find_parts(after).blocks
    same = len(new) == len(kept) and all(
        _describe(old[index].module) == _describe(block.module)
        for index, block in zip(kept, new, strict=True)
    )
    if not same:
        raise ModelError(
            f"the configuration of {type(before).__name__} gives blocks their kind by their place: "
            "it cannot describe the model without these blocks"
        )


def _describe(block: nn.Module) -> list[Any]:
    """All that tells a block from another but its place and its weights."""
    found: list[Any] = []
    for name, module in block.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, (bool, int, float, str)) and key not in _PLACES and not key.startswith("_")
        }
        shapes = [(key, tuple(tensor.shape)) for key, tensor in module.named_parameters(recurse=False)]
        buffers = [(key, _values(tensor)) for key, tensor in module.named_buffers(recurse=False)]
        found.append((name, type(module).__name__, settings, shapes, buffers))
    return found


def _values(tensor: torch.Tensor) -> Any:
    return tuple(tensor.shape) if tensor.device.type == "meta" else (tensor.tolist(), str(tensor.dtype))
