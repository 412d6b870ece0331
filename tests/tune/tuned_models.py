"""What tests of tuning share: a short run on the prose inside Python, and a tiny model with masks."""

from __future__ import annotations

from pydoc_data.topics import topics
from typing import Any

import torch
from torch import nn

from gossamer.sparse import mask_from_scores, parse_pattern
from tiny import tiny_model

TEXT = "".join(topics.values())[:20_000]
RUN: dict[str, Any] = {
    "text": [TEXT],
    "seqlen": 32,
    "batch": 2,
    "held_out": 2,
    "tokens": 4 * 64,
    "rate": 1e-3,
}


def masked(pattern: str = "2:4") -> tuple[Any, dict[str, torch.Tensor | None]]:
    model = tiny_model(num_hidden_layers=2)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    return model, {
        n: mask_from_scores(m.weight.detach().abs(), parse_pattern(pattern)) for n, m in layers.items()
    }
