"""Bootstrap over windows: how far a measured mean, or a ratio of two, could lie elsewhere on such text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from scipy.special import ndtri, stdtrit

from gossamer.claim import Unclaimed
from gossamer.errors import EvaluationError

RESAMPLES = 10_000
_BLOCK = 4_000_000  # random indices drawn at a time: 32 MB
UNCLAIMED = Unclaimed(
    name="bootstrap intervals",
    cite="Efron 1979, Bootstrap Methods: Another Look at the Jackknife; Hesterberg 2015, What Teachers "
    "Should Know About the Bootstrap",
    figures="",
    why="They are a measure: what the verdicts of this page are clear by.",
)


@dataclass(frozen=True)
class Interval:
    """A statistic of all windows, and where its true value lies with so much ``confidence``."""

    estimate: float
    low: float
    high: float
    confidence: float
    windows: int
    resamples: int

    def map(self, fn: Callable[[float], float]) -> Interval:
        """The interval of ``fn(statistic)``; exact for an increasing ``fn``, since percentiles keep order."""
        return Interval(
            fn(self.estimate), fn(self.low), fn(self.high), self.confidence, self.windows, self.resamples
        )

    def within(self, least: float, most: float = math.inf) -> Interval:
        """The interval without what the statistic cannot be."""
        return replace(self, low=max(self.low, least), high=min(self.high, most))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def exp(nats: float) -> float:
    """e to the power ``nats``, infinity where that is past all numbers: a ruined model may be so bad."""
    return math.exp(nats) if nats < 709.0 else math.inf


def bootstrap_mean(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Interval of the mean of ``values`` (one per window, nats per token or any unit).

    Windows are drawn with replacement, as many as there are, ``resamples`` times; the middle ``confidence``
    of the means, widened as Student's t and the n - 1 degrees of freedom ask of few windows (by 10 % at 20,
    by 58 % at 5), is the interval. Same values and seed, same interval. Windows are taken as independent,
    and it says nothing of text from elsewhere.
    Efron 1979, Bootstrap Methods: Another Look at the Jackknife; Hesterberg 2015, What Teachers Should Know
    About the Bootstrap (percentile intervals are too narrow for small n, and how much).

    Raises EvaluationError for fewer than two values, values that are not finite, or a confidence outside
    (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    columns = array[:, None] if array.ndim == 1 else array
    return _interval(columns, _mean, confidence=confidence, resamples=resamples, seed=seed)


def paired_ratio(values: Sequence[float], reference: Sequence[float], **options: Any) -> Interval:
    """Interval of ``mean(values) / mean(reference)``, both positive and measured on the same windows in the
    same order; drawn in pairs, and widened, as by `paired_difference` and `bootstrap_mean`."""
    _check_pairs(values, reference)
    pairs = np.stack([np.asarray(values, np.float64), np.asarray(reference, np.float64)], axis=1)
    if pairs.size and not (pairs.mean(axis=0) > 0).all():
        raise EvaluationError("a ratio was asked of means that are not positive")
    logs = _interval(pairs, _log_ratio, **options)  # whose spread is even on both sides
    return logs.map(exp)


def _mean(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0]


def _log_ratio(means: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.log(means[..., 0]) - np.log(means[..., 1])
    return found


def _interval(
    array: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Of a statistic of the means of ``array``'s columns ``(windows, columns)``."""
    if array.ndim != 2 or len(array) < 2:
        raise EvaluationError(
            f"an interval needs at least two windows, got {len(array)}: "
            "evaluate on more text or shorter windows"
        )
    if not np.isfinite(array).all():
        raise EvaluationError("an interval was asked of values that are not finite")
    if not 0.0 < confidence < 1.0:
        raise EvaluationError(f"confidence must lie between 0 and 1, got {confidence}")
    if resamples < 1:
        raise EvaluationError(f"resamples must be at least 1, got {resamples}")
    rng = np.random.default_rng(seed)
    n = len(array)
    means = np.empty((resamples, array.shape[1]))
    step = max(1, _BLOCK // array.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        means[start : start + count] = array[rng.integers(0, n, size=(count, n))].mean(axis=1)
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(statistic(means), [tail, 1.0 - tail])
    middle = float(statistic(array.mean(axis=0)))
    wider = float(stdtrit(n - 1, 1 - tail) / ndtri(1 - tail)) * math.sqrt(n / (n - 1))
    low, high = (middle + wider * (float(end) - middle) for end in (low, high))
    return Interval(middle, low, high, confidence, n, resamples)


def paired_difference(values: Sequence[float], reference: Sequence[float], **options: Any) -> Interval:
    """Interval of ``mean(values) - mean(reference)``, both measured on the same windows in the same order.

    Each resample draws whole windows, both members of a pair together: what makes a window hard for both
    cancels, so the interval is far narrower than that of two unpaired means.
    Raises EvaluationError where the lengths differ, and as `bootstrap_mean` does.
    """
    _check_pairs(values, reference)
    difference = np.asarray(values, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    return bootstrap_mean(difference.tolist(), **options)


def _check_pairs(values: Sequence[float], reference: Sequence[float]) -> None:
    if len(values) != len(reference):
        raise EvaluationError(
            f"a paired interval needs the same windows on both sides, got {len(values)} and {len(reference)}"
        )


def perplexity_interval(nll: Sequence[float], **options: Any) -> Interval:
    """Interval of the perplexity exp(mean nll); ``nll``: nats per token of each window, all equally long."""
    return bootstrap_mean(nll, **options).map(exp)


def perplexity_ratio_interval(nll: Sequence[float], reference: Sequence[float], **options: Any) -> Interval:
    """Interval of perplexity over the reference's perplexity on the same windows (1.02 = 2 % worse)."""
    return paired_difference(nll, reference, **options).map(exp)
