"""The rotary embedding of a model's keys, there and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.engine.decoder import FAMILIES, ROTATIONS
from gossamer.errors import MethodError


@dataclass(frozen=True)
class Rotation:
    """Halves of a head rotate against each other: ``x cos + half(x) sin``, both times ``scaling``."""

    frequencies: Tensor | None  # (dim / 2,); None: this layer does not rotate
    scaling: float

    @classmethod
    def of(cls, model: Any, number: int) -> Rotation:
        """That of layer ``number``; raises MethodError for models whose keys rotate otherwise."""
        family = getattr(model.config, "model_type", None)
        if family not in FAMILIES:
            raise MethodError(
                f"keys before rotation are known for {', '.join(FAMILIES)}, not for the family {family!r}"
            )
        rotary, attention = model.model.rotary_emb, model.model.layers[number].self_attn
        kind = getattr(rotary, "rope_type", "default")
        if kind not in ROTATIONS or 2 * rotary.inv_freq.numel() != attention.head_dim:
            raise MethodError(f"rotary embeddings of the kind {kind!r} cannot be undone here")
        frequencies = rotary.inv_freq.float() if getattr(attention, "use_rope", True) else None
        return cls(frequencies, float(rotary.attention_scaling))

    def apply(self, x: Tensor, positions: Tensor) -> Tensor:
        """``x (batch, heads, n, dim)`` at ``positions``, that broadcast to ``(batch, heads, n)``."""
        if self.frequencies is None:
            return x
        return self._turned(x, positions, 1) * self.scaling

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.frequencies is None:
            return x
        return self._turned(x, positions, -1) / self.scaling

    def _turned(self, x: Tensor, positions: Tensor, way: int) -> Tensor:
        assert self.frequencies is not None
        angles = positions[..., None].float() * self.frequencies
        cos, sin = angles.cos(), angles.sin() * way
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
