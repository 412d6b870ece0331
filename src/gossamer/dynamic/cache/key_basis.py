"""A basis for keys before rotation, found on other text: what the native decoder keeps them in (ShadowKV).

Sun et al. 2024 find the basis of each prompt anew, as `low_rank_keys` does. One found once, on another text,
loses hardly more (docs/figures.md, "Caches"), costs nothing while a prompt is read, and leaves what a token
is kept as to its position alone, whatever comes after it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.claim import Unclaimed
from gossamer.dynamic.attention.plug import Watch
from gossamer.dynamic.cache.method import head_dim, kv_heads
from gossamer.dynamic.cache.parts import split
from gossamer.dynamic.cache.rotation import Rotation
from gossamer.errors import MethodError

UNCLAIMED = Unclaimed(
    name="ShadowKV with a basis found beforehand",
    cite="Sun et al. 2024, ShadowKV: KV Cache in Shadows",
    figures="Caches",
    why="It is the native decoder's form of `low_rank_keys`, whose claim runs in transformers.",
)


class _Grams(Watch):
    """Sums, layer by layer, the products of keys before rotation."""

    def __init__(self, rotations: list[Rotation]) -> None:
        super().__init__()
        self.rotations = rotations
        self.grams: dict[int, Tensor] = {}

    def see(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int, layer: int
    ) -> None:
        plain = self.rotations[layer].undo(keys.float(), torch.arange(keys.shape[1]))
        rows = plain.transpose(0, 1).flatten(1)  # (n, kv_heads x dim)
        self.grams[layer] = self.grams.get(layer, 0) + (rows.mT @ rows).double()


@torch.no_grad()
def key_basis(model: Any, windows: Tensor, rank: int) -> Tensor:
    """Orthonormal vectors that keep most of all heads' keys together, float32 ``(layers, rank, kv_heads,
    head_dim)``, the first one most: the leading right singular vectors of the keys before rotation in the
    calibration ``windows``, int64 ``(windows, n)``. For `gossamer.engine.PackedCache`.

    Raises MethodError for a rank of more numbers than a token's keys have, and for models whose keys rotate
    otherwise (`Rotation.of`).
    """
    layers = model.config.num_hidden_layers
    sums = _Grams([Rotation.of(model, number) for number in range(layers)])
    heads = kv_heads(model)
    most = heads * head_dim(model)
    if not 1 <= rank <= most:
        raise MethodError(f"the keys of a token are {most} numbers: no rank of {rank}")
    sums.read(model, windows)
    if len(sums.grams) != layers:
        raise MethodError("this model's layers do not go through the attention interface")
    found = []
    for number in range(layers):
        if not bool(sums.grams[number].isfinite().all()):
            raise MethodError(f"the keys of layer {number} are not finite on the calibration text")
        vectors = torch.linalg.eigh(sums.grams[number]).eigenvectors[:, -rank:].flip(-1)
        found.append(split(vectors.mT.float(), 1, heads, -1))
    return torch.stack(found)
