"""Block top-k: mean queries meet mean keys, and the likeliest blocks are looked at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.claim import Claim
from gossamer.dynamic.attention.policy import (
    LONG,
    POLICIES,
    Policy,
    block_means,
    check_counts,
    for_heads,
    largest,
)
from gossamer.engine import Look


@POLICIES.register("block_topk", cite="Jiang et al. 2024, MInference 1.0 (its block-sparse pattern)")
@dataclass(frozen=True)
class BlockTopK(Policy):
    """The ``count`` blocks of largest mean score, the first block and the query's own among them."""

    claim = Claim(
        says="Where attention lies changes with the prompt: blocks chosen for it lose less than a "
        "window of as many.",
        experiment=LONG,
        metric="perplexity",
        than="sink_window",
        factor=1.0,
    )

    count: int = 16

    def __post_init__(self) -> None:
        check_counts(self, count=1)

    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor:
        rows, positions = queries.shape[1], keys.shape[1]
        scores = block_means(queries, positions - rows) @ for_heads(block_means(keys, 0), len(queries)).mT
        own = torch.arange(scores.shape[2] - scores.shape[1], scores.shape[2])
        scores[:, torch.arange(len(own)), own] = torch.inf
        if self.count > 1:
            scores[:, :, 0] = torch.inf
        return largest(scores, self.count, rows, positions)

    def look(self, layer: int, head: int) -> Look:
        return Look("pooled", count=self.count)
