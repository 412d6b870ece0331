"""PPL-p %: the sparsity that a model bears before its perplexity has risen by p per cent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from gossamer.claim import Unclaimed
from gossamer.dynamic.activations.calibrate import Calibrated
from gossamer.errors import SparsityError
from gossamer.evaluate import evaluate

MOST = 0.98  # where the search ends
UNCLAIMED = Unclaimed(
    name="PPL-p %",
    cite="Luo et al. 2024, Sparsing Law: Towards Large Language Models with Greater Activation Sparsity",
    figures="Dropped activations",
    why="It is a measure: the sparsity that a model bears under any method of gating.",
)


@dataclass(frozen=True)
class PplP:
    """The largest sparsity found at which perplexity is at most ``(1 + percent / 100) * dense_perplexity``.

    ``measured``: the perplexity at every sparsity that was tried, in order of sparsity.
    """

    percent: float
    sparsity: float
    perplexity: float
    dense_perplexity: float
    measured: tuple[tuple[float, float], ...]


def largest_sparsity(perplexity: Callable[[float], float], percent: float, tolerance: float = 0.01) -> PplP:
    """Bisects on ``perplexity(sparsity)`` from 0 (dense) to MOST until it is known to ``tolerance``.

    Perplexity is taken to rise with sparsity; where it does not, the answer still keeps the bar, but a larger
    sparsity might too. Raises SparsityError unless ``percent`` >= 0 and ``tolerance`` > 0.
    """
    if not percent >= 0 or not tolerance > 0:
        raise SparsityError(f"percent must be >= 0 and tolerance > 0, got {percent!r} and {tolerance!r}")
    measured = {0.0: perplexity(0.0)}
    bar = measured[0.0] * (1 + percent / 100)
    low, high, trial = 0.0, MOST, MOST
    while high - low > tolerance:
        measured[trial] = perplexity(trial)
        if measured[trial] <= bar:
            low = trial
        else:
            high = trial
        trial = (low + high) / 2
    return PplP(percent, low, measured[low], measured[0.0], tuple(sorted(measured.items())))


def ppl_p(
    model: nn.Module,
    calibrated: Calibrated,
    windows: Tensor,
    percent: float = 1.0,
    *,
    tolerance: float = 0.01,
    allocate: Callable[[float], Mapping[str, float]] | None = None,
) -> PplP:
    """PPL-``percent`` % of ``model`` under a method, on ``windows``, token ids ``(n, seqlen)``.

    The metric is that of Luo et al. 2024, Sparsing Law. What each layer drops is the method's choice: the
    same sparsity at all sites, or what ``allocate(sparsity)`` gives by name. Raises as `largest_sparsity`
    and `evaluate`.
    """

    def perplexity(sparsity: float) -> float:
        levels = sparsity if allocate is None else allocate(sparsity)
        with calibrated.gates(levels).attach(model):
            return evaluate(model, windows).perplexity

    return largest_sparsity(perplexity, percent, tolerance)
