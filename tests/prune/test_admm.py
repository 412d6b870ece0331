"""ADMM against exhaustive search, exact least squares and the OBS sweep."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from prune_layers import mixed_layer

from gossamer.calibrate import Gram
from gossamer.errors import CalibrationError, MethodError
from gossamer.matrices.values import value_type
from gossamer.prune import Layer, Pruned, check_combination, round_values
from gossamer.prune.admm import rising_mask
from gossamer.sparse import NM, Unstructured, check_mask, count_pruned, parse_pattern


def make_layer(out: int = 48, cols: int = 128, tokens: int = 500, seed: int = 0) -> Layer:
    return mixed_layer(out, cols, tokens, seed)


def errors_of(layer: Layer, weight: torch.Tensor) -> torch.Tensor:
    """The squared output error of each row, in float64."""
    delta = (layer.weight - weight).double()
    return ((delta @ layer[Gram].matrix.double()) * delta).sum(dim=1)


def prune(
    name: str,
    layer: Layer,
    pattern: str,
    sparsity: float | None,
    values: str = "float32",
    **options: Any,
) -> Pruned:
    c = check_combination(name, pattern=pattern, sparsity=sparsity, values=values, options=options)
    return c.method.prune(layer, c.pattern, c.sparsity, c.values, c.group)


def test_settles_on_the_least_squares_optimum_of_its_mask() -> None:
    layer = make_layer(6, 20)
    found = prune("admm", layer, "unstructured:row", 0.5, settling=200, damping=1e-6)
    assert found.mask is not None
    H = layer[Gram].matrix.double()
    for row, kept, w in zip(found.weight, found.mask, layer.weight.double(), strict=True):
        exact = torch.zeros(20, dtype=torch.float64)
        exact[kept] = torch.linalg.solve(H[kept][:, kept], H[kept] @ w)
        torch.testing.assert_close(row.double(), exact, atol=2e-3, rtol=2e-3)


def test_comes_close_to_the_best_of_all_masks() -> None:
    """10 inputs, 5 kept: each row's best of 252 masks, weights solved exactly for each."""
    layer = make_layer(24, 10, 60)
    H = layer[Gram].matrix.double()
    best = torch.full((24,), torch.inf, dtype=torch.float64)
    for kept in map(list, combinations(range(10), 5)):
        weight = torch.zeros(24, 10, dtype=torch.float64)
        weight[:, kept] = torch.linalg.solve(H[kept][:, kept], (layer.weight.double() @ H)[:, kept].T).T
        best = torch.minimum(best, errors_of(layer, weight))
    found = errors_of(layer, prune("admm", layer, "unstructured:row", 0.5, damping=1e-4).weight)
    swept = errors_of(layer, prune("obs", layer, "unstructured:row", 0.5).weight)
    assert (found >= best * 0.999).all()
    assert float(found.sum()) < 1.15 * float(best.sum())
    assert float(swept.sum()) > 1.3 * float(best.sum())


@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [("unstructured:row", 0.5), ("unstructured:tensor", 0.7), ("unstructured:columns:64", 0.5), ("2:4", None),
     ("32:64", None), ("3:7", None), ("4x8", 0.3)],
)  # fmt: skip
def test_beats_the_sweep_in_every_pattern(pattern: str, sparsity: float | None) -> None:
    layer = make_layer()
    found = prune("admm", layer, pattern, sparsity)
    assert found.mask is not None
    check_mask(found.mask, parse_pattern(pattern))
    assert (found.weight[~found.mask] == 0).all()
    if sparsity is not None and pattern != "4x8":
        assert int((~found.mask).sum()) == pytest.approx(count_pruned(found.mask.numel(), sparsity), abs=48)
    swept = prune("obs", layer, pattern, sparsity)
    assert float(errors_of(layer, found.weight).sum()) < 0.95 * float(errors_of(layer, swept.weight).sum())


@pytest.mark.parametrize("pattern", ["2:4", "32:64"])
def test_integers_are_rounded_with_compensation(pattern: str) -> None:
    layer = make_layer()
    found = prune("admm", layer, pattern, None, "int4")
    plain = prune("admm", layer, pattern, None)
    assert found.mask is not None
    assert torch.equal(found.mask, plain.mask)  # type: ignore[arg-type]
    assert found.quantized is not None
    assert torch.equal(found.quantized.to_dense(), found.weight)
    assert (found.quantized.q[~found.mask] == 0).all()
    rounded = round_values(plain.weight, plain.mask, value_type("int4"), 64)
    assert float(errors_of(layer, found.weight).sum()) < float(errors_of(layer, rounded.weight).sum())
    swept = prune("obs", layer, pattern, None, "int4")
    assert float(errors_of(layer, found.weight).sum()) < float(errors_of(layer, swept.weight).sum())


def test_sparsity_rises_within_the_pattern() -> None:
    scores = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    final = rising_mask(scores, NM(2, 4), 0.5, 1.0)
    check_mask(final, NM(2, 4))
    before = rising_mask(scores, NM(2, 4), 0.5, 0.4)
    assert int((~before).sum()) == round(0.2 * 512)
    assert (before | ~final).all()  # what the pattern keeps is not pruned on the way
    assert scores[~before].max() <= scores[before & ~final].min()
    half = rising_mask(scores, Unstructured("row"), 0.5, 0.5)
    assert ((~half).sum(dim=1) == 16).all()


def test_on_the_way_no_more_is_pruned_than_the_pattern_does() -> None:
    """Of 9 inputs 2:4 prunes four, less than half."""
    scores = torch.rand(8, 9, generator=torch.Generator().manual_seed(0))
    final = rising_mask(scores, NM(2, 4), 0.5, 1.0)
    assert int((~final).sum()) == 8 * 4
    assert torch.equal(rising_mask(scores, NM(2, 4), 0.5, 0.9999), final)


def test_without_pruning_it_is_the_sweep() -> None:
    layer = make_layer()
    found, swept = (prune(name, layer, "unstructured", 0.0, "int4") for name in ("admm", "obs"))
    assert found.mask is None
    assert torch.equal(found.weight, swept.weight)


def test_dead_inputs_and_damaged_statistics() -> None:
    layer = make_layer(cols=16)
    layer[Gram].matrix[5] = layer[Gram].matrix[:, 5] = 0
    assert torch.isfinite(prune("admm", layer, "unstructured", 0.5).weight).all()
    assert (prune("admm", layer, "unstructured", 0.5).weight[:, 5] == 0).all()
    damaged = make_layer(cols=16)
    damaged[Gram].matrix += torch.where(torch.eye(16) > 0, 0.0, 1e6)
    with pytest.raises(CalibrationError, match="positive definite"):
        prune("admm", damaged, "unstructured", 0.5)


@pytest.mark.parametrize(
    "options", [{"rising": 0}, {"settling": -1}, {"damping": 0.0}, {"rho": -1.0}, {"speed": 3}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        check_combination("admm", sparsity=0.5, options=options)


def test_channels_are_refused() -> None:
    with pytest.raises(MethodError, match="does not accept"):
        check_combination("admm", pattern="channel:in", sparsity=0.5)
