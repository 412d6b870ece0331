"""Policies behind transformers' attention interface: ``attn_implementation="gossamer:minference"``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import (
    AttentionMaskInterface,
    TransformGetItemToIndex,
    causal_mask_function,
)

from gossamer.dynamic.attention.policy import POLICIES, Policy, causal, latest, numbers
from gossamer.errors import MethodError
from gossamer.kernels import BLOCK, block_attention

_numbers = count(1)

PAIRS = 1 << 16  # of a query and a key, up to which a mask is looked at as a whole


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
        self.refuse(module, query, attention_mask, dropout, others)
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
            window = sliding_window or 0
            self.see(q, k, v, scaling=scaling, window=window, layer=layer)
            outputs[i, first:last] = self.one(
                q, k, v, scaling=scaling, window=window, layer=layer, start=start
            )
        return outputs, None

    def see(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int, layer: int
    ) -> None:
        """One text in one layer before it is attended to, for those that watch; shapes and ``window`` of
        `block_attention`."""

    @staticmethod
    def refuse(
        module: nn.Module,
        query: Tensor,
        attention_mask: Tensor | None,
        dropout: float,
        others: dict[str, Any],
    ) -> None:
        """Raises MethodError for what no attention of this kind can do."""
        if dropout:
            raise MethodError("sparse attention has no dropout: put the model into eval mode")
        unknown = sorted(
            name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None
        )
        if unknown:
            raise MethodError(f"sparse attention cannot do what this model asks for: {', '.join(unknown)}")
        is_causal = others.get("is_causal")
        if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
            raise MethodError("sparse attention is causal, and this model's is not")
        if attention_mask is not None and attention_mask.ndim != 2:
            raise MethodError("sparse attention takes a mask of (batch, positions), which marks padding")
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
            blocks = self._blocks(queries, keys, scaling, window, layer)
        elif window and self.policy is not None and self.policy.static:
            # it asks for the number of keys alone
            every = keys[:, :1].expand(-1, start + keys.shape[1], -1)
            blocks = self._blocks(queries, every, scaling, window, layer)
        if start and blocks is not None:
            # blocks begin at multiples of BLOCK positions; the keys put before are outside the window
            blocks = blocks[:, :, start // BLOCK :]
            keys, values = (torch.cat([x[:, :1].expand(-1, start % BLOCK, -1), x], 1) for x in (keys, values))
        return block_attention(queries, keys, values, scaling=scaling, blocks=blocks, window=window)

    def _blocks(
        self, queries: Tensor, keys: Tensor, scaling: float, window: int, layer: int
    ) -> Tensor | None:
        if self.policy is None:
            return None
        blocks = self.policy.blocks(queries, keys, scaling=scaling, layer=layer)
        if blocks is None:
            return None
        rows, positions = queries.shape[1], keys.shape[1]
        row, column = numbers(rows, positions)
        there = column <= row
        if window:
            there &= latest(row, column, window)
        blocks = causal(blocks, rows, positions) & there
        self._looked += int(blocks.sum())
        self._there += len(blocks) * int(there.sum())
        return blocks


class Watch(Attend):
    """Dense attention that shows queries, keys and values of every layer on its way (`see`), for
    calibration."""

    def __init__(self) -> None:
        super().__init__(None)

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
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> Tensor | None:
    """What transformers hands to attention as its mask: the position in its text of every key, int64
    ``(batch, positions)``, -1 for padding; None where they are 0, 1, ...

    ``kv_offset``: keys that a cache has forgotten; ``attention_mask``: bool, of these and all others;
    ``local_size``: of a sliding window. Raises MethodError where the queries are not the last positions (a
    cache that has room for more), and where ``mask_function`` hides from a query more than what lies behind
    it or outside the window, or shows it more: packed texts, chunks, prefixes that see themselves whole.
    """
    end = kv_offset + kv_length
    if int(q_offset) + q_length != end:
        raise MethodError("sparse attention takes a cache as long as the text, not one with room for more")
    row = torch.arange(end - q_length, end)[:, None]
    column = _some(row, kv_offset, end, local_size or 0, PAIRS // batch_size)
    column = column.expand(q_length, -1)
    row, column = row.expand_as(column).flatten(), column.flatten()
    seen = column <= row
    if not (
        _is(mask_function, seen, batch_size, row, column)
        or (local_size and _is(mask_function, seen & (column > row - local_size), batch_size, row, column))
    ):
        raise MethodError(
            "sparse attention is causal, with a sliding window or without: it has no form of this model's "
            "mask (packed texts, chunks, or parts that see what follows)"
        )
    if attention_mask is None:
        if not kv_offset:
            return None
        return torch.arange(kv_offset, kv_offset + kv_length).expand(batch_size, -1)
    seen = attention_mask.bool()
    positions = (seen.cumsum(1) - 1).masked_fill(~seen, -1)[:, -kv_length:]
    if not kv_offset and positions.shape[1] == kv_length and bool(seen.all()):
        return None
    return positions


def _some(row: Tensor, begin: int, end: int, window: int, most: int) -> Tensor:
    """Keys in [begin, end) to look at a mask by, for the queries ``row (rows, 1)``: all, where there are at
    ``most`` so many pairs; else those at powers of two from each query, at its window's border and both ends.
    """
    if len(row) * (end - begin) <= most:
        return torch.arange(begin, end)[None]
    powers = [1 << i for i in range((end - begin).bit_length() + 1)]
    away = torch.tensor([0, window - 1, window, *powers, *(-power for power in powers)])
    return (row - away).clamp(begin, end - 1)


def _is(mask_function: Any, seen: Tensor, batch_size: int, row: Tensor, column: Tensor) -> bool:
    """Whether transformers' ``mask_function`` gives ``seen`` for the queries ``row`` and the keys ``column``
    of every text."""
    text = torch.arange(batch_size).repeat_interleave(len(row))
    row, column = row.repeat(batch_size), column.repeat(batch_size)
    with TransformGetItemToIndex():
        got = torch.vmap(mask_function)(text, torch.zeros_like(text), row, column)
    return torch.equal(got, seen.repeat(batch_size))


def _filled(positions: Tensor) -> tuple[int, int, int]:
    """Where the keys of a text that are no padding begin and end, and the position of the first."""
    places = (positions >= 0).nonzero().flatten()
    if not len(places):
        return 0, 0, 0
    begin, end = int(places[0]), int(places[-1]) + 1
    if end - begin != len(places):
        raise MethodError("sparse attention takes padding before and behind a text, not within it")
    return begin, end, int(positions[begin])
