"""Layer errors against the definition with explicit inputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gossamer.errors import EvaluationError
from gossamer.evaluate import reconstruction_error


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_equals_the_definition_with_explicit_inputs() -> None:
    W, V, X = numbers(7, 12), numbers(7, 12, seed=1), numbers(12, 30, seed=2)
    w, v, x = (t.double().numpy() for t in (W, V, X))
    expected = np.linalg.norm((w - v) @ x) ** 2 / np.linalg.norm(w @ x) ** 2
    gram = X.double() @ X.double().T
    assert reconstruction_error(W, V, gram) == pytest.approx(expected, rel=1e-12)
    assert reconstruction_error(W, V, gram.float()) == pytest.approx(expected, rel=1e-5)
    assert reconstruction_error(W, V, gram / 30) == pytest.approx(expected, rel=1e-12)
    plain = np.linalg.norm(w - v) ** 2 / np.linalg.norm(w) ** 2
    assert reconstruction_error(W, V) == pytest.approx(plain, rel=1e-12)


def test_blocks_of_columns_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    W, V, X = numbers(7, 12), numbers(7, 12, seed=1), numbers(12, 30, seed=2)
    whole = reconstruction_error(W, V, X @ X.T)
    monkeypatch.setattr("gossamer.evaluate.layer_error._BLOCK", 5)
    assert reconstruction_error(W, V, X @ X.T) == pytest.approx(whole, rel=1e-12)


def test_a_tiny_change_is_not_lost_in_rounding() -> None:
    W = numbers(4, 64)
    V = W.double()
    V[2, 3] += 1e-9
    assert reconstruction_error(W, V) == pytest.approx(1e-18 / W.double().square().sum().item(), rel=1e-3)


def test_edges() -> None:
    W, zero = numbers(3, 5), torch.zeros(3, 5)
    assert reconstruction_error(W, W, torch.eye(5)) == 0.0
    assert reconstruction_error(W, zero) == 1.0
    assert reconstruction_error(zero, zero) == 0.0
    assert reconstruction_error(zero, W) == math.inf
    assert reconstruction_error(W.bfloat16(), W.bfloat16().float()) == 0.0


def test_bad_input() -> None:
    with pytest.raises(EvaluationError, match="one shape"):
        reconstruction_error(torch.zeros(3, 5), torch.zeros(5, 3))
    with pytest.raises(EvaluationError, match="5 inputs"):
        reconstruction_error(torch.ones(3, 5), torch.zeros(3, 5), torch.eye(3))
    with pytest.raises(EvaluationError, match="NaN"):
        reconstruction_error(torch.full((3, 5), math.nan), torch.zeros(3, 5))
