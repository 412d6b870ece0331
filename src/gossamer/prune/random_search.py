"""Random mask search: many masks drawn, the best by its calibration error kept."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.calibrate import Gram
from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.matrices.values import ValueType
from gossamer.prune.method import METHODS, Layer, Method, Pruned, round_values
from gossamer.sparse import Pattern, mask_from_scores


@METHODS.register("random_search", cite="baseline: the best of many random masks by calibration error")
@dataclass
class RandomSearch(Method):
    """The random mask of ``draws`` whose outputs are closest to the dense layer's on calibration text.

    What search alone gives, with no idea of which weights matter. ``seed``: of the draws, with the layer's
    name.
    """

    draws: int = 16
    seed: int = 0
    needs = (Gram,)
    comparison_group = "tensor"
    claim = Claim(
        says="The best of a few random masks is still a random one: magnitude, with no data, is better.",
        experiment=Experiment(against=("random", "magnitude")),
        metric="kl",
        than="magnitude",
        bound="at_least",
    )

    def __post_init__(self) -> None:
        if self.draws < 1:
            raise MethodError(f"a search draws at least one mask, not {self.draws}")

    def prune(self, layer: Layer, pattern: Pattern, sparsity: float, values: ValueType, group: int) -> Pruned:
        gram = layer[Gram].matrix
        if sparsity == 0:
            return round_values(layer.weight, None, values, group, gram.diagonal())
        best, least = None, torch.inf
        for index in range(self.draws):
            mask = mask_from_scores(self._draw(layer, index), pattern, sparsity)
            change = layer.weight * ~mask
            error = float(((change @ gram) * change).sum(dtype=torch.float64))
            if best is None or error < least:
                best, least = mask, error
        return round_values(layer.weight, best, values, group, gram.diagonal())

    def _draw(self, layer: Layer, index: int) -> Tensor:
        seed = zlib.crc32(f"{self.seed}:{index}:{layer.name}".encode())
        return torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(seed))
