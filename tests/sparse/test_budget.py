"""Budgets of whatever layers cost: the split with the least error, against exact solvers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from gossamer.errors import MethodError
from gossamer.sparse.allocate import LayerInfo, least_error, least_error_formats
from gossamer.sparse.allocate.sensitivity import Sensitivity
from gossamer.sparse.budget import amount_text, parse_budget

Levels = list[tuple[float, float, float]]  # sparsity, cost, error; dense first


@pytest.mark.parametrize(
    ("text", "amount", "measure"),
    [
        ("60MB", 60e6, "bytes"),
        (" 1.5 GiB ", 1.5 * 2**30, "bytes"),
        ("67351040B", 67351040, "bytes"),
        ("3.5bits", 3.5, "bits"),
        ("1 bit", 1, "bits"),
        ("2.5ms", 2.5e-3, "seconds"),
        (".5 s", 0.5, "seconds"),
        ("800us", 8e-4, "seconds"),
    ],
)
def test_budgets_are_read(text: str, amount: float, measure: str) -> None:
    found = parse_budget(text)
    assert (found.amount, found.measure, str(found)) == (pytest.approx(amount), measure, text.strip())


@pytest.mark.parametrize(
    "text", ["", "60", "60 apples", "-1MB", "0ms", "MB", "1e3MB", "9" * 400 + "MB", "60mb"]
)
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(MethodError, match="cannot read the budget"):
        parse_budget(text)


def test_amounts_are_told_in_their_units() -> None:
    assert [amount_text(a, "bytes") for a in (12, 1500, 60.25e6, 2e9)] == [
        "12 B",
        "1.5 kB",
        "60.25 MB",
        "2 GB",
    ]
    assert amount_text(3.7489999, "bits") == "3.749 bits"
    assert [amount_text(a, "seconds") for a in (2e-7, 2.5e-3, 2)] == ["0.2 us", "2.5 ms", "2 s"]


def steps(levels: Levels) -> Callable[[float], float]:
    """What a layer costs that can only have one of ``levels``: that of the last one reached."""
    return lambda s: [cost for sparsity, cost, _ in levels if sparsity <= s][-1]


def layer(name: str, levels: Levels, costs: Callable[[float], float] | None = None) -> LayerInfo:
    curve = tuple((sparsity, error) for sparsity, _, error in levels[1:])
    return LayerInfo(name, (10, 10), curve=curve, costs=costs or steps(levels))


def random_levels(seed: int, count: int, most: int) -> list[Levels]:
    """Costs that fall with sparsity and errors that mostly rise, neither by rule."""
    draw = np.random.default_rng(seed)
    found: list[Levels] = []
    for _ in range(count):
        levels = int(draw.integers(1, most + 1))
        costs = np.sort(draw.random(levels + 1))[::-1] * draw.choice([1, 10])
        errors = np.abs(np.cumsum(draw.normal(0.5, 0.5, levels))) * draw.choice([0.1, 1])
        sparsities = np.linspace(0, 0.9, levels + 1)
        found.append(list(zip(sparsities.tolist(), costs.tolist(), [0.0, *errors.tolist()], strict=True)))
    return found


def exact(layers: list[Levels], budget: float, *, whole: bool = True) -> float:
    """The least sum of errors by another solver: of one level a layer, or of any mixture of levels."""
    costs = np.array([cost for levels in layers for _, cost, _ in levels])
    errors = np.array([error for levels in layers for _, _, error in levels])
    owner = np.repeat(np.arange(len(layers)), [len(levels) for levels in layers])
    one_each = (owner == np.arange(len(layers))[:, None]).astype(float)
    if not whole:
        relaxed = linprog(errors, costs[None], [budget], one_each, np.ones(len(layers)), (0, 1))
        return float(relaxed.fun)
    limits = [LinearConstraint(costs[None], -np.inf, budget), LinearConstraint(one_each, 1, 1)]
    found = milp(errors, constraints=limits, integrality=np.ones(len(errors)), bounds=Bounds(0, 1))
    return float(found.fun)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 1))
def test_whole_levels_are_within_one_step_of_the_best(seed: int, count: int, share: float) -> None:
    layers = random_levels(seed, count, 5)
    most = sum(levels[0][1] for levels in layers)
    least = sum(levels[-1][1] for levels in layers)
    budget = least + share * (most - least) + 1e-6
    split = least_error([layer(f"{i}", levels) for i, levels in enumerate(layers)], budget)
    spent = error = 0.0
    for index, levels in enumerate(layers):
        share_of = split[f"{index}"]
        assert share_of is not None
        _, cost, lost = next(one for one in reversed(levels) if one[0] <= share_of + 1e-9)
        spent, error = spent + cost, error + lost
    assert spent <= budget * (1 + 1e-9)
    best = exact(layers, budget)
    step = max(error for levels in layers for *_, error in levels)
    assert best - 1e-9 <= error <= best + step + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.floats(0, 1))
def test_formats_are_within_one_step_of_the_best(seed: int, count: int, share: float) -> None:
    layers = random_levels(seed, count, 4)
    shuffled = np.random.default_rng(seed)
    infos = []
    for index, levels in enumerate(layers):
        formats = [(f"format {at}", error) for at, (*_, error) in enumerate(levels)]
        costs = {f"format {at}": cost for at, (_, cost, _) in enumerate(levels)}
        order = shuffled.permutation(len(formats))
        infos.append(
            LayerInfo(
                f"{index}", (10, 10), formats=tuple(formats[at] for at in order), costs=costs.__getitem__
            )
        )
    most = sum(levels[0][1] for levels in layers)
    least = sum(levels[-1][1] for levels in layers)
    budget = least + share * (most - least) + 1e-6
    split = least_error_formats(infos, budget)
    assert sum(la.cost(split[la.name]) for la in infos) <= budget * (1 + 1e-9)
    error, best = sum(dict(la.formats)[split[la.name]] for la in infos), exact(layers, budget)
    step = max(error for levels in layers for *_, error in levels)
    assert best - 1e-9 <= error <= best + step + 1e-9
    with pytest.raises(MethodError, match="cost at least"):
        least_error_formats(infos, 0.9 * least)


def test_many_layers_are_next_to_the_best() -> None:
    """What is lost is a part of one step of one layer: with 60 layers next to nothing."""
    for seed in range(5):
        layers = random_levels(seed, 60, 6)
        budget = 0.6 * sum(levels[0][1] for levels in layers)
        split = least_error([layer(f"{i}", levels) for i, levels in enumerate(layers)], budget)
        chosen = [
            next(one for one in reversed(levels) if one[0] <= (split[f"{i}"] or 0) + 1e-9)
            for i, levels in enumerate(layers)
        ]
        assert sum(one[1] for one in chosen) <= budget
        assert sum(one[2] for one in chosen) <= 1.05 * exact(layers, budget) + 1e-9


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 8), st.floats(0.15, 1))
def test_costs_without_steps_give_the_relaxation_exactly(seed: int, count: int, share: float) -> None:
    """Straight costs and convex errors: the best mixture is a sparsity that a layer can have."""
    draw = np.random.default_rng(seed)
    layers: list[Levels] = []
    infos = []
    for index in range(count):
        price, rise = (float(one) for one in draw.uniform(0.5, 5, 2))
        sparsities = [0.0, 0.25, 0.5, 0.75, 0.9]
        levels = [(s, price * (1 - s), rise * s**2) for s in sparsities]
        layers.append(levels)
        infos.append(layer(f"{index}", levels, lambda s, price=price: price * (1 - s)))  # type: ignore[misc]
    budget = share * sum(levels[0][1] for levels in layers)
    split = least_error(infos, budget)
    assert sum(info.cost(split[info.name] or 0) for info in infos) <= budget * (1 + 1e-9)
    error = sum(
        float(np.interp(split[f"{i}"] or 0, [one[0] for one in levels], [one[2] for one in levels]))
        for i, levels in enumerate(layers)
    )
    assert error == pytest.approx(exact(layers, budget, whole=False), abs=1e-6)


def test_layers_where_pruning_buys_time_are_pruned() -> None:
    """Three layers with the same errors: one is faster sparse, one is not, one is slower."""
    errors = [(0.0, 0.0), (0.5, 1.0), (0.9, 4.0)]

    def timed(*seconds: float) -> LayerInfo:
        levels = [(s, t, e) for (s, e), t in zip(errors, seconds, strict=True)]
        return layer(f"{seconds}", levels, lambda s: float(np.interp(s, [0, 0.5, 0.9], seconds)))

    fast, same, slow = timed(10, 6, 2), timed(10, 10, 10), timed(10, 10, 12)
    split = least_error([fast, same, slow], 26)
    assert split == {fast.name: pytest.approx(0.5), same.name: 0.0, slow.name: 0.0}
    with pytest.raises(MethodError, match=r"at least 22.*budget is 21"):
        least_error([fast, same, slow], 21)


def test_layers_are_dense_or_in_a_pattern() -> None:
    """One level each: the fewest errors are given for what must be saved, and no layer is in between."""
    layers = [layer(f"{i}", [(0.0, 100.0, 0.0), (0.5, 76.0, e)]) for i, e in enumerate([5, 1, 3, 9])]
    assert least_error(layers, 400) == {"0": 0.0, "1": 0.0, "2": 0.0, "3": 0.0}
    assert least_error(layers, 376) == {"0": 0.0, "1": 0.5, "2": 0.0, "3": 0.0}
    assert least_error(layers, 375.5) == {"0": 0.0, "1": 0.5, "2": 0.5, "3": 0.0}
    assert least_error(layers, 304) == {"0": 0.5, "1": 0.5, "2": 0.5, "3": 0.5}


def test_what_is_left_buys_errors_back() -> None:
    """The large layer is cheapest a byte and saves far too much: what it leaves keeps the small one dense."""
    small = layer("small", [(0.0, 10.0, 0.0), (0.5, 5.0, 0.4)])
    large = layer("large", [(0.0, 100.0, 0.0), (0.5, 50.0, 5.0)])
    assert least_error([small, large], 100) == {"small": 0.0, "large": 0.5}


def test_a_sparsity_is_a_budget_of_kept_weights() -> None:
    layers = [
        LayerInfo("a", (10, 10), curve=((0.5, 1.0), (0.9, 9.0)), costs=lambda s: 1e9),
        LayerInfo("b", (20, 10), curve=((0.5, 1.0), (0.9, 2.0))),
    ]
    split = Sensitivity()(layers, 0.5)
    assert split == Sensitivity()([LayerInfo(la.name, la.shape, curve=la.curve) for la in layers], 0.5)
    assert 100 * (split["a"] or 0) + 200 * (split["b"] or 0) == pytest.approx(150)
