"""Scores by hand, what combinations are refused, and what every method must declare."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.calibrate import Gradient, Gram, InputNorm, gradient_kind
from gossamer.calibrate.modules import gather_gradients
from gossamer.errors import GossamerError, MatrixError, MethodError, PatternError, SparsityError
from gossamer.matrices.values import quantize, value_type
from gossamer.nn.views import weight_views
from gossamer.prune import METHODS, Layer, check_combination, method
from gossamer.sparse import NM, Unstructured


def layer_with_norms(weight: list[list[float]], norms: list[float]) -> Layer:
    statistic = InputNorm(len(norms))
    statistic.update(torch.diag(torch.tensor(norms)))
    statistic.finish()
    return Layer("layer", torch.tensor(weight), {InputNorm: statistic})


def test_wanda_by_hand() -> None:
    """The example of the paper's figure 1: weights and norms, compared within each row."""
    layer = layer_with_norms([[4, 0, 1, -1], [3, -2, -1, -3], [-3, 1, 0, 2]], [1, 2, 8, 3])
    scores = method("wanda").scores(layer)
    assert scores.tolist() == [[4, 0, 8, 3], [3, 4, 8, 9], [3, 2, 0, 6]]
    c = check_combination("wanda", sparsity=0.5)
    pruned = c.method.prune(layer, c.pattern, c.sparsity, c.values, 64)
    assert pruned.weight.tolist() == [[4, 0, 1, 0], [0, 0, -1, -3], [-3, 0, 0, 2]]


def test_ria_by_hand() -> None:
    """Columns sum to 4 and 4, rows to 4, 3 and 1: shares of both, times the roots of the norms."""
    layer = layer_with_norms([[3.0, -1, 0], [0, 3, 0], [1, 0, 0]], [4, 9, 1])
    shares = [[3 / 4 + 3 / 4, 1 / 4 + 1 / 4, 0], [0, 3 / 4 + 1, 0], [1 / 4 + 1, 0, 0]]
    expected = torch.tensor(shares) * torch.tensor([2.0, 3, 1])
    torch.testing.assert_close(method("ria").scores(layer), expected)
    plain = method("ria", power=0.0).scores(layer)
    torch.testing.assert_close(plain[0], torch.tensor([1.5, 0.5, 0.0]))


def test_gradient_scores_by_hand() -> None:
    weight, mean = torch.tensor([[2.0, -3.0], [0.0, 1.0]]), torch.tensor([[1.0, -0.5], [9.0, -2.0]])
    squares = torch.tensor([[1.0, 4.0], [81.0, 5.0]])
    layer = Layer("layer", weight, {Gradient: Gradient(mean, squares, torch.ones(2))})
    for mean in ("absolute", "signed"):
        assert method("taylor", mean=mean).scores(layer).tolist() == [[2, 1.5], [0, 2]]
    assert method("fisher").scores(layer).tolist() == [[2, 18], [0, 2.5]]


@pytest.mark.parametrize(("mean", "expected"), [("absolute", [[4, 1]]), ("signed", [[0, 1]])])
def test_taylor_averages_over_windows_without_signs_unless_asked_to(
    mean: str, expected: list[list[float]]
) -> None:
    """Gradients of two windows, sums over their positions, are (2, 1) and (-2, 1), and weights (2, 1)."""
    chosen = method("taylor", mean=mean)
    net = torch.nn.Linear(2, 1, bias=False)
    net.weight.data = torch.tensor([[2.0, 1.0]])
    windows = [torch.tensor([[3.0, 0.0], [-1.0, 1.0]]), torch.tensor([[-1.0, 0.5], [-1.0, 0.5]])]
    views, _ = weight_views(net)
    found = gather_gradients(
        net, views, windows, lambda model, x: model(x).sum(), gradient_kind(chosen.needs)
    )
    layer = Layer("layer", net.weight.detach(), {Gradient: found[views[0].name]})
    assert chosen.scores(layer).tolist() == expected


