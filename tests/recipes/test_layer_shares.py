"""What allocations measure of layers, by hand and on small nets."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer.calibrate import InputNorm
from gossamer.prune import Layer
from gossamer.recipes.layer_shares import outlier_scores
from gossamer.sparse.allocate.owl import OWL


def layer_of(seed: int, statistic: InputNorm) -> Layer:
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(seed))
    return Layer("layer", weight, {InputNorm: statistic})


def norms(tokens: int) -> InputNorm:
    found = InputNorm(200)
    found.update(torch.randn(tokens, 200, generator=torch.Generator().manual_seed(tokens)))
    found.finish()
    return found


def share(*layers: Layer) -> float:
    return OWL().outlier_share(lambda: [outlier_scores(layer) for layer in layers])


def test_outliers_do_not_hang_on_how_many_tokens_a_layer_read() -> None:
    """All inputs and weights are drawn from one normal distribution; one expert saw no token."""
    few, many, unseen = norms(100), norms(10_000), InputNorm.unseen(200)
    assert isinstance(unseen, InputNorm)
    assert share(layer_of(0, few), layer_of(1, many)) < 1e-3
    assert share(layer_of(0, many), layer_of(1, unseen)) < 1e-3
    both = torch.cat([outlier_scores(layer_of(0, one)).flatten() for one in (few, many)])
    assert float(both[:12_800].mean() / both[12_800:].mean()) == pytest.approx(1, rel=0.01)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 256), nn.ReLU(), nn.Linear(256, 16), nn.Linear(16, 256), nn.Linear(256, 16)
    )


@pytest.mark.parametrize("method", ["magnitude", "wanda", "dsnot", "obs"])
@pytest.mark.parametrize("sparsity", [0.5, 0.77])
def test_weights_that_compete_over_the_model_are_pruned_exactly(method: str, sparsity: float) -> None:
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.01, 3, 16)
    found = gs.sparsify(net(), [x], method=method, sparsity=sparsity, allocation="global")
    total = 4 * 16 * 256
    assert sum(int((~mask).sum()) for mask in found.masks.values()) == int(sparsity * total + 0.5)


@pytest.mark.parametrize("allocation", ["global", "er", "erk", "owl", "sensitivity"])
def test_where_nothing_is_pruned_no_layer_is(allocation: str) -> None:
    """And nothing is measured: there are no batches."""
    found = gs.sparsify(net(), method="magnitude", sparsity=0.0, values="int8", allocation=allocation)
    assert found.masks == {}
    assert found.sparsity == 0
