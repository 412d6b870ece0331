"""Allocations: one budget, split over layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import MethodError, ScoreError
from gossamer.sparse import count_pruned
from gossamer.sparse.allocate import LayerInfo, allocation, global_, uniform


def layers_of(*scores: torch.Tensor) -> list[LayerInfo]:
    return [LayerInfo(f"layer{i}", tuple(s.shape), lambda s=s: s) for i, s in enumerate(scores)]  # type: ignore[misc]


def test_uniform_gives_all_the_same() -> None:
    assert uniform(layers_of(torch.rand(2, 3), torch.rand(4, 5)), 0.3) == {"layer0": 0.3, "layer1": 0.3}


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(2, 30)), min_size=1, max_size=4),
    st.floats(0, 0.95).map(lambda s: round(s, 3)),
    st.integers(0, 999),
    st.sampled_from([0, 4]),
)
def test_global_prunes_the_lowest_of_all(
    shapes: list[tuple[int, int]], sparsity: float, seed: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [
        torch.randint(0, levels, s, generator=generator).float()
        if levels
        else torch.rand(s, generator=generator)
        for s in shapes
    ]
    split = global_(layers_of(*scores), sparsity)
    counts = [count_pruned(s.numel(), split[f"layer{i}"]) for i, s in enumerate(scores)]  # type: ignore[arg-type]
    total = sum(s.numel() for s in scores)
    assert sum(counts) == min(count_pruned(total, sparsity), total - len(scores))
    pruned = [s.flatten().sort().values[:k] for s, k in zip(scores, counts, strict=True)]
    kept = [
        s.flatten().sort().values[k:-1] for s, k in zip(scores, counts, strict=True)
    ]  # best ones are safe
    if any(len(p) for p in pruned) and any(len(k) for k in kept):
        assert max(float(p.max()) for p in pruned if len(p)) <= min(float(k.min()) for k in kept if len(k))


def test_global_literal() -> None:
    weak, strong = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[5.0, 6.0, 7.0, 8.0]])
    assert global_(layers_of(weak, strong), 0.5) == {"layer0": 0.75, "layer1": 0.25}


def test_what_cannot_compete() -> None:
    with pytest.raises(MethodError, match="scores"):
        global_([LayerInfo("a", (2, 2))], 0.5)
    with pytest.raises(ScoreError, match="layer0"):
        global_(layers_of(torch.tensor([[1.0, float("nan"), 1.0]])), 0.5)
    with pytest.raises(MethodError, match="uniform"):
        allocation("fair")
