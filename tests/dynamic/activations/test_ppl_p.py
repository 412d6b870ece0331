"""PPL-p %: the bisection against curves whose answer is known, and on a model."""

from __future__ import annotations

import pytest

from gossamer.dynamic.activations import calibrate, largest_sparsity, method, ppl_p
from gossamer.errors import SparsityError
from gossamer.evaluate import evaluate
from tiny import tiny_model, tiny_tokens


@pytest.mark.parametrize("percent", [0.5, 1, 5, 20])
def test_bisection_finds_the_crossing_from_below(percent: float) -> None:
    found = largest_sparsity(lambda s: 20 * (1 + s**4), percent, tolerance=0.001)
    exact = (percent / 100) ** 0.25
    assert exact - 0.001 <= found.sparsity <= exact
    assert found.perplexity == 20 * (1 + found.sparsity**4)
    assert found.dense_perplexity == 20
    assert list(found.measured) == sorted(found.measured)
    assert len(found.measured) <= 13


def test_the_ends() -> None:
    assert largest_sparsity(lambda s: 5.0, 1).sparsity == 0.98
    worse = largest_sparsity(lambda s: 5.0 if s == 0 else 9.0, 1)
    assert (worse.sparsity, worse.perplexity) == (0.0, 5.0)
    for percent, tolerance in ((-1, 0.01), (float("nan"), 0.01), (1, 0)):
        with pytest.raises(SparsityError):
            largest_sparsity(lambda s: 5.0, percent, tolerance)


def test_of_a_model() -> None:
    model, windows = tiny_model(), tiny_tokens(4, 48)
    calibrated = calibrate(model, method("teal"), windows)
    found = ppl_p(model, calibrated, windows, percent=2.0, tolerance=0.05)
    assert found.dense_perplexity == evaluate(model, windows).perplexity
    assert 0 < found.sparsity < 0.98
    assert found.perplexity <= 1.02 * found.dense_perplexity
    with calibrated.gates(found.sparsity).attach(model):
        assert evaluate(model, windows).perplexity == found.perplexity
    allocated = ppl_p(
        model,
        calibrated,
        windows,
        2.0,
        tolerance=0.05,
        allocate=lambda s: {"model.layers.0.mlp.down_proj": s},
    )
    assert allocated.sparsity > found.sparsity
