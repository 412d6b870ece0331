"""How the next token is chosen from logits: the likeliest, or drawn from what filters leave.

All of it is numpy: PyTorch would wake its team of threads for a vocabulary, and that team, spinning on, takes
the cores from a decoder that has threads of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, TypedDict

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gossamer.claim import Unclaimed
from gossamer.errors import ModelError, SamplingError

Floats = NDArray[np.floating[Any]]

_RANGES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda x: 0 <= x < math.inf, "0 (always the likeliest token) or more"),
    "top_k": (Integral, lambda x: x >= 0, "a whole number, 0 (all) or more"),
    "top_p": (Real, lambda x: 0 < x <= 1, "in (0, 1]"),
    "min_p": (Real, lambda x: 0 <= x <= 1, "in [0, 1]"),
    "repetition_penalty": (Real, lambda x: 0 < x < math.inf, "above 0 (1: no penalty)"),
    "seed": (Integral, lambda x: x >= 0, "a whole number, 0 or more"),
}
UNCLAIMED = Unclaimed(
    name="penalties and filters of sampling",
    cite="Keskar et al. 2019, CTRL; Holtzman et al. 2020, The Curious Case of Neural Text Degeneration; "
    "Nguyen et al. 2024, min-p",
    figures="",
    why="Tokens are drawn alike by dense and sparse models.",
)


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. Steps apply in this order, that of transformers, each to what the one before
    left; with a temperature of 0 only the first, and then the likeliest token is taken.

    1. ``repetition_penalty`` divides positive and multiplies negative logits of all tokens in the prompt and
       the answer so far (Keskar et al. 2019, CTRL); 1 leaves them, more discourages them.
    2. ``temperature`` divides all logits.
    3. ``top_k`` keeps the k likeliest tokens, and those as likely as the last of them; 0 keeps all.
    4. ``top_p`` keeps the fewest likeliest tokens whose probabilities together reach it (Holtzman et al.
       2020, The Curious Case of Neural Text Degeneration).
    5. ``min_p`` keeps tokens at least that many times as likely as the likeliest (Nguyen et al. 2024).

    Then one is drawn by its probability; the same ``seed`` and logits give the same tokens.
    Raises SamplingError for a value out of its range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (kind, fits, range_) in _RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or not fits(value):
                raise SamplingError(f"{name} must be {range_}, got {value}")


class SamplingOptions(TypedDict, total=False):
    """`Sampling` as options of a function that has others besides."""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    seed: int


class Sampler:
    """Chooses the tokens of one sequence, which begins with the tokens ``ids``."""

    def __init__(self, sampling: Sampling, ids: Iterable[int] = ()) -> None:
        self._sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._seen = set(ids)

    def choose(self, logits: Floats) -> int:
        """The next token, given finite float32 logits ``(vocab,)``."""
        if self._sampling.repetition_penalty != 1:
            logits = penalized(logits, self._seen, self._sampling.repetition_penalty)
        if self._sampling.temperature == 0:
            token = int(logits.argmax())
        else:
            tokens, probabilities = distribution(logits, self._sampling)
            reached = probabilities.cumsum()
            place = np.searchsorted(reached, self._random.random() * reached[-1], side="right")
            token = int(tokens[min(int(place), len(tokens) - 1)])
        self._seen.add(token)
        return token


def penalized(logits: Floats, seen: Iterable[int], penalty: float) -> Floats:
    """A copy of ``logits`` in which those of tokens ``seen`` are made less likely (step 1 of `Sampling`)."""
    logits = logits.copy()
    tokens = np.array([token for token in seen if token < len(logits)], dtype=np.int64)
    found = logits[tokens]
    logits[tokens] = np.where(found < 0, found * penalty, found / penalty)
    return logits


def distribution(logits: Floats, sampling: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that steps 2 to 5 of `Sampling` keep, ascending, and their probabilities, which sum to 1.
    The temperature must be above 0."""
    # differences to the largest do not overflow, however small the temperature
    scores = (logits.astype(np.float64) - float(logits.max())) / sampling.temperature
    tokens = np.arange(len(scores))
    if 0 < sampling.top_k < len(scores):
        tokens = np.flatnonzero(scores >= np.partition(scores, -sampling.top_k)[-sampling.top_k])
    weights = np.exp(scores[tokens])
    if sampling.top_p < 1:
        kept = _nucleus(weights / weights.sum(), sampling.top_p)
        tokens, weights = tokens[kept], weights[kept]
    if sampling.min_p > 0:
        kept = weights >= sampling.min_p  # the likeliest always stays, and weighs 1
        tokens, weights = tokens[kept], weights[kept]
    return tokens, weights / weights.sum()


def _nucleus(probabilities: NDArray[np.float64], top_p: float) -> NDArray[np.bool_]:
    """Which tokens top-p keeps: all but the least likely whose sum does not exceed 1 - top_p; of equal ones
    the first go first, and one always stays."""
    spare = 1 - top_p
    # all tokens below this are less likely than all others, and together still below `spare`: no need to sort
    small = probabilities < spare / len(probabilities)
    ordered = np.sort(probabilities[~small])
    below = np.count_nonzero(probabilities[small].sum() + ordered.cumsum() <= spare)
    removed = min(int(below), len(ordered) - 1)
    border = ordered[removed]
    kept: NDArray[np.bool_] = probabilities > border
    equal = np.flatnonzero(probabilities == border)
    kept[equal[removed - np.searchsorted(ordered, border) :]] = True
    return kept


def log_probabilities(logits: Floats) -> NDArray[np.float64]:
    """log softmax of ``logits``, in nats."""
    shifted = logits.astype(np.float64) - float(logits.max())
    result: NDArray[np.float64] = shifted - math.log(np.exp(shifted).sum())
    return result


def finite_logits(logits: Tensor) -> Floats:
    """The memory of a logits tensor as numpy sees it. Raises ModelError where they are NaN or infinite."""
    found: Floats = logits.detach().cpu().numpy()
    if not np.isfinite(found).all():
        raise ModelError("the model gives logits that are NaN or infinite: its weights are damaged")
    return found
