"""One layer of any job: pruned, recorded, packed."""

from __future__ import annotations

from typing import Any

from gossamer.calibrate import Gram
from gossamer.errors import GossamerError
from gossamer.evaluate import reconstruction_error
from gossamer.matrices import Packed
from gossamer.prune import Combination, Layer, Pruned


def prune_layer(layer: Layer, combination: Combination, share: float | None) -> Pruned:
    """The layer as the method makes it, at the sparsity ``share`` (None: dense); errors name it."""
    c = combination
    try:
        return c.method.prune(layer, c.pattern, share or 0.0, c.values, c.group)
    except GossamerError as error:
        raise type(error)(f"{layer.name}: {error}") from error


def record_of(layer: Layer, pruned: Pruned) -> dict[str, Any]:
    """What is told of a layer: its sparsity, its relative error (of outputs where the inputs are known), and
    what the method says."""
    gram = layer.statistics.get(Gram)
    kept = layer.weight.numel() if pruned.mask is None else int(pruned.mask.sum())
    matrix = gram.matrix if isinstance(gram, Gram) else None
    return {
        "name": layer.name,
        "shape": list(layer.weight.shape),
        "sparsity": 1.0 - kept / layer.weight.numel(),
        "weight_error" if matrix is None else "output_error": reconstruction_error(
            layer.weight, pruned.weight, matrix
        ),
        **pruned.record,
    }


def pack_pruned(pruned: Pruned, combination: Combination) -> Packed:
    """A pruned layer in the layout that takes the fewest bytes."""
    if pruned.quantized is not None:
        return Packed.pack(pruned.quantized, mask=pruned.mask)
    return Packed.pack(pruned.weight, combination.values.name, mask=pruned.mask)