def test_taylor_refuses_other_means() -> None:
    with pytest.raises(MethodError, match="absolute or signed, not 'squared'"):
        method("taylor", mean="squared")


def test_magnitude_by_hand() -> None:
    layer = Layer("layer", torch.tensor([[1.0, -5.0], [0.5, 3.0]]))
    c = check_combination("magnitude", sparsity=0.5)
    assert c.method.prune(layer, c.pattern, c.sparsity, c.values, 64).weight.tolist() == [[0, -5], [0, 3]]


def test_random_is_the_same_again_and_differs_by_layer_and_seed() -> None:
    def mask(name: str, seed: int) -> Any:
        return method("random", seed=seed).scores(Layer(name, torch.zeros(50, 50)))

    assert torch.equal(mask("a", 0), mask("a", 0))
    assert not torch.equal(mask("a", 0), mask("b", 0))
    assert not torch.equal(mask("a", 0), mask("a", 1))


def test_random_search_keeps_the_best_of_its_draws() -> None:
    inputs = torch.randn(40, 24, generator=torch.Generator().manual_seed(0))
    gram = Gram(24)
    gram.update(inputs)
    gram.finish()
    layer = Layer("layer", torch.randn(8, 24, generator=torch.Generator().manual_seed(1)), {Gram: gram})

    def error(draws: int) -> float:
        c = check_combination("random_search", sparsity=0.5, options={"draws": draws})
        pruned = c.method.prune(layer, c.pattern, c.sparsity, c.values, 64)
        assert pruned.mask is not None
        assert int(pruned.mask.sum()) == 96
        assert torch.equal(pruned.weight, layer.weight * pruned.mask)
        return float((inputs @ (layer.weight - pruned.weight).T).square().sum())

    draws = [error(n) for n in (1, 2, 4, 8, 16)]
    assert draws == sorted(draws, reverse=True)
    assert draws[-1] < 0.95 * draws[0]


def test_rounding_weighs_errors_by_the_inputs() -> None:
    torch.manual_seed(0)
    norms = torch.rand(64) * 3
    layer = layer_with_norms(torch.randn(8, 64).tolist(), norms.tolist())
    c = check_combination("wanda", sparsity=0.5, values="int4")
    pruned = c.method.prune(layer, c.pattern, c.sparsity, c.values, c.group)
    assert pruned.mask is not None
    assert pruned.quantized is not None
    plain = quantize(layer.weight * pruned.mask, value_type("int4"), 64, pruned.mask).to_dense()

    def weighted(weight: torch.Tensor) -> float:
        return float(((weight - layer.weight * pruned.mask) * norms).square().sum())

    assert weighted(pruned.weight) < weighted(plain)
    assert torch.equal(pruned.quantized.to_dense(), pruned.weight)


