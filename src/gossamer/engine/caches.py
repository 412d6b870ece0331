"""What the native decoder can keep keys and values in: plain numbers, or blocks of few bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from gossamer.errors import ModelError
from gossamer.kernels import BLOCK
from gossamer.kernels.native import native

CACHES = (torch.float32, torch.bfloat16, torch.int8)  # in the order of csrc/attention.h
CacheName = Literal["float32", "bfloat16", "int8", "kivi4", "gear4", "kivi2", "gear2"]
MOST_RANK, MOST_OUTLIERS = 4, 16  # csrc/compression.h


@dataclass(frozen=True)
class PackedCache:
    """Blocks of 64 positions in ``bits``: keys by channel and values by position (KIVI), in low rank what the
    codes miss, outliers as they are (GEAR).

    ``bits``: 2 or 4; ``rank``: of a head's keys, or values, in a block: 0 to 4; ``outliers``: the share of
    numbers that are kept as they are, half of them the largest and half the least of a channel of keys, or of
    a head's values at a position. A token sees the block that it lies in and the one before it in bfloat16.
    It is `dynamic.cache.gear.Gear` with ``recent=64``, to which the tokens come by no more than a block, but
    for outliers of values: there a position's values of all heads are one vector.
    """

    bits: int = 4
    rank: int = 0
    outliers: float = 0.0

    def counts(self, length: int) -> tuple[int, int]:
        """Outliers of a vector of ``length`` numbers: of the largest, and of the least."""
        count = int(self.outliers * length + 0.5)
        return count - count // 2, count // 2

    def new(self, layers: int, kv_heads: int, head_dim: int) -> Any:
        """An empty native cache. Raises ModelError where heads of so many numbers cannot be kept so."""
        if self.bits not in (2, 4):
            raise ModelError(f"a packed cache takes 2 or 4 bits, not {self.bits}")
        if not 0 <= self.rank <= min(MOST_RANK, head_dim):
            most = min(MOST_RANK, head_dim)
            raise ModelError(f"a packed cache of this model takes a rank of 0 to {most}, not {self.rank}")
        if not 0 <= self.outliers <= 1 or sum(self.counts(max(BLOCK, head_dim))) > MOST_OUTLIERS:
            raise ModelError(
                f"a packed cache keeps at most {MOST_OUTLIERS} outliers of {max(BLOCK, head_dim)} numbers; a "
                f"share of {self.outliers:g} is more, or none at all"
            )
        # where the power iteration of `dynamic.cache.gear` starts
        start = torch.randn((head_dim, self.rank), generator=torch.Generator().manual_seed(0))
        how = [self.bits, self.rank, *self.counts(BLOCK), *self.counts(head_dim)]
        return native().Cache(layers, kv_heads, head_dim, len(CACHES), how, start.T.flatten().tolist())


PACKED = {
    "kivi4": PackedCache(4),
    "gear4": PackedCache(4, rank=2, outliers=0.03),
    "kivi2": PackedCache(2),
    "gear2": PackedCache(2, rank=2, outliers=0.03),
}
CacheKind = torch.dtype | PackedCache | str


def new_cache(kind: CacheKind, layers: int, kv_heads: int, head_dim: int) -> Any:
    """An empty native cache of one of the `CACHES`, of a `PackedCache`, or of the name of one. Raises
    ModelError for others."""
    plain = [str(dtype).removeprefix("torch.") for dtype in CACHES]
    if isinstance(kind, str):
        kind = CACHES[plain.index(kind)] if kind in plain else PACKED.get(kind, kind)
    if isinstance(kind, PackedCache):
        return kind.new(layers, kv_heads, head_dim)
    if kind not in CACHES:
        asked = str(kind).removeprefix("torch.")
        raise ModelError(f"unknown cache {asked!r}; there are: {', '.join([*plain, *PACKED])}")
    return native().Cache(layers, kv_heads, head_dim, CACHES.index(kind))
