"""What the native decoder can keep keys and values in: plain numbers, or blocks of few bits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gossamer.errors import CheckpointError, ModelError
from gossamer.kernels import BLOCK
from gossamer.kernels.native import native
from gossamer.matrices.atomic import atomic_file
from gossamer.paths import expanded

CACHES = (torch.float32, torch.bfloat16, torch.int8)  # in the order of csrc/attention.h
MOST_RANK, MOST_OUTLIERS, MOST_KEY_RANK = 4, 16, 1024  # csrc/compression.h


class Shape(NamedTuple):
    """Of the keys of a model, and how each layer rotates them: halves of a head against each other."""

    layers: int
    kv_heads: int
    head_dim: int
    frequencies: Sequence[float]  # head_dim / 2
    scale: float
    rotates: Sequence[bool]  # layers


@dataclass(frozen=True, eq=False)
class PackedCache:
    """Blocks of 64 positions in ``bits``: keys by channel and values by position (KIVI), in low rank what the
    codes miss, outliers as they are (GEAR).

    ``bits``: 2 or 4; ``rank``: of a head's keys, or values, in a block: 0 to 4; ``outliers``: the share of
    numbers that are kept as they are, half of them the largest and half the least of a channel of keys, or of
    a head's values at a position. A token sees the block that it lies in and the one before it in bfloat16.
    It is `dynamic.cache.gear.Gear` with ``recent=64``, to which the tokens come by no more than a block, but
    for outliers of values: there a position's values of all heads are one vector.

    ``keys``, float32 ``(layers, rank, kv_heads, head_dim)``: keys are kept as their products with these
    orthonormal vectors, before rotation and for all heads of a layer together, in bfloat16, instead of by
    codes (ShadowKV; `dynamic.cache.key_basis` finds the vectors). The other settings are of values then.
    """

    bits: int = 4
    rank: int = 0
    outliers: float = 0.0
    keys: Tensor | None = None

    def counts(self, length: int) -> tuple[int, int]:
        """Outliers of a vector of ``length`` numbers: of the largest, and of the least."""
        count = int(self.outliers * length + 0.5)
        return count - count // 2, count // 2

    def new(self, shape: Shape) -> Any:
        """An empty native cache. Raises ModelError where such keys and values cannot be kept so."""
        layers, kv_heads, head_dim = shape[:3]
        if type(self.bits) is not int or self.bits not in (2, 4):
            raise ModelError(f"a packed cache takes 2 or 4 bits, not {self.bits}")
        if type(self.rank) is not int or not 0 <= self.rank <= min(MOST_RANK, head_dim):
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
        low = () if self.keys is None else self._low_rank(self.keys, shape)
        return native().Cache(layers, kv_heads, head_dim, len(CACHES), how, start.T.flatten().tolist(), *low)

    def _low_rank(self, vectors: Tensor, shape: Shape) -> tuple[Any, ...]:
        layers, kv_heads, head_dim, frequencies, scale, rotates = shape
        wanted, got = (layers, kv_heads, head_dim), tuple(vectors.shape)
        if vectors.ndim != 4 or (got[0], *got[2:]) != wanted:
            raise ModelError(
                f"the vectors of a cache's keys are those of another model: {got}, not {wanted[0]}, a rank, "
                f"{wanted[1]}, {wanted[2]}"
            )
        if not 1 <= got[1] <= min(MOST_KEY_RANK, kv_heads * head_dim):
            raise ModelError(
                f"keys of {kv_heads * head_dim} numbers have no rank of {got[1]}, and none has one past "
                f"{MOST_KEY_RANK}"
            )
        if not bool(vectors.isfinite().all()):
            raise ModelError("the vectors of a cache's keys are not finite")
        numbers = vectors.float().permute(0, 2, 3, 1).contiguous().numpy()
        return got[1], numbers.tobytes(), list(frequencies), scale, list(rotates)

    def save(self, path: str | Path) -> None:
        """Writes it as a file (safetensors), which `load` and ``--cache`` take. Raises OutputError."""
        settings = {"bits": self.bits, "rank": self.rank, "outliers": self.outliers}
        tensors = {} if self.keys is None else {"keys": self.keys.float().contiguous()}
        with atomic_file(Path(path)) as out:
            out.write(save(tensors, {FORMAT: json.dumps(settings)}))

    @classmethod
    def load(cls, path: str | Path) -> PackedCache:
        """What `save` wrote; raises CheckpointError where it is missing or damaged."""
        try:
            with safe_open(str(path), "pt") as file:
                settings = json.loads((file.metadata() or {})[FORMAT])
                keys = file.get_tensor("keys") if "keys" in file.keys() else None  # noqa: SIM118
            numbers = int(settings["bits"]), int(settings["rank"]), float(settings["outliers"])
            return cls(*numbers, keys)
        except OSError as error:
            raise CheckpointError(f"cannot read {Path(path).name}: {error.strerror or error}") from error
        except (ValueError, TypeError, KeyError, SafetensorError) as error:
            reason = f"it does not say {error}" if isinstance(error, KeyError) else error
            raise CheckpointError(f"{Path(path).name} is no file of a cache: {reason}") from error


PACKED = {
    "kivi4": PackedCache(4),
    "gear4": PackedCache(4, rank=2, outliers=0.03),
    "kivi2": PackedCache(2),
    "gear2": PackedCache(2, rank=2, outliers=0.03),
}
CacheKind = torch.dtype | PackedCache | str
FORMAT = "gossamer.cache"


def cache_of(asked: CacheKind | Path) -> torch.dtype | PackedCache:
    """One of the `CACHES`, a `PackedCache`, the name of one, or the file that one was saved as. Raises
    ModelError for others, and CheckpointError for a damaged file."""
    plain = {str(dtype).removeprefix("torch."): dtype for dtype in CACHES}
    if isinstance(asked, PackedCache) or asked in CACHES:
        return asked
    name = str(asked).removeprefix("torch.")
    found = plain.get(name) or PACKED.get(name)
    if found is not None:
        return found
    if not isinstance(asked, torch.dtype) and expanded(asked).is_file():
        return PackedCache.load(expanded(asked))
    raise ModelError(f"unknown cache {name!r}; there are: {', '.join([*plain, *PACKED])}, and files of one")


def new_cache(kind: CacheKind | Path, shape: Shape) -> Any:
    """An empty native cache: see `cache_of`."""
    kind = cache_of(kind)
    if isinstance(kind, PackedCache):
        return kind.new(shape)
    return native().Cache(*shape[:3], CACHES.index(kind))