@pytest.mark.parametrize(
    ("name", "settings", "error"),
    [
        ("wandaa", {}, MethodError),
        ("wanda", {"sparsity": 1.0}, SparsityError),
        ("wanda", {"sparsity": -0.5}, SparsityError),
        ("wanda", {"pattern": "2:4", "sparsity": 0.7}, SparsityError),
        ("wanda", {"pattern": "two-four", "sparsity": 0.5}, PatternError),
        ("wanda", {"sparsity": 0.5, "values": "int5"}, MatrixError),
        ("wanda", {"sparsity": 0.5, "group": 48}, MatrixError),
        ("wanda", {"sparsity": 0.5, "allocation_name": "fair"}, MethodError),
        ("wanda", {"pattern": "2:4", "allocation_name": "global"}, MethodError),
        ("wanda", {"pattern": "2:4", "allocation_name": "erk"}, MethodError),
        ("wanda", {"pattern": "32:64", "allocation_name": "sensitivity"}, MethodError),
        ("wanda", {"pattern": "unstructured:model", "sparsity": 0.5, "allocation_name": "owl"}, MethodError),
        ("wanda", {"pattern": "unstructured:row", "sparsity": 0.5, "allocation_name": "global"}, MethodError),
        ("wanda", {"pattern": "16x4:row", "sparsity": 0.5, "allocation_name": "global"}, MethodError),
        ("admm", {"sparsity": 0.5, "allocation_name": "global"}, MethodError),
        ("random_search", {"sparsity": 0.5, "allocation_name": "global"}, MethodError),
        ("wanda", {"budget": "60MB"}, MethodError),
        ("wanda", {"budget": "60MB", "allocation_name": "owl"}, MethodError),
        ("wanda", {"budget": "60MB", "allocation_name": "sensitivity", "sparsity": 0.5}, MethodError),
        ("wanda", {"budget": "60MB", "allocation_name": "sensitivity", "pattern": "channel:in"}, MethodError),
        ("wanda", {"budget": "60 apples", "allocation_name": "sensitivity"}, MethodError),
        ("wanda", {"pattern": "unstructured:model", "sparsity": 0.5}, MethodError),
        ("wanda", {"sparsity": 0.5, "options": {"strength": 1}}, MethodError),
        ("ria", {"sparsity": 0.5, "options": {"power": -1}}, MethodError),
        ("random_search", {"sparsity": 0.5, "options": {"draws": 0}}, MethodError),
    ],
)
def test_bad_combinations_are_refused_before_any_work(
    name: str, settings: dict[str, Any], error: type[GossamerError]
) -> None:
    with pytest.raises(error):
        check_combination(name, **settings)


@pytest.mark.parametrize("pattern", ["16x4", "unstructured:row", "channel:in"])
def test_a_pattern_that_says_no_sparsity_needs_one(pattern: str) -> None:
    with pytest.raises(MethodError, match=f"{pattern} says no sparsity: give one"):
        check_combination("wanda", pattern=pattern)
    assert not check_combination("wanda", pattern=pattern, sparsity=0).prunes
    assert check_combination("wanda", pattern="2:4").sparsity == 0.5


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(MethodError, match="did you mean 'wanda'"):
        method("wnda")


def test_plain_unstructured_takes_the_papers_comparison_group() -> None:
    assert check_combination("wanda", sparsity=0.5).pattern == Unstructured("row")
    assert check_combination("magnitude", sparsity=0.5).pattern == Unstructured("tensor")
    assert check_combination("sparsegpt", sparsity=0.5).pattern == Unstructured("columns:128")
    assert check_combination("sparsegpt", pattern="unstructured:row", sparsity=0.5).pattern == Unstructured(
        "row"
    )
    assert check_combination("gptq", pattern="32:64").pattern == NM(32, 64)
    for name in ("wanda", "sparsegpt"):
        c = check_combination(name, sparsity=0.5, allocation_name="global")
        assert c.pattern == Unstructured("model")


def test_where_nothing_is_pruned_the_allocation_is_uniform() -> None:
    for name in ("global", "owl", "sensitivity"):
        assert check_combination("wanda", sparsity=0, allocation_name=name).allocation == "uniform"
        assert check_combination("wanda", sparsity=0.1, allocation_name=name).allocation == name
    c = check_combination("wanda", budget="60MB", allocation_name="sensitivity")
    assert c.allocation == "sensitivity"


def test_a_missing_statistic_is_named() -> None:
    with pytest.raises(MethodError, match="InputNorm"):
        method("wanda").scores(Layer("layer", torch.ones(2, 2), {Gram: Gram(2)}))


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_declares_itself(name: str) -> None:
    cls = METHODS[name]
    assert cls.name == name
    assert METHODS.citations[name]
    assert cls.__doc__
    if cls.finds_masks:  # in the model: there is nothing to claim
        return
    assert cls.claim is not None
    assert cls.claim.says
    assert cls.claim.than in (*cls.claim.experiment.against, "dense")
    assert cls.claim.factor < 10
    assert cls.claim.bound in ("at_most", "at_least")
