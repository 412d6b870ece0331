"""A model whose later tokens go through a cache: what `evaluate` measures as it measures any other model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_outputs import BaseModelOutput

from gossamer.dynamic.cache.method import CacheMethod
from gossamer.dynamic.cache.select import MOST_ROWS, reading


class Through(nn.Module):
    """The transformers ``model`` with the cache of ``method``: the first ``prefix`` tokens of a window are
    read densely and kept, those behind them read that cache, `MOST_ROWS` at a time, each for itself.

    Raises MethodError where ``method`` does not suit the model.
    """

    def __init__(self, model: Any, method: CacheMethod, prefix: int) -> None:
        super().__init__()
        method.new(model)
        self.config = model.config
        self.base_model = _Body(model, method, prefix)

    def get_output_embeddings(self) -> nn.Module:
        head: nn.Module = self.base_model.model.get_output_embeddings()
        return head

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Tensor:
        """Logits ``(batch, n, vocabulary)`` of token ids ``(batch, n)``."""
        logits: Tensor = self.get_output_embeddings()(self.base_model(input_ids).last_hidden_state)
        return logits


class _Body(nn.Module):
    def __init__(self, model: Any, method: CacheMethod, prefix: int) -> None:
        super().__init__()
        self.model, self.method, self.prefix = model, method, prefix

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> BaseModelOutput:
        body, dense = self.model.base_model, DynamicCache(config=self.model.config)
        first = body(input_ids=input_ids[:, : self.prefix], past_key_values=dense, use_cache=True)
        found, later = [first.last_hidden_state], input_ids[:, self.prefix :]
        if later.shape[1]:
            cache = self.method.new(self.model)
            for number, layer in enumerate(dense.layers):
                cache.update(layer.keys, layer.values, number)
            with reading(self.model, cache):
                for ids in torch.split(later, MOST_ROWS, 1):
                    rows = body(input_ids=ids, past_key_values=cache, use_cache=True)
                    found.append(rows.last_hidden_state)
        return BaseModelOutput(last_hidden_state=torch.cat(found, 1))
