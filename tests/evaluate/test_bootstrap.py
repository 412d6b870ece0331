"""The bootstrap against what is known in closed form about resampled means."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from gossamer.errors import EvaluationError
from gossamer.evaluate import (
    bootstrap_mean,
    exp,
    paired_difference,
    paired_ratio,
    perplexity_interval,
    perplexity_ratio_interval,
)


def test_width_is_that_of_a_normal_mean() -> None:
    values = np.random.default_rng(1).normal(3.0, 0.5, size=400)
    found = bootstrap_mean(values.tolist(), resamples=20_000)
    error = values.std() / math.sqrt(values.size)  # the resampled mean has exactly this deviation
    assert found.estimate == pytest.approx(values.mean(), rel=1e-12)
    assert found.low == pytest.approx(values.mean() - 1.959964 * error, abs=0.05 * error)
    assert found.high == pytest.approx(values.mean() + 1.959964 * error, abs=0.05 * error)
    narrow = bootstrap_mean(values.tolist(), confidence=0.6827, resamples=20_000)
    assert narrow.high - narrow.low == pytest.approx(2 * error, rel=0.03)


def test_quantiles_equal_those_of_all_possible_resamples() -> None:
    values = [0.0, 1.0, 10.0, 100.0]
    every = [float(np.mean(draw)) for draw in itertools.product(values, repeat=4)]
    found = bootstrap_mean(values, confidence=0.8, resamples=50_000)
    wider = float(stats.t.ppf(0.9, 3) / stats.norm.ppf(0.9)) * math.sqrt(4 / 3)
    middle = float(np.mean(values))
    # the drawn quantile lies within a point of probability of the exact one
    low, high = (
        middle + wider * (np.quantile(every, tail) - middle) for tail in ([0.09, 0.11], [0.89, 0.91])
    )
    assert low[0] <= found.low <= low[1]
    assert high[0] <= found.high <= high[1]


def test_covers_the_true_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    for windows in (5, 10, 40):
        hits = 0
        for trial in range(400):
            found = bootstrap_mean(
                rng.normal(size=windows).tolist(), confidence=0.9, resamples=500, seed=trial
            )
            hits += found.low <= 0.0 <= found.high
        assert 0.85 <= hits / 400 <= 0.96  # 0.9 and three deviations of chance


def test_pairing_removes_what_windows_share() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(3.0, 1.0, size=50)
    better = (hard + rng.normal(0.0, 0.01, size=50)).tolist()
    worse = (hard + 0.1 + rng.normal(0.0, 0.01, size=50)).tolist()
    found = paired_difference(worse, better)
    assert 0.09 < found.low < found.estimate < found.high < 0.11
    alone = bootstrap_mean(worse)
    assert alone.high - alone.low > 20 * (found.high - found.low)
    ratio = perplexity_ratio_interval(worse, better)
    assert ratio.estimate == pytest.approx(math.exp(found.estimate))
    assert (ratio.low, ratio.high) == (math.exp(found.low), math.exp(found.high))


def test_the_ratio_of_two_means() -> None:
    """Against the delta method's deviation of the logarithm, and turned round."""
    rng = np.random.default_rng(5)
    hard = rng.gamma(9.0, 0.1, size=200)
    ours, theirs = hard * rng.normal(0.5, 0.02, size=200), hard
    found = paired_ratio(ours.tolist(), theirs.tolist())
    ratio = ours.mean() / theirs.mean()
    deviation = np.std(ours - ratio * theirs) / theirs.mean() / math.sqrt(200)
    assert found.estimate == pytest.approx(ratio)
    assert found.low == pytest.approx(ratio - 1.96 * deviation, abs=0.1 * deviation)
    assert found.high == pytest.approx(ratio + 1.96 * deviation, abs=0.1 * deviation)
    back = paired_ratio(theirs.tolist(), ours.tolist())
    assert (1 / back.high, 1 / back.low) == pytest.approx((found.low, found.high), rel=1e-9)
    with pytest.raises(EvaluationError, match="not positive"):
        paired_ratio([1.0, 2.0], [0.0, 0.0])


def test_losses_past_all_numbers_are_infinite() -> None:
    found = perplexity_interval([1000.0, 1200.0])
    assert (found.estimate, found.high) == (math.inf, math.inf)
    assert exp(1.0) == math.e


def test_perplexity_interval_is_exp_of_the_mean_interval() -> None:
    values = [1.0, 2.0, 3.5]
    mean, ppl = bootstrap_mean(values), perplexity_interval(values)
    assert (ppl.estimate, ppl.low, ppl.high) == tuple(map(math.exp, (mean.estimate, mean.low, mean.high)))


def test_same_seed_same_interval_and_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(4).normal(size=30).tolist()
    first = bootstrap_mean(values, resamples=1000)
    assert first == bootstrap_mean(values, resamples=1000)
    assert first != bootstrap_mean(values, resamples=1000, seed=1)
    monkeypatch.setattr("gossamer.evaluate.bootstrap._BLOCK", 100)
    assert first == bootstrap_mean(values, resamples=1000)


def test_equal_values_have_no_spread() -> None:
    found = bootstrap_mean([2.0] * 10)
    assert (found.low, found.estimate, found.high) == (2.0, 2.0, 2.0)


def test_bad_input() -> None:
    with pytest.raises(EvaluationError, match="at least two"):
        bootstrap_mean([1.0])
    with pytest.raises(EvaluationError, match="not finite"):
        bootstrap_mean([1.0, math.nan])
    with pytest.raises(EvaluationError, match="confidence"):
        bootstrap_mean([1.0, 2.0], confidence=1.0)
    with pytest.raises(EvaluationError, match="resamples"):
        bootstrap_mean([1.0, 2.0], resamples=0)
    with pytest.raises(EvaluationError, match="same windows"):
        paired_difference([1.0, 2.0], [1.0])


def test_what_a_statistic_cannot_be_is_left_out() -> None:
    wide = bootstrap_mean([0.5, 1.0])
    assert wide.low < 0 < 1 < wide.high
    shares = wide.within(0, 1)
    assert (shares.low, shares.high, shares.estimate) == (0, 1, 0.75)
    assert wide.within(0).high == wide.high
