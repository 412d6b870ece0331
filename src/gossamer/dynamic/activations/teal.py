"""TEAL: activations of small magnitude are dropped."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.claim import Claim
from gossamer.dynamic.activations.method import HALF, METHODS, ActivationMethod


@METHODS.register("teal", cite="Liu et al. 2024, Training-Free Activation Sparsity in Large Language Models")
@dataclass
class Teal(ActivationMethod):
    """Keeps x_j where |x_j| > t, one threshold a linear layer.

    The thresholds are quantiles of the dense model's activations. Each layer's share is the same, or found
    greedily within each block (`allocate.greedy`), as in the paper. Its figures are of prompts whose first
    half is left dense; here gates act on every token, first ones, which suffer most, included.
    """

    claim = Claim(
        says="40 % of all activations, shared out greedily, can be dropped with little loss (7B to 70B).",
        experiment=HALF,
        metric="perplexity",
        than="dense",
        factor=1.1,
    )
