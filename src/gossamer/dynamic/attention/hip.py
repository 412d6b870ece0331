"""HiP: the most attended blocks, found by halving what is left: steps grow with the log of the context."""

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
    blocks_back,
    check_counts,
    for_heads,
    latest,
    numbers,
)
from gossamer.engine import Look
from gossamer.kernels import BLOCK


@POLICIES.register("hip", cite="Lee et al. 2025, HiP: A Training-free Sub-quadratic Transformer")
@dataclass(frozen=True)
class HiP(Policy):
    """``count`` ranges of the past, each halved into two of which one key in the middle stands for all; the
    ``count`` best of the halves go on, until ranges are blocks. ``window`` positions and the first block are
    looked at in any case. The paper scores each range by its middle key and a block of queries by its largest
    score; here the mean query of the block meets the middle key.
    """

    claim = Claim(
        says="Keys found by a tree, with no training, keep the quality of dense attention with little "
        "loss, unlike a window.",
        experiment=LONG,
        metric="perplexity",
        than="dense",
        factor=1.02,
    )

    count: int = 16
    window: int = 128

    def __post_init__(self) -> None:
        check_counts(self, count=1, window=1)

    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor:
        rows, positions = queries.shape[1], keys.shape[1]
        row, column = numbers(rows, positions)
        means = block_means(queries, positions - rows)
        heads, of_queries, _ = means.shape
        # ranges of blocks [low, high) of the past of each query block, the same for all heads at first
        edges = (torch.arange(self.count + 1) * (row + 1)) // self.count
        low, high = edges[:, :-1].expand(heads, -1, -1), edges[:, 1:].expand(heads, -1, -1)
        of_head = torch.arange(heads)[:, None, None]
        lasting = for_heads(keys, heads)
        while int((high - low).max()) > 1:
            middle = (low + high + 1) // 2
            low, high = torch.cat([low, middle], -1), torch.cat([middle, high], -1)
            centre = ((low + high) * BLOCK // 2).clamp(max=positions - 1)
            scores = (lasting[of_head, centre].float() @ means[..., None]).squeeze(-1)
            scores = scores.masked_fill(high <= low, -torch.inf)
            best = scores.topk(self.count, dim=-1).indices
            low, high = low.gather(-1, best), high.gather(-1, best)
        found = torch.zeros((heads, of_queries, column.shape[1]), dtype=torch.int64)
        found.scatter_add_(-1, low.clamp(max=column.shape[1] - 1), (high > low).long())
        return (found > 0) | (column == 0) | latest(row, column, self.window)

    def look(self, layer: int, head: int) -> Look:
        return Look("tree", count=self.count, sink=1, window=blocks_back(self.window))
