"""What the native decoder's attention looks at, as plain data: one `Look` for each head of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ModelError
from gossamer.kernels.native import native

KINDS = ("all", "static", "pooled", "across", "tree", "labels")  # in the order of csrc/policy.h


@dataclass(frozen=True)
class Look:
    """Which blocks of 64 positions the rows of a block look at; their own one always. Numbers are of blocks.

    ``kind``: ``all``; ``static``: the first ``sink``, ``window`` before their own, and each block b with
    ``(b + offset) % stride == 0``; ``pooled``: the ``count`` ones whose mean key meets the rows' mean query
    best, their own and the first among them; ``across``: the ``vertical`` ones and ``slash`` distances to
    which the last 64 rows of the call give the most weight; ``tree``: ``count`` found by halving ranges of
    the past, and ``sink`` and ``window``; ``labels``: the ``count`` that hold the positions which the
    channels ``labels`` of keys rate highest, and ``sink`` and ``window``, for tokens that come one by one
    (all others look at everything). ``steps``: whether that goes for tokens that come one by one, too.
    ``gate``, float32 ``(dim, dim)``, of ``pooled``: the mean query is multiplied by it before it meets keys.
    """

    kind: str = "all"
    steps: bool = True
    sink: int = 0
    window: int = 0
    stride: int = 0
    offset: int = 0
    count: int = 0
    vertical: int = 0
    slash: int = 0
    labels: tuple[int, ...] = ()  # as many for each head, an even number, the same for heads that share keys
    gate: Tensor | None = field(default=None, repr=False, compare=False)

    def numbers(self, gate: int) -> list[int]:
        """As csrc/policy.h has them; ``gate``: its number. Raises ModelError for a kind that there is not."""
        if self.kind not in KINDS:
            raise ModelError(f"unknown kind of attention {self.kind!r}; there are: {', '.join(KINDS)}")
        counts = [self.sink, self.window, self.stride, self.offset, self.count, self.vertical, self.slash]
        return [KINDS.index(self.kind), int(self.steps), *counts, gate]


Looks = Sequence[Sequence[Look]]  # [layer][head]


def new_policy(looks: Looks, layers: int, heads: int, kv_heads: int, dim: int) -> Any:
    """The native policy of one sequence. Raises ModelError where ``looks`` are not those of such a model."""
    if len(looks) != layers or any(len(of_layer) != heads for of_layer in looks):
        raise ModelError(f"the attention policy is not one of {layers} layers with {heads} heads")
    gates: list[Tensor] = []
    rows = []
    for look in (look for of_layer in looks for look in of_layer):
        if look.gate is not None:
            if tuple(look.gate.shape) != (dim, dim):
                shape = tuple(look.gate.shape)
                raise ModelError(f"a gate of the attention policy is {shape}, not {dim} x {dim}")
            gates.append(look.gate.float())
        rows.append(look.numbers(0 if look.gate is None else len(gates)))
    stacked = torch.stack(gates).contiguous() if gates else torch.empty(0)  # copied over there
    labels = _labels(looks, heads, heads // kv_heads)
    gated = (stacked.data_ptr(), len(gates), dim) if gates else (0, 0, 0)
    policy = native().Policy(layers, heads, rows, kv_heads, labels, *gated)
    fault = policy.check()
    if fault:
        raise ModelError(f"the attention policy is wrong: {fault}")
    return policy


def _labels(looks: Looks, heads: int, group: int) -> list[int]:
    """Channels of each head of keys of each layer, one after the other. Raises ModelError."""
    labels = [of_layer[i].labels for of_layer in looks for i in range(0, heads, group)]
    if len({len(some) for some in labels}) > 1:
        raise ModelError("the attention policy is wrong: heads have different numbers of labels")
    if any(
        of_layer[i].labels != of_layer[i // group * group].labels for of_layer in looks for i in range(heads)
    ):
        raise ModelError("the attention policy is wrong: heads that share keys have different labels")
    return [channel for some in labels for channel in some]
