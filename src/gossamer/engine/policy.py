"""What the native decoder's attention looks at, as plain data: one `Look` for each head of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gossamer.errors import ModelError
from gossamer.kernels.native import native

KINDS = ("all", "static", "pooled", "across", "tree")  # in the order of csrc/policy.h


@dataclass(frozen=True)
class Look:
    """Which blocks of 64 positions the rows of a block look at; their own one always. Numbers are of blocks.

    ``kind``: ``all``; ``static``: the first ``sink``, ``window`` before their own, and each block b with
    ``(b + offset) % stride == 0``; ``pooled``: the ``count`` ones whose mean key meets the rows' mean query
    best, their own and the first among them; ``across``: the ``vertical`` ones and ``slash`` distances to
    which the last 64 rows of the call give the most weight; ``tree``: ``count`` found by halving ranges of
    the past, and ``sink`` and ``window``. ``steps``: whether that goes for tokens that come one by one, too.
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
    gate: Tensor | None = field(default=None, repr=False, compare=False)

    def numbers(self, gate: int) -> list[int]:
        """As csrc/policy.h has them; ``gate``: its number. Raises ModelError for a kind that there is not."""
        if self.kind not in KINDS:
            raise ModelError(f"unknown kind of attention {self.kind!r}; there are: {', '.join(KINDS)}")
        counts = [self.sink, self.window, self.stride, self.offset, self.count, self.vertical, self.slash]
        return [KINDS.index(self.kind), int(self.steps), *counts, gate]


Looks = Sequence[Sequence[Look]]  # [layer][head]


def new_policy(looks: Looks, layers: int, heads: int, dim: int) -> Any:
    """The native policy of one sequence. Raises ModelError where ``looks`` are not those of such a model."""
    if len(looks) != layers or any(len(of_layer) != heads for of_layer in looks):
        raise ModelError(f"the attention policy is not one of {layers} layers with {heads} heads")
    gates: list[Tensor] = []
    numbers = []
    for look in (look for of_layer in looks for look in of_layer):
        if look.gate is not None:
            if tuple(look.gate.shape) != (dim, dim):
                raise ModelError(
                    f"a gate of the attention policy is {tuple(look.gate.shape)}, not {dim} x {dim}"
                )
            gates.append(look.gate.float())
        numbers.append(look.numbers(0 if look.gate is None else len(gates)))
    stacked = torch.stack(gates).contiguous() if gates else torch.empty(0)  # copied over there
    policy = native().Policy(layers, heads, numbers, stacked.data_ptr(), len(gates), dim if gates else 0)
    fault = policy.check()
    if fault:
        raise ModelError(f"the attention policy is wrong: {fault}")
    return policy
