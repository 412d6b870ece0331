"""Wanda: weights times the norm of what they multiply."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.calibrate import InputNorm
from gossamer.claim import Claim, Experiment
from gossamer.prune.method import METHODS, Layer, ScoreMethod


@METHODS.register("wanda", cite="Sun et al. 2024, A Simple and Effective Pruning Approach for LLMs")
@dataclass
class Wanda(ScoreMethod):
    """|W_ij| * ||x_j||_2, compared within each output row."""

    needs = (InputNorm,)
    comparison_group = "row"
    claim = Claim(
        says="LLaMA-7B at 50 %: WikiText perplexity 7.26, where magnitude gives 17.29 and dense 5.68.",
        experiment=Experiment(),
        metric="perplexity",
        than="magnitude",
        factor=0.5,
    )

    def scores(self, layer: Layer) -> Tensor:
        return layer.weight.abs() * layer[InputNorm].norm
