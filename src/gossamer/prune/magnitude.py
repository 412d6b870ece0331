"""Magnitude pruning: small weights go first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.claim import Claim, Experiment
from gossamer.prune.method import METHODS, Layer, ScoreMethod


@METHODS.register("magnitude", cite="Han et al. 2015, Learning both Weights and Connections")
@dataclass
class Magnitude(ScoreMethod):
    """|W_ij|, compared within each layer."""

    comparison_group = "tensor"
    claim = Claim(
        says="Without any data, pruning the smallest weights beats pruning random ones.",
        experiment=Experiment(against=("random",)),
        metric="kl",
        than="random",
        factor=1.0,
    )

    def scores(self, layer: Layer) -> Tensor:
        return layer.weight.abs()
