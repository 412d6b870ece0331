"""The published pruning methods, one small file each, and what they share."""

from gossamer.claim import Claim, Experiment
from gossamer.prune.method import (
    ALIASES,
    FORMATS,
    METHODS,
    Combination,
    Layer,
    Method,
    Pruned,
    ScoreMethod,
    check_combination,
    method,
    round_values,
)

__all__ = [
    "ALIASES",
    "FORMATS",
    "METHODS",
    "Claim",
    "Combination",
    "Experiment",
    "Layer",
    "Method",
    "Pruned",
    "ScoreMethod",
    "check_combination",
    "method",
    "round_values",
]
