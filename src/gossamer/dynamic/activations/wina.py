"""WINA: activations are weighed by the column of the weight that they multiply."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.claim import Claim
from gossamer.dynamic.activations.method import HALF, METHODS, ActivationMethod
from gossamer.dynamic.activations.orthogonal import READERS
from gossamer.dynamic.activations.sites import Site, dense_weight

ORTHOGONAL = tuple(chosen for _, chosen in READERS.values())


@METHODS.register("wina", cite="Chen et al. 2025, WINA: Weight Informed Neuron Activation")
@dataclass
class Wina(ActivationMethod):
    """Keeps x_j where |x_j| * ||W_:j||_2 is large: the norm of what dropping it takes from the outputs.

    Its error is least where the columns of W are orthogonal: `orthogonal_columns` prepares a model so, and
    ``prepared`` then weighs only the key and gate projections, all else by size, as the paper's code does.
    The paper's top-k of each token is ``selection="top_k"``.
    """

    claim = Claim(
        says="Weighing activations by the columns that they meet loses less than their size alone (TEAL).",
        experiment=HALF,
        metric="perplexity",
        than="half",
    )

    prepared: bool = False

    def importance(self, site: Site, partner_mean: Tensor | None) -> Tensor | None:
        if self.prepared and not site.name.endswith(ORTHOGONAL):
            return None
        norms: Tensor = dense_weight(site.module).norm(dim=0)
        return norms
