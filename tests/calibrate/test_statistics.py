"""Statistics against numpy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gossamer.calibrate import Gram, InputNorm
from gossamer.errors import CalibrationError


@pytest.mark.parametrize("features", [5, 384, 900])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_over_updates(features: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(features)
    parts = [torch.randn(n, features, generator=generator).to(dtype) for n in (7, 300, 64)]
    gram, norm = Gram(features), InputNorm(features)
    for part in parts:
        gram.update(part)
        norm.update(part)
    gram.finish()
    norm.finish()
    x = np.concatenate([part.double().numpy() for part in parts])
    assert gram.tokens == norm.tokens == len(x)
    scale = np.abs(x.T @ x).max()
    np.testing.assert_allclose(gram.matrix.numpy(), x.T @ x, atol=2e-6 * scale)
    np.testing.assert_allclose(norm.norm.numpy(), np.linalg.norm(x, axis=0), rtol=1e-5)
    assert torch.equal(gram.matrix, gram.matrix.T)


@pytest.mark.parametrize("kind", [Gram, InputNorm])
def test_nothing_seen_and_nothing_finite_are_errors(kind: type[Gram] | type[InputNorm]) -> None:
    with pytest.raises(CalibrationError, match="no calibration input"):
        kind(4).finish()
    statistic = kind(4)
    statistic.update(torch.full((3, 4), float("nan")))
    with pytest.raises(CalibrationError, match="not finite"):
        statistic.finish()


def test_the_callers_matmul_precision_is_restored() -> None:
    before = torch.get_float32_matmul_precision()
    Gram(4).update(torch.ones(2, 4, dtype=torch.bfloat16))
    assert torch.get_float32_matmul_precision() == before
