"""Blocks with more outliers keep more weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.sparse.allocate.method import ALLOCATIONS, Allocation, LayerInfo
from gossamer.sparse.allocate.uniform import UNIFORM
from gossamer.sparse.masks import check_sparsity


@ALLOCATIONS.register(
    "owl",
    cite="Yin et al. 2024, Outlier Weighed Layerwise Sparsity: A Missing Secret Sauce for Pruning LLMs to "
    "High Sparsity",
)
@dataclass(frozen=True)
class OWL(Allocation):
    """Blocks with more outliers among |W_ij| ||x_j|| keep more weights.

    Densities rise with the share of outliers, at most 2 * ``spread`` from least to most. ``outlier``: times
    the mean of a block's scores, over which one is an outlier (M); ``spread``: λ. Both are by default the
    authors' choice for LLaMA. Raises MethodError where they are none.
    """

    needs = ("InputNorm",)
    claim = Claim(
        says="LLaMA-7B at 70 %: perplexity 61.22 lower than that of Wanda with one sparsity for all blocks.",
        experiment=Experiment(sparsity=0.7, compressed={"owl": {"method": "wanda", "allocation": "owl"}}),
        metric="perplexity",
        than="wanda",
    )

    outlier: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if self.outlier <= 0:
            raise MethodError(f"owl's outlier is a multiple of the mean above 0, got {self.outlier:g}")
        if not 0 < self.spread <= 0.5:
            raise MethodError(f"owl's spread of sparsities is above 0 and at most 0.5, got {self.spread:g}")

    def outlier_share(self, scores: Callable[[], Iterable[Tensor]]) -> float:
        """The share of outliers among a block's scores; ``scores`` gives those of one layer after the other,
        and is called twice."""
        total = count = over = 0.0
        for part in scores():
            total, count = total + float(part.sum(dtype=torch.float64)), count + part.numel()
        for part in scores():
            over += int((part > self.outlier * total / count).sum())
        return over / count

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
        check_sparsity(sparsity)
        found = [layer.outliers for layer in layers if layer.outliers is not None]
        if len(found) < len(layers):
            raise MethodError("the allocation owl needs the share of outliers in every block")
        shares, sizes = np.array(found), np.array([layer.size for layer in layers], dtype=float)
        span = float(shares.max() - shares.min())
        if span == 0:
            return UNIFORM(layers, sparsity)
        more = (shares - shares.min()) / span * 2 * self.spread
        more -= (more * sizes).sum() / sizes.sum()
        # near sparsity 0 or 1 there is less room than the spread
        more *= min(1.0, sparsity / more.max(), 0.99 * (1 - sparsity) / -more.min())
        # where the room is all used, rounding may pass it
        return {la.name: max(0.0, float(sparsity - m)) for la, m in zip(layers, more, strict=True)}
