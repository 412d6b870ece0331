"""What every attention policy is: a choice of key blocks for each block of queries."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.claim import Claim, Experiment
from gossamer.engine import Look
from gossamer.errors import MethodError
from gossamer.kernels import BLOCK, block_count
from gossamer.registry import Registry


class Policy(ABC):
    """Chooses, per layer and head, which blocks of `BLOCK` keys each block of queries looks at."""

    name: ClassVar[str]
    claim: ClassVar[Claim | None] = None
    needs: ClassVar[tuple[str, ...]] = ()  # what is calibrated beforehand
    static: ClassVar[bool] = False  # whether positions alone decide

    @classmethod
    def calibrated(cls, model: Any, windows: Tensor, **settings: Any) -> Policy:
        """The policy with plain ``settings``, what it needs besides found on ``windows``, int64
        ``(windows, n)``, of the transformers ``model``."""
        return cls(**settings)

    @abstractmethod
    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor | None:
        """bool ``(heads, query blocks, key blocks)`` of `block_count`; None: all.

        ``queries (heads, rows, dim)`` stand at the last positions of ``keys (kv_heads, positions, dim)``. No
        later position enters an output, but some policies choose by the whole prompt. The block in which the
        queries lie themselves is always looked at, whatever is chosen here.
        """

    def look(self, layer: int, head: int) -> Look:
        """The same choice for one head as data for the native decoder, which estimates for each 512 rows of a
        prompt anew. Raises MethodError where there is none."""
        raise MethodError(f"the native decoder has no form of the attention policy {self.name}")

    def native(self, layers: int, heads: int) -> list[list[Look]]:
        """`look` for every head of a model."""
        return [[self.look(layer, head) for head in range(heads)] for layer in range(layers)]


def whole(value: object, least: int = 0) -> bool:
    """Whether ``value`` is a whole number of at least ``least`` (True and False are none)."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def check_counts(policy: Policy, **least: int) -> None:
    """Raises MethodError where a setting of ``policy`` is no whole number of at least ``least``."""
    for name, low in least.items():
        value = getattr(policy, name)
        if not whole(value, low):
            raise MethodError(f"{policy.name} takes a whole {name} of at least {low}, not {value!r}")


LONG = Experiment(
    windows=1,
    seqlen=8064,
    length=8064,
    first=4032,
    attending={
        "sink_window": {"sink": BLOCK, "window": 14 * BLOCK},
        "window": {"method": "sink_window", "sink": 0, "window": 15 * BLOCK},
        "block_topk": {"count": 16},
        "hip": {"count": 13, "window": 2 * BLOCK},
        "minference": {"budget": 16},
        "strided": {"window": 8 * BLOCK, "stride": 15},
    },
    against=("sink_window",),
)
"""A quarter of the blocks, 16 for each block of queries, in the second half of windows of 8,064 tokens."""

POLICIES: Registry[Policy] = Registry(
    "attention policy",
    {
        "block_topk": "gossamer.dynamic.attention.block_topk",
        "hip": "gossamer.dynamic.attention.hip",
        "minference": "gossamer.dynamic.attention.minference",
        "sink_window": "gossamer.dynamic.attention.sink_window",
        "strided": "gossamer.dynamic.attention.strided",
    },
)


def numbers(rows: int, positions: int) -> tuple[Tensor, Tensor]:
    """The numbers of the blocks of queries ``(query blocks, 1)`` and of keys ``(1, key blocks)``; a query
    block has the number of the key block at the same positions."""
    of_queries, of_keys = block_count(rows, positions)
    return torch.arange(of_keys - of_queries, of_keys)[:, None], torch.arange(of_keys)[None]


def latest(row: Tensor, column: Tensor, window: int) -> Tensor:
    """Blocks that hold one of the last ``window`` positions before some query of the row's block, or it."""
    return column >= row - blocks_back(window)


def blocks_back(window: int) -> int:
    """Blocks before a query's own that hold some of the last ``window`` positions of the block's first."""
    return -(-(window - 1) // BLOCK)


def causal(chosen: Tensor, rows: int, positions: int) -> Tensor:
    """``chosen`` without later blocks than the query's own, which is always there."""
    row, column = numbers(rows, positions)
    return (chosen & (column <= row)) | (column == row)


def block_means(x: Tensor, start: int) -> Tensor:
    """Means of ``x (heads, n, dim)`` over blocks of positions, of which its first is ``start``: float32
    ``(heads, blocks, dim)``."""
    index = (torch.arange(start, start + x.shape[1]) // BLOCK) - start // BLOCK
    count = int(index[-1]) + 1
    sums = x.new_zeros((len(x), count, x.shape[2]), dtype=torch.float32).index_add_(1, index, x.float())
    return sums / torch.bincount(index, minlength=count)[:, None]


def largest(scores: Tensor, count: int, rows: int, positions: int) -> Tensor:
    """The ``count`` largest of each row of ``scores (heads, query blocks, key blocks)`` that are no later
    than the row's own block."""
    row, column = numbers(rows, positions)
    open_scores = scores.masked_fill(column > row, -torch.inf)
    best = open_scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def for_heads(keys: Tensor, heads: int) -> Tensor:
    """``keys (kv_heads, ...)`` once for each of ``heads`` heads of queries."""
    return keys.repeat_interleave(heads // len(keys), 0)
