"""First-order Taylor pruning: weights go whose removal changes the loss least, to first order."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.calibrate import Gradient, SignedGradient
from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.prune.method import METHODS, Layer, ScoreMethod


@METHODS.register(
    "taylor",
    cite="Molchanov et al. 2017, Pruning Convolutional Neural Networks for Resource Efficient Inference; "
    "Ma et al. 2023, LLM-Pruner (element-wise, first order)",
)
@dataclass
class Taylor(ScoreMethod):
    """E|g_ij * W_ij|, g the gradient of one window's loss; compared within each layer.

    ``mean``: ``absolute``, of what each window gives, without its sign (Molchanov et al.: computed for each
    example, and averaged), or ``signed``, |E[g_ij] * W_ij|, of a gradient accumulated over windows
    (LLM-Pruner).
    """

    mean: str = "absolute"
    needs = (Gradient,)
    comparison_group = "tensor"
    claim = Claim(
        says="How much the loss of an example moves without a weight, to first order, ranks weights better "
        "than their size.",
        experiment=Experiment(
            against=("random", "magnitude", "signed mean"),
            compressed={"signed mean": {"method": "taylor", "options": {"mean": "signed"}}},
        ),
        metric="perplexity",
        than="magnitude",
    )

    def __post_init__(self) -> None:
        if self.mean not in ("absolute", "signed"):
            raise MethodError(f"taylor takes a mean that is absolute or signed, not {self.mean!r}")
        if self.mean == "signed":
            # of this object: its class does not know what is averaged
            vars(self)["needs"] = (Gradient, SignedGradient)

    def scores(self, layer: Layer) -> Tensor:
        return (layer[Gradient].mean * layer.weight).abs()
