"""Winning quality back: the weights that were kept are tuned, under masks that stay exact."""

from gossamer.tune.method import TUNERS, Tuner, tuner
from gossamer.tune.weights import TunedWeight

__all__ = ["TUNERS", "TunedWeight", "Tuner", "tuner"]
