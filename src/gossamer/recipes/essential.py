"""Essential sparsity: how far a model is pruned in one shot, without data, before its quality drops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gossamer.errors import MethodError
from gossamer.evaluate import evaluate
from gossamer.evaluate.drop_point import DropPoint, drop_point
from gossamer.matrices.values import value_type
from gossamer.models.text import TextSource, read_text
from gossamer.models.walk import find_parts, prunable, weight_of
from gossamer.nn import StructuredLinear
from gossamer.nn.experts import expert_weights, is_fused
from gossamer.progress import Progress, silent
from gossamer.prune import Combination, Layer, check_combination
from gossamer.recipes.load import LoadedModel, load
from gossamer.recipes.measure import windows_for

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class EssentialSparsity:
    """``curve``: perplexity at each sparsity of the prunable weights; ``drop``: where its logarithm begins to
    rise fast, None where it nowhere does."""

    model: str
    method: str
    pattern: str
    curve: tuple[tuple[float, float], ...]
    drop: DropPoint | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def essential_sparsity(
    model: str | Path | LoadedModel,
    *,
    method: str = "magnitude",
    pattern: str | None = None,
    grid: Sequence[float] = GRID,
    text: TextSource = None,
    windows: int | None = 20,
    seqlen: int = 2048,
    progress: Progress = silent,
) -> EssentialSparsity:
    """The curve of perplexity over the sparsities of ``grid``, each pruned anew from the dense weights.

    ``method``: one that needs no calibration; ``pattern``: one without a sparsity of its own; ``text``,
    ``windows``, ``seqlen``: as in `quality`. The model has its dense weights again afterwards. Raises a
    GossamerError for whatever a person can mend, before anything is measured.
    """
    cases = [check_combination(method, pattern=pattern, sparsity=s) for s in grid]
    if cases and cases[0].method.needs:
        raise MethodError(
            f"essential sparsity is that of pruning without data, and {method} needs calibration"
        )
    drop_point([(s, s) for s in grid])
    loaded = model if isinstance(model, LoadedModel) else load(model, engine="transformers")
    if any(isinstance(module, StructuredLinear) for module in loaded.model.modules()):
        raise MethodError(f"{loaded.label} is compressed already: give the dense model")
    ids = windows_for(loaded, read_text(text, part="measure"), seqlen, windows)
    curve = []
    with _restored(loaded.model) as weights:
        for index, case in enumerate(cases):
            progress("sparsities", index, len(cases))
            _prune(weights, case)
            curve.append((case.sparsity, evaluate(loaded.model, ids).perplexity))
    progress("sparsities", len(cases), len(cases))
    drop = drop_point([(s, math.log(perplexity)) for s, perplexity in curve])
    return EssentialSparsity(loaded.label, method, str(cases[0].pattern), tuple(curve), drop)


@contextmanager
def _restored(model: nn.Module) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """The prunable weights ``(out, in)`` by name, those of fused experts too, with copies that they get
    back."""
    weights: dict[str, Tensor] = {}
    for block in find_parts(model).blocks:
        weights |= {f"{block.name}.{name}": weight_of(layer) for name, layer in prunable(block).items()}
        for name, module in block.module.named_modules():
            if is_fused(module):
                each = expert_weights(module).items()
                weights |= {f"{block.name}.{name}.{inner}": weight for inner, weight in each}
    found = {name: (weight, weight.clone()) for name, weight in weights.items()}
    try:
        yield found
    finally:
        for weight, dense in found.values():
            weight.copy_(dense)


def _prune(weights: dict[str, tuple[Tensor, Tensor]], case: Combination) -> None:
    for name, (weight, dense) in weights.items():
        found = case.method.prune(
            Layer(name, dense.float()), case.pattern, case.sparsity, value_type("float32"), case.group
        )
        weight.copy_(found.weight)
