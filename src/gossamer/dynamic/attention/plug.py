"""Policies behind transformers' attention interface: ``attn_implementation="gossamer:minference"``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from gossamer.dynamic.attention.policy import POLICIES, Policy, causal
from gossamer.errors import MethodError
from gossamer.kernels import BLOCK, block_attention

_numbers = count(1)


class Attend:
    """A policy as an attention function of transformers; ``policy`` None: dense attention in the same kernel.

    ``looked``: of the blocks that dense attention looks at, the share that was looked at so far.
    """

    def __init__(self, policy: Policy | None) -> None:
        self.policy = policy
        self._looked = self._there = 0

    @property
    def looked(self) -> float:
        return self._looked / self._there if self._there else 1.0

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """``query (batch, heads, rows, dim)``, ``key`` and ``value (batch, kv_heads, positions, dim)``; gives
        ``(batch, rows, heads, dim)``. ``attention_mask``: `key_positions`, with padding at either end."""
        self.refuse(query, dropout, others)
        rows, positions = query.shape[2], key.shape[2]
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        outputs = query.new_zeros((len(query), rows, query.shape[1], query.shape[3]))
        for i in range(len(query)):
            begin, end, start = (0, positions, 0) if attention_mask is None else _filled(attention_mask[i])
            first = max(0, begin - (positions - rows))  # rows before are padding
            last = rows - (positions - end)
            if first >= last:
                continue
            q, k, v = query[i, :, first:last], key[i, :, begin:end], value[i, :, begin:end]
            layer = int(getattr(module, "layer_idx", 0) or 0)
            outputs[i, first:last] = self.one(
                q, k, v, scaling=scaling, window=sliding_window or 0, layer=layer, start=start
            )
        return outputs, None

    @staticmethod
    def refuse(query: Tensor, dropout: float, others: dict[str, Any]) -> None:
        """Raises MethodError for what no attention of this kind can do."""
        if dropout:
            raise MethodError("sparse attention has no dropout: put the model into eval mode")
        unknown = sorted(
            name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None
        )
        if unknown:
            raise MethodError(f"sparse attention cannot do what this model asks for: {', '.join(unknown)}")
        if torch.is_grad_enabled() and query.requires_grad:
            raise MethodError("sparse attention has no gradient: run the model under torch.no_grad()")

    def one(
        self,
        queries: Tensor,
        keys: Tensor,
        values: Tensor,
        *,
        scaling: float,
        window: int,
        layer: int,
        start: int = 0,
    ) -> Tensor:
        """One text without padding; shapes of `block_attention`. ``start``: the position of the first key,
        where a cache has forgotten those before it, which lie outside the window of every query."""
        blocks = None
        if not start:
            blocks = self._blocks(queries, keys, scaling, layer)
        elif window and self.policy is not None and self.policy.static:
            # it asks for the number of keys alone
            every = keys[:, :1].expand(-1, start + keys.shape[1], -1)
            blocks = self._blocks(queries, every, scaling, layer)
        if start and blocks is not None:
            # blocks begin at multiples of BLOCK positions; the keys put before are outside the window
            blocks = blocks[:, :, start // BLOCK :]
            keys, values = (torch.cat([x[:, :1].expand(-1, start % BLOCK, -1), x], 1) for x in (keys, values))
        return block_attention(queries, keys, values, scaling=scaling, blocks=blocks, window=window)

    def _blocks(self, queries: Tensor, keys: Tensor, scaling: float, layer: int) -> Tensor | None:
        if self.policy is None:
            return None
        blocks = self.policy.blocks(queries, keys, scaling=scaling, layer=layer)
        if blocks is None:
            return None
        rows, positions = queries.shape[1], keys.shape[1]
        blocks = causal(blocks, rows, positions)
        self._looked += int(blocks.sum())
        self._there += len(blocks) * int(causal(torch.ones_like(blocks[0]), rows, positions).sum())
        return blocks


class Watch(Attend):
    """Dense attention that shows queries, keys and values of every layer on its way, for calibration."""

    def __init__(self) -> None:
        super().__init__(None)

    def see(self, queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, layer: int) -> None:
        """One text in one layer; shapes of `block_attention`."""
        raise NotImplementedError

    def one(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, layer: int, **others: Any
    ) -> Tensor:
        self.see(queries, keys, values, scaling=scaling, layer=layer)
        return super().one(queries, keys, values, scaling=scaling, layer=layer, **others)

    def read(self, model: Any, windows: Tensor) -> None:
        """Runs the transformers ``model`` over ``windows``, int64 ``(windows, n)``."""
        with torch.no_grad(), attention(model, self):
            for ids in windows:
                model(ids[None], use_cache=False, logits_to_keep=1)


@contextmanager
def attention(model: Any, policy: Policy | Attend | str | None) -> Iterator[Attend]:
    """Within it the transformers ``model`` attends by ``policy`` (or one of `POLICIES` by name).

    Raises MethodError for a model whose attention cannot be replaced.
    """
    attend = policy if isinstance(policy, Attend) else Attend(_policy(policy))
    name = f"gossamer:{next(_numbers)}"
    before = model.config._attn_implementation
    register(name, attend)
    try:
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            raise MethodError(f"the attention of a {type(model).__name__} cannot be replaced")
        yield attend
    finally:
        model.set_attn_implementation(before)
        for table in (AttentionInterface, AttentionMaskInterface):
            table._global_mapping.pop(name, None)


def attach(model: Any, policy: Policy) -> Attend:
    """The transformers ``model`` attends by ``policy`` from now on. Raises MethodError as `attention`."""
    attend = Attend(policy)
    name = f"gossamer:{next(_numbers)}"
    register(name, attend)
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise MethodError(f"the attention of a {type(model).__name__} cannot be replaced")
    return attend


def _policy(policy: Policy | str | None) -> Policy | None:
    return POLICIES[policy]() if isinstance(policy, str) else policy


def register(name: str, attend: Attend) -> None:
    """Makes ``attend`` known to transformers as ``attn_implementation=name``."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, key_positions)


def register_all() -> None:
    """Every policy with its defaults as ``gossamer:NAME``, and dense attention as ``gossamer:dense``."""
    register("gossamer:dense", Attend(None))
    for name in POLICIES:
        register(f"gossamer:{name}", Attend(POLICIES[name]()))


def key_positions(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Tensor | None:
    """What transformers hands to attention as its mask: the position in its text of every key, int64
    ``(batch, positions)``, -1 for padding; None where they are 0, 1, ...

    ``kv_offset``: keys that a cache has forgotten; ``attention_mask``: bool, of these and all others.
    """
    if attention_mask is None:
        if not kv_offset:
            return None
        return torch.arange(kv_offset, kv_offset + kv_length).expand(batch_size, -1)
    seen = attention_mask.bool()
    positions = (seen.cumsum(1) - 1).masked_fill(~seen, -1)[:, -kv_length:]
    if not kv_offset and positions.shape[1] == kv_length and bool(seen.all()):
        return None
    return positions


def _filled(positions: Tensor) -> tuple[int, int, int]:
    """Where the keys of a text that are no padding begin and end, and the position of the first."""
    places = (positions >= 0).nonzero().flatten()
    if not len(places):
        return 0, 0, 0
    begin, end = int(places[0]), int(places[-1]) + 1
    if end - begin != len(places):
        raise MethodError("sparse attention takes padding before and behind a text, not within it")
    return begin, end, int(positions[begin])
