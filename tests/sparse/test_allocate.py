"""Allocations: one budget, split over layers."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gossamer.errors import MethodError, ScoreError
from gossamer.sparse import count_pruned
from gossamer.sparse.allocate import (
    LayerInfo,
    allocation,
)
from gossamer.sparse.allocate.compete import Global
from gossamer.sparse.allocate.er import Er
from gossamer.sparse.allocate.erk import Erk
from gossamer.sparse.allocate.owl import OWL
from gossamer.sparse.allocate.sensitivity import Sensitivity
from gossamer.sparse.allocate.uniform import UNIFORM


def layers_of(*scores: torch.Tensor) -> list[LayerInfo]:
    return [LayerInfo(f"layer{i}", tuple(s.shape), lambda s=s: s) for i, s in enumerate(scores)]  # type: ignore[misc]


def test_uniform_gives_all_the_same() -> None:
    assert UNIFORM(layers_of(torch.rand(2, 3), torch.rand(4, 5)), 0.3) == {"layer0": 0.3, "layer1": 0.3}


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
    split = Global()(layers_of(*scores), sparsity)
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
    assert Global()(layers_of(weak, strong), 0.5) == {"layer0": 0.75, "layer1": 0.25}


def test_what_cannot_compete() -> None:
    with pytest.raises(MethodError, match="scores"):
        Global()([LayerInfo("a", (2, 2))], 0.5)
    with pytest.raises(ScoreError, match="layer0"):
        Global()(layers_of(torch.tensor([[1.0, float("nan"), 1.0]])), 0.5)
    with pytest.raises(MethodError, match="uniform"):
        allocation("fair")


def kept(layers: list[LayerInfo], split: dict[str, float | None]) -> float:
    """The share of all weights that a split keeps."""
    total = sum(layer.size for layer in layers)
    return sum(layer.size * (1 - (split[layer.name] or 0.0)) for layer in layers) / total


def test_erdos_renyi_by_hand() -> None:
    """Ratios 200/10,000 and 110/1,000: densities 0.02 e and 0.11 e of 11,000 weights, 2,200 of them kept."""
    layers = [LayerInfo("big", (100, 100)), LayerInfo("small", (10, 100))]
    epsilon = 2200 / (0.02 * 10_000 + 0.11 * 1000)
    split = Er()(layers, 0.8)
    assert split["big"] == pytest.approx(1 - 0.02 * epsilon)
    assert split["small"] == pytest.approx(1 - 0.11 * epsilon)
    assert Erk()(layers, 0.8) == split  # no kernels
    full = Er()(layers, 0.5)  # the small layer's density would be 1.95
    assert full["small"] == 0.0
    assert full["big"] == pytest.approx(0.55)


def test_kernels_count_in_erk_only() -> None:
    layers = [LayerInfo("wide", (64, 64, 7, 7)), LayerInfo("thin", (64, 64, 1, 1))]
    plain, kernels = Er()(layers, 0.9), Erk()(layers, 0.9)
    assert plain["wide"] == pytest.approx(plain["thin"])
    assert kernels["thin"] == 0.0  # type: ignore[comparison-overlap]
    assert kernels["wide"] > 0.9  # type: ignore[operator]


@given(
    st.lists(st.tuples(st.integers(1, 90), st.integers(1, 90)), min_size=1, max_size=6),
    st.floats(0, 0.99),
    st.integers(0, 99),
)
def test_all_allocations_keep_the_budget(shapes: list[tuple[int, int]], sparsity: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def info(index: int, shape: tuple[int, int]) -> LayerInfo:
        rise, outliers = torch.rand(2, generator=generator).tolist()
        grid = [sparsity * 0.5, sparsity, (1 + sparsity) / 2]
        curve = tuple((s, rise * s**2 + 0.1 * float(torch.rand(1, generator=generator))) for s in grid)
        return LayerInfo(f"layer{index}", shape, outliers=outliers, curve=curve)

    layers = [info(i, shape) for i, shape in enumerate(shapes)]
    for allocate in (Er(), Erk(), OWL(), Sensitivity()):
        split = allocate(layers, sparsity)
        assert kept(layers, split) == pytest.approx(1 - sparsity, abs=1e-6)
        assert all(s is not None and 0 <= s < 1 for s in split.values())


def test_owl_by_hand() -> None:
    """Shares 0, 1 and 4 per mille: densities 0, 0.04 and 0.16 above the least, their mean 0.3."""
    layers = [LayerInfo(f"layer{i}", (10, 10), outliers=r / 1000) for i, r in enumerate([0, 1, 4])]
    owl = OWL()
    split = owl(layers, 0.7)
    mean = 0.2 / 3
    assert [split[f"layer{i}"] for i in range(3)] == pytest.approx([0.7 + mean, 0.66 + mean, 0.54 + mean])
    assert owl(layers[:1] * 2, 0.7) == {"layer0": 0.7}  # no difference, no spread
    assert min(owl(layers, 0.02).values()) == pytest.approx(0)  # type: ignore[type-var]
    for seed in range(50):  # what is left of the room may not round below nothing
        shares = torch.rand(7, generator=torch.Generator().manual_seed(seed)).tolist()
        some = [LayerInfo(f"layer{i}", (10, 10 + i), outliers=r) for i, r in enumerate(shares)]
        assert min(s for s in owl(some, 0.05).values() if s is not None) >= 0
    with pytest.raises(MethodError, match="outliers"):
        owl([LayerInfo("a", (2, 2))], 0.5)


def test_outliers_are_counted_over_a_whole_block() -> None:
    parts = [torch.tensor([[1.0, 1.0], [1.0, 21.0]]), torch.tensor([[0.0, 0.0]])]  # mean 4: one over 20
    assert OWL().outlier_share(lambda: parts) == pytest.approx(1 / 6)
    assert OWL(outlier=6).outlier_share(lambda: parts) == 0  # one over 24


def test_owl_spreads_as_far_as_it_is_told_to() -> None:
    layers = [LayerInfo(f"layer{i}", (10, 10), outliers=float(i)) for i in range(2)]
    split = allocation("owl", {"spread": 0.15})(layers, 0.7)
    assert [split[f"layer{i}"] for i in range(2)] == pytest.approx([0.85, 0.55])


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("owl", {"lambda": 0.1}, "the allocation owl does not take .*no 'lambda'.*outlier, spread"),
        ("owl", {"spread": 0}, "above 0 and at most 0.5, got 0"),
        ("owl", {"spread": "wide"}, "takes as spread a finite number, got 'wide'"),
        ("owl", {"outlier": -5}, "above 0, got -5"),
        ("erk", {"spread": 0.1}, "the allocation erk does not take .*it has none"),
    ],
)
def test_options_of_allocations_are_checked(name: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(MethodError, match=says):
        allocation(name, options)


def test_sensitivity_is_the_best_split() -> None:
    """Against every split on a grid: two convex layers and one whose curve must be made convex."""
    curves = [
        tuple((s / 10, (s / 10) ** 2) for s in range(1, 10)),
        tuple((s / 10, 8 * (s / 10) ** 3) for s in range(1, 10)),
        ((0.3, 0.5), (0.6, 0.55), (0.9, 2.0)),
    ]
    layers = [LayerInfo(f"layer{i}", (10, 10), curve=curve) for i, curve in enumerate(curves)]
    split = Sensitivity()(layers, 0.5)
    assert kept(layers, split) == pytest.approx(0.5)

    def cost(shares: list[float]) -> float:
        total = 0.0
        for share, curve in zip(shares, curves, strict=True):
            hull = [(0.0, 0.0), *(curve if len(curve) > 3 else curve[1:])]
            for (x0, y0), (x1, y1) in pairwise(hull):
                if x0 <= share <= x1 + 1e-9:
                    total += y0 + (y1 - y0) * (share - x0) / (x1 - x0)
                    break
        return total

    steps = [s / 10 for s in range(10)]
    best = min(cost([a, b, 1.5 - a - b]) for a in steps for b in steps if 0 <= 1.5 - a - b <= 0.9)
    assert cost([split[f"layer{i}"] or 0.0 for i in range(3)]) == pytest.approx(best, abs=1e-6)


def test_sensitivity_needs_curves_that_reach() -> None:
    with pytest.raises(MethodError, match="curves"):
        Sensitivity()([LayerInfo("a", (2, 2))], 0.5)
    with pytest.raises(MethodError, match="end below"):
        Sensitivity()([LayerInfo("a", (20, 20), curve=((0.4, 1.0),))], 0.5)
