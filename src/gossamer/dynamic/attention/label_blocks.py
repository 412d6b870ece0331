"""Double Sparsity by blocks: label channels of keys tell which blocks a single row looks at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.claim import Unclaimed
from gossamer.dynamic.attention.policy import Policy, check_counts, numbers, whole
from gossamer.engine import Look
from gossamer.errors import MethodError
from gossamer.kernels import BLOCK

Labels = Sequence[Sequence[Sequence[int]]]  # [layer][head of keys]
UNCLAIMED = Unclaimed(
    name="Double Sparsity by blocks",
    cite="Yang et al. 2024, Post-Training Sparse Attention with Double Sparsity",
    figures="Caches",
    why="It is the native decoder's form of `double_sparsity`, whose claim runs in transformers.",
)


@dataclass(frozen=True)
class LabelBlocks(Policy):
    """A row by itself looks at the ``count`` blocks that hold the tokens which the channels ``labels`` of
    keys rate highest, at ``window`` blocks before its own, and its own; more rows at once at everything.

    Yang et al. 2024, Double Sparsity, whose unit is a token. Heads that share keys look at the same blocks: a
    block is as good as the head says whose best one it is the least behind. Queries and keys are rounded to
    bfloat16 for that, as the native decoder keeps them; `label_channels` finds labels, an even number a head.
    """

    labels: Labels
    count: int = 14
    window: int = 1
    name = "label_blocks"

    def __post_init__(self) -> None:
        labels = tuple(tuple(tuple(of_head) for of_head in layer) for layer in self.labels)
        object.__setattr__(self, "labels", labels)
        check_counts(self, count=0, window=0)
        channels = (channel for layer in labels for of_head in layer for channel in of_head)
        if not labels or not all(labels) or not all(whole(channel) for channel in channels):
            raise MethodError("label_blocks takes labels of each head of keys of each layer, its channels")
        if any(len({len(of_head) for of_head in layer}) > 1 or not layer[0] for layer in labels):
            raise MethodError(
                "label_blocks takes as many labels for each head of keys of a layer, at least one"
            )

    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor | None:
        if queries.shape[1] > 1:
            return None
        row, column = numbers(1, keys.shape[1])
        chosen = (column >= row - self.window).repeat(len(queries), 1, 1)
        own, rated = int(row), max(0, int(row) - self.window)
        labels = self._of(layer, len(keys))
        if max(map(max, labels)) >= keys.shape[2]:
            raise MethodError(f"the attention policy is wrong: heads have {keys.shape[2]} channels")
        index = torch.tensor(labels)[:, None]
        groups = queries.reshape(len(keys), -1, queries.shape[2])
        q = groups.gather(2, index.expand(-1, groups.shape[1], -1)).bfloat16().float()
        k = keys[:, : own * BLOCK].gather(2, index.expand(-1, own * BLOCK, -1)).bfloat16().float()
        if not rated:
            return chosen
        best = (q @ k.mT).reshape(*groups.shape[:2], own, BLOCK).amax(-1)
        rates = (best - best.amax(-1, keepdim=True)).amax(1)[:, :rated]
        places = rates.sort(stable=True, dim=-1, descending=True).indices[:, : self.count]
        places = places.repeat_interleave(groups.shape[1], 0)[:, None]
        return chosen.scatter(2, places, True)

    def native(self, layers: int, heads: int) -> list[list[Look]]:
        of_layers = [self._of(layer, len(self.labels[0])) for layer in range(layers)]
        return [
            [
                Look("labels", count=self.count, window=self.window, labels=labels)
                for labels in of_layer
                for _ in range(heads // len(of_layer))
            ]
            for of_layer in of_layers
        ]

    def _of(self, layer: int, kv_heads: int) -> list[tuple[int, ...]]:
        if layer >= len(self.labels) or len(self.labels[layer]) != kv_heads:
            raise MethodError("the labels of label_blocks are those of another model")
        return [tuple(of_head) for of_head in self.labels[layer]]
