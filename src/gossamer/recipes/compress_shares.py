"""How a compression's layers share its sparsity: measured in a walk of its own where they compete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gossamer.calibrate import Statistic, WorkFolder
from gossamer.calibrate.stream import Visit
from gossamer.errors import OutputError
from gossamer.models.walk import ModelParts, prunable, weight_of
from gossamer.prune import Combination, Layer
from gossamer.prune.method import check_finite
from gossamer.sparse.allocate import NEED_SCORES, LayerInfo, allocation
from gossamer.sparse.masks import unit_scores


class Walk(Protocol):
    """Visits the blocks of the dense model, with statistics of ``needs`` (None: the method's)."""

    def __call__(
        self, work: WorkFolder, stage: str, *, needs: tuple[type[Statistic], ...] | None = None
    ) -> Iterator[Visit]: ...


def allocate(
    parts: ModelParts,
    combination: Combination,
    work: WorkFolder,
    walk: Walk,
    layer_of: Callable[[Visit, str], Layer],
) -> dict[str, float | None]:
    """Each layer's sparsity; what the allocation needs to know is measured first and kept in ``work``."""
    done = work.path / "allocation.json"
    if done.exists():
        return json.loads(done.read_text())  # type: ignore[no-any-return]
    name, layers = combination.allocation, [LayerInfo(n, shape) for n, shape in _shapes(parts)]
    if combination.sparsity > 0 and name in NEED_SCORES:
        layers = _scored(
            layers, combination, WorkFolder(work.path / "scores", work.fingerprint), walk, layer_of
        )
    shares = allocation(name)(layers, combination.sparsity)
    work.write(done.name, json.dumps(shares).encode())
    return shares


def _shapes(parts: ModelParts) -> Iterator[tuple[str, tuple[int, int]]]:
    for block in parts.blocks:
        for inner, module in prunable(block).items():
            out, features = weight_of(module).shape
            yield f"{block.name}.{inner}", (out, features)


def _scored(
    layers: list[LayerInfo],
    combination: Combination,
    work: WorkFolder,
    walk: Walk,
    layer_of: Callable[[Visit, str], Layer],
) -> list[LayerInfo]:
    """The layers with the method's scores, which lie on disk."""
    for visit in walk(work, "scoring"):
        for name in visit.layers:
            layer = layer_of(visit, name)
            check_finite(layer)
            units = unit_scores(combination.method.scores(layer), combination.pattern).contiguous()
            work.write(f"{name}.scores", units.float().numpy().tobytes())
    return [
        LayerInfo(layer.name, layer.shape, partial(_read_scores, work.path / f"{layer.name}.scores"))
        for layer in layers
    ]


def _read_scores(path: Path) -> Tensor:
    try:
        return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    except OSError as error:
        raise OutputError(f"the scores {path.name} vanished from the work folder") from error
