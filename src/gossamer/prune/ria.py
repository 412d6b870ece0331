"""RIA: how much of its row and column a weight is, times the root of the norm of what it multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.calibrate import InputNorm
from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.prune.method import METHODS, Layer, ScoreMethod


@METHODS.register(
    "ria", cite="Zhang et al. 2024, Plug-and-Play: An Efficient Post-training Pruning Method for LLMs"
)
@dataclass
class RIA(ScoreMethod):
    """(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||x_j||^power, compared within each layer.

    No channel is pruned whole by accident: its weights count relative to its own. The paper's permutation of
    channels for N:M is left out: a permuted input must be gathered, or permuted in the layer that makes it.
    """

    power: float = 0.5
    needs = (InputNorm,)
    comparison_group = "tensor"
    claim = Claim(
        says="RIA alone surpasses all earlier post-training pruning methods on LLaMA of 7B to 65B.",
        experiment=Experiment(against=("random", "magnitude", "wanda")),
        metric="perplexity",
        than="wanda",
    )

    def __post_init__(self) -> None:
        if not 0 <= self.power <= 2:
            raise MethodError(f"the power of the input's norm is between 0 and 2, got {self.power}")

    def scores(self, layer: Layer) -> Tensor:
        size = layer.weight.abs()
        least = torch.finfo(size.dtype).tiny  # a column or row of zeros has scores of zero
        of_column = size / size.sum(dim=0).clamp_min(least)
        of_row = size / size.sum(dim=1, keepdim=True).clamp_min(least)
        return (of_column + of_row) * layer[InputNorm].norm.pow(self.power)
