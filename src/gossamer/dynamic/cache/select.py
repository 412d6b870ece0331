"""Caches of which each query reads a choice: the attention that asks the layer, within `reading`."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from gossamer.dynamic.attention.plug import Attend, attention
from gossamer.dynamic.cache.method import KeptCache, KeptLayer
from gossamer.dynamic.cache.parts import split
from gossamer.errors import MethodError
from gossamer.models.attention import decode_attention

MOST_ROWS = 64  # rows that choose each for itself; more are a prompt, which looks at everything


class SelectiveLayer(KeptLayer):
    """A layer that queries read by choice while ``choosing``."""

    def __init__(self) -> None:
        super().__init__()
        self.choosing = False

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keep(keys, values)
        if self.choosing and keys.shape[2] <= MOST_ROWS:
            return keys, values  # the attention asks for what it reads
        return self.everything()

    @abstractmethod
    def keep(self, keys: Tensor, values: Tensor) -> None:
        """Take in new positions."""

    @abstractmethod
    def everything(self) -> tuple[Tensor, Tensor]:
        """Keys and values ``(batch, kv_heads, length, dim)``."""

    @abstractmethod
    def choose(self, query: Tensor, scaling: float) -> Tensor | None:
        """The positions that each row of ``query (batch, kv_heads, group, rows, dim)`` reads, the rows being
        the last positions: int64 ``(batch, kv_heads, rows, count)``, none twice, later ones ignored; None:
        all."""

    def gather(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the positions ``chosen (batch, kv_heads, count)``."""
        keys, values = self.everything()
        index = chosen[..., None].expand(-1, -1, -1, keys.shape[3])
        return keys.gather(2, index), values.gather(2, index)


class Choose(Attend):
    """Attention to what the layers of ``cache`` choose; a prompt looks at everything.

    ``looked``: of the positions that dense decoding reads, the share that was read so far.
    """

    def __init__(self, cache: KeptCache) -> None:
        super().__init__(None)
        self.cache = cache

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
        layer = self.cache.layers[int(getattr(module, "layer_idx", 0) or 0)]
        if isinstance(layer, SelectiveLayer):
            if attention_mask is not None and bool((attention_mask < 0).any()):
                raise MethodError("a cache that is read by choice knows no padding: give texts of one length")
            if query.shape[2] <= MOST_ROWS and layer.length > query.shape[2]:
                self.refuse(module, query, attention_mask, dropout, others)
                scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
                return self._chosen(layer, query, scaling), None
        return super().__call__(
            module, query, key, value, attention_mask, scaling, dropout, sliding_window, **others
        )

    def _chosen(self, layer: SelectiveLayer, query: Tensor, scaling: float) -> Tensor:
        rows, length = query.shape[2], layer.length
        kv_heads = layer.kv_heads
        chosen = layer.choose(split(query, 1, kv_heads, -1), scaling)
        self._there += length
        self._looked += length if chosen is None else min(length, chosen.shape[3])
        if rows == 1:
            keys, values = layer.everything() if chosen is None else layer.gather(chosen[:, :, 0])
            return decode_attention(query, keys, values, scaling)
        keys, values = layer.everything()
        row = torch.arange(length - rows, length)[:, None]
        seen = (torch.arange(length) <= row).expand(len(query), kv_heads, -1, -1)
        if chosen is not None:
            seen = torch.zeros_like(seen).scatter_(3, chosen, True) & seen
        mask = seen.repeat_interleave(query.shape[1] // kv_heads, 1)
        read = scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
        )
        return read.transpose(1, 2)


@contextmanager
def reading(model: Any, cache: KeptCache) -> Iterator[Choose]:
    """Within it the transformers ``model`` reads of ``cache`` what its layers choose, with
    ``past_key_values=cache``; without it a cache gives everything.

    Up to `MOST_ROWS` tokens at once choose each for itself; more are a prompt, which attends densely. Texts
    of a batch are of one length. Raises MethodError for padding, and for a model whose attention cannot be
    replaced.
    """
    layers = [layer for layer in cache.layers if isinstance(layer, SelectiveLayer)]
    with attention(model, Choose(cache)) as attend:
        assert isinstance(attend, Choose)
        for layer in layers:
            layer.choosing = True
        try:
            yield attend
        finally:
            for layer in layers:
                layer.choosing = False
