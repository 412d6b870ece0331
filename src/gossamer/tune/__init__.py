"""Winning quality back: the weights that were kept are tuned, under masks that stay exact."""

from gossamer.tune.loop import Loop, Outcome, held_out_losses, train
from gossamer.tune.method import TUNERS, Tuner, tuner
from gossamer.tune.modules import ModuleTuning
from gossamer.tune.saves import Saves
from gossamer.tune.sparse import SparseTuning
from gossamer.tune.weights import WEIGHTS, TunedWeight
from gossamer.tune.windows import Windows

__all__ = [
    "TUNERS",
    "WEIGHTS",
    "Loop",
    "ModuleTuning",
    "Outcome",
    "Saves",
    "SparseTuning",
    "TunedWeight",
    "Tuner",
    "Windows",
    "held_out_losses",
    "train",
    "tuner",
]
