"""Calibration error and corruption against plain computations."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gossamer.errors import EvaluationError
from gossamer.evaluate import confidence, corrupted, evaluate
from tiny import VOCABULARY, tiny_model, tiny_tokens


class Fixed(nn.Module):
    """Gives the same logits for every token."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*ids.shape, -1)


def test_one_that_is_always_as_sure_errs_by_the_difference() -> None:
    sure = Fixed(torch.tensor([0.8, 0.1, 0.1]).log())
    right = torch.tensor([[0, 0, 1, 0, 2]])  # of the four that are asked for, two are 0
    found = confidence(sure, right)
    assert found.accuracy == 0.5
    assert found.calibration_error == pytest.approx(0.3, abs=1e-6)


def test_it_is_the_sum_over_bins() -> None:
    model, ids = tiny_model(), tiny_tokens(3, 40)
    with torch.no_grad():
        logp = model(ids).logits[:, :-1].float().log_softmax(-1).reshape(-1, VOCABULARY)
    targets = ids[:, 1:].reshape(-1)
    sure, best = logp.exp().max(-1)
    error = 0.0
    for low in range(10):
        inside = ((sure * 10).long().clamp(max=9) == low).nonzero().flatten()
        if len(inside):
            apart = (best[inside] == targets[inside]).float().mean() - sure[inside].mean()
            error += len(inside) / len(sure) * abs(float(apart))
    found = confidence(model, ids, bins=10)
    assert found.calibration_error == pytest.approx(error, abs=1e-5)
    assert found.perplexity == pytest.approx(evaluate(model, ids).perplexity, rel=1e-5)


def test_corrupted_inputs_are_read_and_true_tokens_asked_for() -> None:
    model, ids = tiny_model(), tiny_tokens(3, 40)
    other = corrupted(ids, 0.5, VOCABULARY)
    with torch.no_grad():
        logp = model(other).logits[:, :-1].float().log_softmax(-1)
    want = -logp.gather(-1, ids[:, 1:, None]).mean().exp().log()
    found = confidence(model, ids, inputs=other)
    assert torch.tensor(found.perplexity).log() == pytest.approx(float(want), rel=1e-4)


def test_corruption_is_of_the_share_asked_for_and_the_same_each_time() -> None:
    ids = torch.zeros(20, 500, dtype=torch.int64)
    found = corrupted(ids, 0.1, 1000, seed=3)
    assert float((found != 0).float().mean()) == pytest.approx(0.1, abs=0.01)
    assert torch.equal(found, corrupted(ids, 0.1, 1000, seed=3))
    assert torch.equal(corrupted(ids, 0.0, 1000), ids)


def test_bad_input_is_refused() -> None:
    model, ids = tiny_model(), tiny_tokens()
    with pytest.raises(EvaluationError, match="same shape"):
        confidence(model, ids, inputs=ids[:, 1:])
    with pytest.raises(EvaluationError, match="at least one bin"):
        confidence(model, ids, bins=0)
    with pytest.raises(EvaluationError, match="share of corrupted"):
        corrupted(ids, 1.5, 10)
