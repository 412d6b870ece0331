"""Random pruning: the baseline that every method must beat."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.claim import Claim, Experiment
from gossamer.prune.method import METHODS, Layer, ScoreMethod


@METHODS.register("random", cite="baseline: uniformly random masks")
@dataclass
class Random(ScoreMethod):
    """Uniform random scores, seeded by ``seed`` and the layer's name."""

    seed: int = 0
    comparison_group = "tensor"
    claim = Claim(
        says="A random mask of the same size is the floor: magnitude is at least as good.",
        experiment=Experiment(against=("magnitude",)),
        metric="kl",
        than="magnitude",
        bound="at_least",
    )

    def scores(self, layer: Layer) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed}:{layer.name}".encode()))
        return torch.rand(layer.weight.shape, generator=generator)
