"""First-order Taylor pruning: weights go whose removal changes the loss least, to first order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.calibrate import Gradient
from gossamer.claim import Claim, Experiment
from gossamer.prune.method import METHODS, Layer, ScoreMethod


@METHODS.register(
    "taylor",
    cite="Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference; "
    "Ma et al. 2023, LLM-Pruner (element-wise, first order)",
)
@dataclass
class Taylor(ScoreMethod):
    """|g_ij * W_ij|, g the gradient of the loss averaged over the windows; compared within each layer."""

    needs = (Gradient,)
    comparison_group = "tensor"
    claim = Claim(
        says="What the loss loses with a weight, to first order, ranks weights better than their size.",
        experiment=Experiment(),
        metric="perplexity",
        than="magnitude",
    )

    def scores(self, layer: Layer) -> Tensor:
        return (layer[Gradient].mean * layer.weight).abs()
