"""Top-k: every token keeps the same number of activations, its largest."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.claim import Claim
from gossamer.dynamic.activations.method import HALF, METHODS, ActivationMethod


@METHODS.register("topk", cite="Li et al. 2023, The Lazy Neuron Phenomenon")
@dataclass
class TopK(ActivationMethod):
    """Keeps the k largest |x_j| of each token: exact, without calibration, but a selection for every token.

    The paper does so to the activations within MLPs, in training too; here it is done to the inputs of every
    linear layer of a finished model.
    """

    selection: str = "top_k"

    claim = Claim(
        says="The largest activations of each token carry it: half can go, and no threshold does better.",
        experiment=HALF,
        metric="perplexity",
        than="half",
    )
