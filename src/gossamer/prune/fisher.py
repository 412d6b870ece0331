"""Optimal Brain Damage with the empirical Fisher information as the diagonal of the Hessian."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.calibrate import Gradient
from gossamer.claim import Claim, Experiment
from gossamer.prune.method import METHODS, Layer, ScoreMethod


@METHODS.register(
    "fisher",
    cite="LeCun et al. 1989, Optimal Brain Damage; Theis et al. 2018, Faster Gaze Prediction with Dense "
    "Networks and Fisher Pruning",
)
@dataclass
class Fisher(ScoreMethod):
    """W_ij^2 * E[g_ij^2] / 2, g the gradient of one window's loss; compared within each layer.

    Scores estimate changes of one loss, so that layers may compete too (allocation ``global``).
    """

    needs = (Gradient,)
    comparison_group = "tensor"
    claim = Claim(
        says="Deleting weights by second-order saliency raises the error far less than deleting small ones.",
        experiment=Experiment(),
        metric="perplexity",
        than="magnitude",
    )

    def scores(self, layer: Layer) -> Tensor:
        return layer.weight.square() * layer[Gradient].squares / 2
