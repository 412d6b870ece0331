"""Essential sparsity: how far a model is pruned in one shot, without data, before its quality drops."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
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
from gossamer.recipes.layer_shares import competing_scores
from gossamer.recipes.load import LoadedModel, load
from gossamer.recipes.measure import windows_for
from gossamer.sparse import parse_pattern
from gossamer.sparse.allocate import LayerInfo

GRID = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)


@dataclass(frozen=True)
class EssentialSparsity:
    """``curve``: perplexity at each sparsity of the prunable weights; ``drop``: where its logarithm begins to
    rise fast, None where it nowhere does; ``nm``: perplexity under N:M patterns, by name; ``smoke_test``:
    measured on the prose inside Python."""

    model: str
    text: str
    smoke_test: bool
    method: str
    pattern: str
    curve: tuple[tuple[float, float], ...]
    drop: DropPoint | None
    nm: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def essential_sparsity(
    model: str | Path | LoadedModel,
    *,
    method: str = "magnitude",
    pattern: str = "unstructured:model",
    grid: Sequence[float] = GRID,
    nm: Sequence[str] = (),
    text: TextSource = None,
    windows: int | None = 20,
    seqlen: int | None = 2048,
    progress: Progress = silent,
) -> EssentialSparsity:
    """The curve of perplexity over the sparsities of ``grid``, each pruned anew from the dense weights: by
    default as in Jaiswal et al. 2023, the smallest go in one shot, wherever in the model they lie.

    ``method``: one that needs no calibration; ``pattern``: one without a sparsity of its own, within each
    weight (``unstructured:tensor``, ``16x4``) or over the model; ``nm``: N:M patterns to measure beside it,
    such as ``2:4``; ``text``, ``windows``, ``seqlen``: as in `quality`. The model has its dense weights again
    afterwards. Raises a GossamerError for whatever a person can mend, before anything is measured.
    """
    over = "global" if getattr(parse_pattern(pattern), "group", "") == "model" else "uniform"
    cases = [check_combination(method, pattern=pattern, sparsity=s, allocation_name=over) for s in grid]
    shares = [check_combination(method, pattern=one) for one in nm]
    if cases and cases[0].method.needs:
        raise MethodError(
            f"essential sparsity is that of pruning without data, and {method} needs calibration"
        )
    drop_point([(s, s) for s in grid])
    loaded = model if isinstance(model, LoadedModel) else load(model, engine="transformers")
    if any(isinstance(module, StructuredLinear) for module in loaded.model.modules()):
        raise MethodError(f"{loaded.label} is compressed already: give the dense model")
    read = read_text(text, part="measure")
    ids = windows_for(loaded, read, seqlen, windows)
    found: list[float] = []
    with _restored(loaded.model) as weights:
        for index, case in enumerate([*cases, *shares]):
            progress("sparsities", index, len(cases) + len(shares))
            _prune(weights, case)
            found.append(evaluate(loaded.model, ids).perplexity)
    progress("sparsities", len(found), len(found))
    curve = tuple(zip((case.sparsity for case in cases), found, strict=False))
    return EssentialSparsity(
        loaded.label,
        read.label,
        read.smoke,
        method,
        str(cases[0].pattern),
        curve,
        drop_point([(s, math.log(perplexity)) for s, perplexity in curve]),
        dict(zip((str(case.pattern) for case in shares), found[len(cases) :], strict=True)),
    )


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
    def scores(name: str) -> Tensor:
        return competing_scores(Layer(name, weights[name][1].float()), case)

    infos = [
        LayerInfo(name, tuple(dense.shape), partial(scores, name)) for name, (_, dense) in weights.items()
    ]
    shares = case.split(infos, case.sparsity)
    for name, (weight, dense) in weights.items():
        found = case.method.prune(
            Layer(name, dense.float()),
            case.pattern,
            shares[name] or 0.0,
            value_type("float32"),
            case.group,
        )
        weight.copy_(found.weight)
