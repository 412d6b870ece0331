"""What a model got right of zero-shot tasks: accuracy, its interval, and answers that flipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from gossamer.claim import Unclaimed
from gossamer.errors import EvaluationError
from gossamer.evaluate.bootstrap import Interval

UNCLAIMED = Unclaimed(
    name="flips, and intervals of accuracy",
    cite="Dutta et al. 2024, Accuracy is Not All You Need; Agresti & Min 2005; Wilson 1927; asked by Gao et "
    "al. 2024, The Language Model Evaluation Harness",
    figures="What perplexity hides",
    why="They are measures, of which nothing is claimed.",
)


@dataclass(frozen=True)
class TaskScore:
    """One task, item by item: ``correct`` by log-likelihood, ``correct_norm`` by log-likelihood per character
    of the choice (None where all choices are the same text after different contexts, or the task has no such
    score); ``picked``: the index of the choice that is likeliest."""

    name: str
    correct: tuple[bool, ...]
    correct_norm: tuple[bool, ...] | None
    picked: tuple[int, ...]

    @property
    def items(self) -> int:
        return len(self.correct)

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / self.items

    @property
    def accuracy_norm(self) -> float | None:
        return None if self.correct_norm is None else sum(self.correct_norm) / self.items

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: accuracies, their 95 % Wilson intervals, and the answers as 0 and 1."""
        found: dict[str, Any] = {"items": self.items, "accuracy": self.accuracy}
        found["accuracy_interval"] = list(wilson(sum(self.correct), self.items))
        found["accuracy_norm"] = self.accuracy_norm
        found["accuracy_norm_interval"] = (
            None if self.correct_norm is None else list(wilson(sum(self.correct_norm), self.items))
        )
        found["correct"] = [int(right) for right in self.correct]
        found["correct_norm"] = (
            None if self.correct_norm is None else [int(right) for right in self.correct_norm]
        )
        found["picked"] = list(self.picked)
        return found


@dataclass(frozen=True)
class Flips:
    """The same items answered by two models: ``lost`` were right before and are wrong now, ``gained`` the
    other way; ``difference``: of accuracy, now - before, with its 95 % interval over pairs of answers.
    Dutta et al. 2024, Accuracy is Not All You Need: equal accuracy may hide many flips."""

    lost: int
    gained: int
    difference: Interval

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"lost": self.lost, "gained": self.gained, "difference": self.difference.to_dict()}


def flips(now: Sequence[bool], before: Sequence[bool]) -> Flips:
    """Flips between two models' answers to the same items, in order. The interval is that of paired shares
    with half an item added to each of the four kinds of pairs, so that no flips among few items are no proof
    (Agresti & Min 2005, Simple Improved Confidence Intervals for Comparing Matched Proportions). Raises
    EvaluationError for other lengths and where there is none."""
    if len(now) != len(before) or not now:
        raise EvaluationError(f"flips are of the same items, got {len(now)} and {len(before)} answers")
    pairs = list(zip(now, before, strict=True))
    lost = sum(was and not now_right for now_right, was in pairs)
    gained = sum(now_right and not was for now_right, was in pairs)
    items, changed, net = len(pairs) + 2, lost + gained + 1, gained - lost
    middle = net / items
    half = NormalDist().inv_cdf(0.975) * math.sqrt(changed - net**2 / items) / items
    low, high = max(-1.0, middle - half), min(1.0, middle + half)
    difference = Interval((gained - lost) / len(pairs), low, high, 0.95, len(pairs), 0)
    return Flips(lost, gained, difference)


def wilson(right: int, items: int, confidence: float = 0.95) -> tuple[float, float]:
    """The score interval of a proportion, which stays in [0, 1] and holds for few items.
    Wilson 1927, Probable Inference, the Law of Succession, and Statistical Inference."""
    if not 0 <= right <= items or items < 1:
        raise EvaluationError(f"{right} of {items} is no proportion")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p, spread = right / items, z * z / items
    middle = (p + spread / 2) / (1 + spread)
    half = z * math.sqrt(p * (1 - p) / items + spread / items / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
