"""MInference: each head has one of three patterns, found once; where it lies is estimated for each prompt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from gossamer.claim import Claim
from gossamer.dynamic.attention.block_topk import BlockTopK
from gossamer.dynamic.attention.plug import Watch
from gossamer.dynamic.attention.policy import LONG, POLICIES, Policy, causal, check_counts, for_heads, numbers
from gossamer.dynamic.attention.sink_window import SinkWindow
from gossamer.engine import Look
from gossamer.errors import MethodError
from gossamer.kernels import BLOCK, block_attention

LAST = 64  # queries that stand for all


@dataclass(frozen=True)
class VerticalSlash(Policy):
    """Columns of keys that all queries look at, and diagonals at a distance from them: those that the last 64
    queries give the most weight, ``vertical`` blocks of columns and ``slash`` block diagonals. The first
    columns and the nearest diagonals are always among them, as in the authors' code (there 30 of each).

    The paper's kernel takes single columns, which here cost a block each, and sums each diagonal by itself,
    here 64 neighbouring ones. It estimates once for a whole prompt; whoever gives a prompt in chunks, as the
    native decoder does (512 rows), gets an estimate by the last queries of each.
    """

    vertical: int = 8
    slash: int = 8
    name = "vertical_slash"

    def __post_init__(self) -> None:
        check_counts(self, vertical=0, slash=0)

    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor:
        rows, positions = queries.shape[1], keys.shape[1]
        heads, last = len(queries), min(LAST, rows)
        scores = queries[:, -last:].float() @ for_heads(keys, heads).float().mT * scaling
        row = torch.arange(positions - last, positions)[:, None]
        position = torch.arange(positions)[None]
        weights = scores.masked_fill(position > row, -torch.inf).softmax(-1)
        of_queries, column = numbers(rows, positions)
        count = column.shape[1]
        of_column = weights.new_zeros((heads, count)).index_add_(1, position[0] // BLOCK, weights.sum(1))
        distance = ((row - position).clamp(min=0) // BLOCK).reshape(-1)
        of_distance = weights.new_zeros((heads, count)).index_add_(1, distance, weights.reshape(heads, -1))
        of_column[:, 0] = of_distance[:, 0] = torch.inf
        vertical = _among_largest(of_column, self.vertical)
        slash = _among_largest(of_distance, self.slash)
        away = (of_queries - column).clamp(min=0)
        # a diagonal at a distance crosses two blocks of keys for each block of queries
        crossed = slash[:, away] | slash[:, (away - 1).clamp(min=0)]
        return vertical[:, None] | (crossed & (column <= of_queries))

    def look(self, layer: int, head: int) -> Look:
        return Look("across", vertical=self.vertical, slash=self.slash)


@POLICIES.register("minference", cite="Jiang et al. 2024, MInference 1.0: Accelerating Pre-filling")
@dataclass(frozen=True)
class MInference(Policy):
    """The pattern of each ``(layer, head)`` in ``heads``, as `search` found them, and ``other`` elsewhere;
    for prompts alone: a query that comes by itself looks at everything."""

    needs = ("a window of text",)
    claim = Claim(
        says="Patterns found once for each head read long prompts up to ten times as fast and "
        "maintain accuracy.",
        experiment=LONG,
        metric="perplexity",
        than="dense",
        factor=1.02,
    )

    heads: Mapping[tuple[int, int], Policy] = field(default_factory=dict)
    other: Policy = field(default_factory=VerticalSlash)

    @classmethod
    def calibrated(cls, model: Any, windows: Tensor, **settings: Any) -> MInference:
        """`searched` on the first window with ``budget`` blocks for each block of queries."""
        return searched(model, windows[0], **settings)

    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor | None:
        if queries.shape[1] == 1:
            return None
        found: dict[Policy, Tensor] = {}
        of_heads = [self.heads.get((layer, head), self.other) for head in range(len(queries))]
        for policy in of_heads:
            if policy not in found:  # once, of all heads: a pattern may go by the number of a head
                blocks = policy.blocks(queries, keys, scaling=scaling, layer=layer)
                if blocks is None:
                    raise MethodError("a pattern of minference names its blocks")
                found[policy] = blocks
        return torch.stack([found[policy][head] for head, policy in enumerate(of_heads)])

    def look(self, layer: int, head: int) -> Look:
        return replace(self.heads.get((layer, head), self.other).look(layer, head), steps=False)


def candidates(budget: int) -> list[Policy]:
    """Patterns that look at about ``budget`` blocks a query block: A-shape, vertical-slash in several splits,
    and block-sparse."""
    if budget < 4:
        raise MethodError(f"minference takes a budget of at least 4 blocks, not {budget}")
    splits = [(budget // 4, 3 * budget // 8), (budget // 2, budget // 4), (3 * budget // 4, budget // 8)]
    return [
        SinkWindow(BLOCK, (budget - 2) * BLOCK),
        *(VerticalSlash(vertical, max(1, slash)) for vertical, slash in splits),
        BlockTopK(budget),
    ]


def search(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    layer: int,
    budget: int,
    window: int = 0,
) -> dict[tuple[int, int], Policy]:
    """For each head of a layer the candidate whose outputs are the nearest to dense attention's, on one
    prompt (shapes and ``window`` of `block_attention`)."""
    rows, positions = queries.shape[1], keys.shape[1]
    dense = block_attention(queries, keys, values, scaling=scaling, window=window).float()
    policies, errors = candidates(budget), []
    for policy in policies:
        blocks = policy.blocks(queries, keys, scaling=scaling, layer=layer)
        assert blocks is not None
        chosen = causal(blocks, rows, positions)
        got = block_attention(queries, keys, values, scaling=scaling, blocks=chosen, window=window).float()
        errors.append((got - dense).square().sum((0, 2)))
    best = torch.stack(errors).argmin(0)
    return {(layer, head): policies[int(best[head])] for head in range(len(queries))}


class _Search(Watch):
    """Keeps what `search` finds in every layer."""

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.heads: dict[tuple[int, int], Policy] = {}

    def see(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int, layer: int
    ) -> None:
        self.heads |= search(
            queries, keys, values, scaling=scaling, window=window, layer=layer, budget=self.budget
        )


@torch.no_grad()
def searched(model: Any, ids: Tensor, budget: int) -> MInference:
    """The policy for a transformers ``model``: the patterns that serve its heads best on one text, ``ids``
    int64 ``(n,)``, with about ``budget`` blocks for each block of queries."""
    searching = _Search(budget)
    searching.read(model, ids[None])
    return MInference(searching.heads, candidates(budget)[2])


def _among_largest(scores: Tensor, count: int) -> Tensor:
    best = scores.topk(min(count, scores.shape[-1]), dim=-1).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)
