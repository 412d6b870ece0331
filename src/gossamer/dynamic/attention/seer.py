"""SeerAttention: a small gate, learned from the dense attention map, says which blocks are looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.claim import Unclaimed
from gossamer.dynamic.attention.plug import Watch
from gossamer.dynamic.attention.policy import Policy, block_means, check_counts, for_heads, largest
from gossamer.engine import Look
from gossamer.errors import MethodError
from gossamer.kernels import BLOCK
from gossamer.kernels.attention import visible

STEPS, RATE = 150, 3e-3  # of Adam, for all layers alike
PULL = 1e-2  # towards the identity: a text of calibration has few blocks
UNCLAIMED = Unclaimed(
    name="SeerAttention",
    cite="Gao et al. 2024, SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs",
    figures="Sparse attention on a long prompt",
    why="Its gates are trained on text first, which no setting of an experiment does.",
)


@dataclass(frozen=True, eq=False)
class Seer(Policy):
    """The ``count`` blocks of the largest gate, the first block and the query's own among them. ``gates``,
    float32 ``(layers, heads, dim, dim)``: the score of a block of keys is ``mean(q) gate mean(k)``.

    Gao et al. 2024, SeerAttention: Learning Intrinsic Sparse Attention in Your LLMs: pooled queries and keys
    go through a learned linear map each, whose product is taken. Here both maps of a head are one matrix, as
    they only ever meet as their product, so that it can begin as the identity, which is block top-k; queries
    and keys are pooled by their mean after the rotary embedding. The paper's gate pools keys by mean, largest
    and smallest, before the rotation, and rotates what is pooled.
    """

    gates: Tensor
    count: int = 16
    name = "seer"

    def __post_init__(self) -> None:
        check_counts(self, count=1)
        if self.gates.ndim != 4 or self.gates.shape[2] != self.gates.shape[3]:
            raise MethodError(f"seer takes gates (layers, heads, dim, dim), not {tuple(self.gates.shape)}")

    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor:
        rows, positions = queries.shape[1], keys.shape[1]
        gates = self._gates_of(layer, len(queries))
        heads, dim = gates.shape[:2]
        if (heads, dim) != (len(queries), queries.shape[2]):
            raise MethodError(
                f"seer has gates of {heads} heads of {dim} numbers, and the model has {len(queries)} of "
                f"{queries.shape[2]}"
            )
        asked = block_means(queries, positions - rows) @ gates
        scores = asked @ for_heads(block_means(keys, 0), len(queries)).mT
        own = torch.arange(scores.shape[2] - scores.shape[1], scores.shape[2])
        scores[:, torch.arange(len(own)), own] = torch.inf
        if self.count > 1:
            scores[:, :, 0] = torch.inf
        return largest(scores, self.count, rows, positions)

    def look(self, layer: int, head: int) -> Look:
        return Look("pooled", count=self.count, gate=self._gates_of(layer, head + 1)[head])

    def _gates_of(self, layer: int, heads: int) -> Tensor:
        if layer >= len(self.gates) or heads > self.gates.shape[1]:
            raise MethodError(
                f"seer has gates of {tuple(self.gates.shape[:2])} layers and heads, not of more"
            )
        return self.gates[layer]


@dataclass(frozen=True)
class Sample:
    """Of one window in one layer: mean ``queries`` and ``keys`` of blocks, ``(heads, blocks, dim)``, and the
    dense map's ``target``, ``(heads, query blocks, key blocks)``, whose rows add up to 1."""

    queries: Tensor
    keys: Tensor
    target: Tensor


def sample(queries: Tensor, keys: Tensor, scaling: float, window: int = 0) -> Sample:
    """``queries (heads, n, dim)`` and ``keys (kv_heads, n, dim)`` of one text: the target is the largest
    weight of each block, rows divided by their sums. ``window`` as in `block_attention`."""
    heads, rows, _ = queries.shape
    unseen = ~visible(rows, rows, window=window)[0]
    short = -rows % BLOCK
    lasting = for_heads(keys, heads)
    found = []
    for head in range(heads):  # one map at a time
        scores = (queries[head].float() @ lasting[head].float().T * scaling).masked_fill(unseen, -torch.inf)
        weights = torch.nn.functional.pad(scores.softmax(-1), (0, short, 0, short))
        found.append(torch.nn.functional.max_pool2d(weights[None], BLOCK)[0])
    target = torch.stack(found)
    means = block_means(queries, 0), block_means(lasting, 0)
    return Sample(*means, target / target.sum(-1, keepdim=True))


def fit(
    samples: list[Sample], scaling: float, steps: int = STEPS, rate: float = RATE, pull: float = PULL
) -> Tensor:
    """Gates of one layer, float32 ``(heads, dim, dim)``, by the `loss` on windows of one length, from the
    identity on, and ``pull`` times the squared distance of each head's from it."""
    heads, _, dim = samples[0].queries.shape
    away = torch.zeros(heads, dim, dim, requires_grad=True)
    every = Sample(
        *(torch.stack([getattr(one, name) for one in samples]) for name in ("queries", "keys", "target"))
    )
    adam = torch.optim.Adam([away], lr=rate)
    with torch.enable_grad():
        for _ in range(steps):
            adam.zero_grad()
            mean = loss(torch.eye(dim) + away, every, scaling)
            (mean + pull * away.square().sum() / heads).backward()  # type: ignore[no-untyped-call]
            adam.step()
    return torch.eye(dim) + away.detach()


def loss(gates: Tensor, one: Sample, scaling: float) -> Tensor:
    """KL divergence of the gate's softmax over blocks to the target, nats a row, where blocks that are always
    looked at (the first, a row's own) or never (later ones) are left out of both."""
    scores = one.queries @ gates @ one.keys.mT * scaling
    settled = torch.ones(scores.shape[-2:], dtype=torch.bool).triu()
    settled[:, 0] = True
    target = one.target.masked_fill(settled, 0)[..., 2:, :]  # rows 0 and 1 have nothing to choose from
    if not target.numel():
        return scores.sum() * 0
    target = target / target.sum(-1, keepdim=True).clamp(min=1e-30)
    logs = scores.masked_fill(settled, -1e30)[..., 2:, :].log_softmax(-1)
    return (target * (target.clamp(min=1e-30).log() - logs)).sum(-1).mean()


class _Gather(Watch):
    """Keeps a `Sample` of every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: dict[int, list[Sample]] = {}
        self.scaling: dict[int, float] = {}

    def see(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int, layer: int
    ) -> None:
        self.samples.setdefault(layer, []).append(sample(queries, keys, scaling, window))
        self.scaling[layer] = scaling


@torch.no_grad()
def learned(model: Any, windows: Tensor, count: int = 16, steps: int = STEPS) -> Seer:
    """The policy for a transformers ``model``, whose gates are learned on texts, int64 ``(windows, n)``; the
    model itself stays as it is."""
    gather = _Gather()
    gather.read(model, windows)
    layers = range(len(gather.samples))
    return Seer(torch.stack([fit(gather.samples[i], gather.scaling[i], steps) for i in layers]), count)
