"""One layer of any job: pruned, recorded, packed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from gossamer.calibrate import Gram
from gossamer.errors import GossamerError, MethodError
from gossamer.evaluate import reconstruction_error
from gossamer.matrices import Matrix, Packed
from gossamer.matrices.values import Quantized, value_type
from gossamer.prune import Combination, Layer, Pruned
from gossamer.prune.obs import OBS
from gossamer.prune.outliers import OutlierColumns, pack_apart
from gossamer.sparse import Unstructured

EDGE_ROWS = 2048  # of an embedding or head that are swept at once


def prune_layer(
    layer: Layer, combination: Combination, share: float | None, outliers: OutlierColumns | None = None
) -> Pruned:
    """The layer as the method makes it, at the sparsity ``share`` (None: dense), ``outliers`` apart; errors
    name it."""
    c = combination
    try:
        if outliers is not None:
            return outliers.prune(c.method, layer, c.pattern, share or 0.0, c.values, c.group)
        pruned = c.method.prune(layer, c.pattern, share or 0.0, c.values, c.group)
    except GossamerError as error:
        raise type(error)(f"{layer.name}: {error}") from error
    if pruned.mask is not None and not pruned.mask.any():
        raise MethodError(
            f"{layer.name}: none of its {layer.weight.shape[1]} inputs an output would keep a weight: leave "
            "it out, or prune less"
        )
    return pruned


def record_of(layer: Layer, pruned: Pruned) -> dict[str, Any]:
    """What is told of a layer: its sparsity, its relative error (of outputs where the inputs are known),
    ``unreached`` where no calibration token came by, and what the method says."""
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
        **({} if all(one.reached for one in layer.statistics.values()) else {"unreached": True}),
        **pruned.record,
    }


def mean_sparsity(layers: Sequence[Mapping[str, Any]]) -> float:
    """The share of zeros among the weights of records of layers."""
    sizes: list[int] = [one["shape"][0] * one["shape"][1] for one in layers]
    zeros = sum(size * float(one["sparsity"]) for size, one in zip(sizes, layers, strict=True))
    return zeros / sum(sizes)


def pack_layer(pruned: Pruned, combination: Combination) -> Matrix:
    """`pack_pruned`, or a sum where outliers are apart."""
    return pack_pruned(pruned, combination) if pruned.outliers is None else pack_apart(pruned)


def form_of(matrix: Matrix) -> dict[str, Any]:
    """What is told of a packed layer: how it lies, of a sum its first part, and its bits."""
    leaf = next(part for part in matrix.modules() if isinstance(part, Packed))
    return {
        "layout": leaf.layout,
        "values": leaf.values_name,
        "bits_per_weight": matrix.bits_per_weight,
    }


def pack_edge(layer: Layer, values: str, group: int) -> Packed:
    """An embedding or head, dense in ``values``: rounded by the OBS sweep where it is known what it
    multiplies, ``EDGE_ROWS`` at a time, else to the nearest."""
    if Gram not in layer.statistics:
        return Packed.pack(layer.weight, values, "dense", group)
    parts: list[Quantized] = []
    for rows in torch.split(layer.weight, EDGE_ROWS):
        pruned = OBS().prune(replace(layer, weight=rows), Unstructured(), 0.0, value_type(values), group)
        assert pruned.quantized is not None
        parts.append(pruned.quantized)
    codes, scales = (torch.cat(both) for both in zip(*((one.q, one.scales) for one in parts), strict=True))
    clamped = sum(one.clamped for one in parts)
    return Packed.pack(Quantized(codes, scales, group, value_type(values), clamped), layout="dense")


def pack_pruned(pruned: Pruned, combination: Combination) -> Packed:
    """A pruned layer in the layout that takes the fewest bytes."""
    if pruned.quantized is not None:
        return Packed.pack(pruned.quantized, mask=pruned.mask)
    return Packed.pack(pruned.weight, combination.values.name, mask=pruned.mask)
