"""S2-Attention: every head keeps its own strided share of a context that the heads cover together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.claim import Claim
from gossamer.dynamic.attention.policy import (
    LONG,
    POLICIES,
    Policy,
    blocks_back,
    check_counts,
    latest,
    numbers,
)
from gossamer.engine import Look


@POLICIES.register("strided", cite="Lin et al. 2024, S2-Attention: Hardware-Aware Context Sharding")
@dataclass(frozen=True)
class Strided(Policy):
    """The last ``window`` positions for all heads, and of what lies before each ``stride``-th block, which
    block being the head's: heads h and h + stride keep the same ones. ``dense_layers`` from the first on keep
    everything, as the paper's hybrid models do.
    """

    claim = Claim(
        says="Heads that each keep a share of the context do as well as dense attention (models "
        "trained with it; here: not).",
        experiment=LONG,
        metric="perplexity",
        than="dense",
        factor=1.05,
    )
    static = True

    window: int = 512
    stride: int = 8
    dense_layers: int = 0

    def __post_init__(self) -> None:
        check_counts(self, window=1, stride=1, dense_layers=0)

    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor | None:
        if layer < self.dense_layers:
            return None
        row, column = numbers(queries.shape[1], keys.shape[1])
        head = torch.arange(len(queries))[:, None, None]
        return latest(row, column, self.window) | ((column + head) % self.stride == 0)

    def look(self, layer: int, head: int) -> Look:
        if layer < self.dense_layers:
            return Look()
        return Look("static", window=blocks_back(self.window), stride=self.stride, offset=head)
