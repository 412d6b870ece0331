"""GEAR: codes of few bits, a low-rank part of what they miss, and the outliers as they are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.claim import Claim
from gossamer.dynamic.cache.method import CACHES, STEPS, CacheMethod, KeptLayer, head_dim
from gossamer.dynamic.cache.parts import split
from gossamer.dynamic.cache.quantize import BITS, GROUP, Quantized, of_keys, of_values
from gossamer.errors import MethodError

LOOPS = 3  # of power iteration


@dataclass(frozen=True)
class Outliers:
    """The largest and the least numbers of each vector, and where in it they are."""

    numbers: Tensor  # (batch, ..., count)
    places: Tensor  # int16 or int32

    def put_back(self, vectors: Tensor) -> Tensor:
        return vectors.scatter(-1, self.places.long(), self.numbers)


@dataclass(frozen=True)
class Compressed:
    """Some positions of the keys, or of the values: outliers, else codes + left rightᵀ."""

    codes: Quantized
    left: Tensor  # (batch, heads, n, rank)
    right: Tensor  # (batch, heads, dim, rank)
    outliers: Outliers
    keys: bool

    def expand(self) -> Tensor:
        """``(batch, heads, n, dim)`` in the dtype that they had."""
        rough = self.codes.expand()
        rough = rough.flatten(2, 3) if self.keys else rough
        x = (rough + self.left.float() @ self.right.float().mT).to(self.outliers.numbers.dtype)
        return unvector(self.outliers.put_back(vector(x, self.keys)), x.shape, self.keys)


@dataclass(frozen=True)
class State:
    blocks: list[tuple[Compressed, Compressed]]  # in order, then:
    keys: Tensor  # recent positions as they are
    values: Tensor


@CACHES.register("gear", cite="Kang et al. 2024, GEAR: An Efficient KV Cache Compression Recipe")
@dataclass(frozen=True)
class Gear(CacheMethod):
    """Keys by channel and values by token in ``bits``, the error in low rank, outliers as they are.

    ``rank``: of the error of a prompt's keys and values, a head (``later_rank``: of each `GROUP` positions
    that are written later); ``outliers``: the share of numbers that are kept as they are, half of them the
    largest and half the least of a channel of keys, or of a token's values; the last ``recent`` positions,
    and up to `GROUP` before them, stay as they are. Rank and outliers 0: KIVI. Any model, batch and padding;
    a step expands the whole cache.
    """

    keeps = "all, in few bits"
    reads = "nothing: all is read"

    claim = Claim(
        says="A low-rank part and outliers beside codes of 2 bits are near lossless where codes alone "
        "(KIVI) are not.",
        experiment=STEPS,
        metric="kl",
        than="kivi",
        factor=0.75,
    )

    bits: int = 4
    rank: int = 4
    outliers: float = 0.02
    recent: int = 64
    later_rank: int = 2

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise MethodError(f"gear takes 2, 4 or 8 bits, not {self.bits}")
        if min(self.rank, self.later_rank, self.recent) < 0 or not 0 <= self.outliers <= 1:
            raise MethodError(
                "gear takes ranks and recent positions >= 0, and a share of outliers from 0 to 1"
            )

    def check(self, model: Any) -> None:
        if head_dim(model) % (8 // self.bits):
            raise MethodError(
                f"gear packs {8 // self.bits} numbers into a byte; heads have {head_dim(model)}"
            )

    def layer(self, model: Any, number: int) -> GearLayer:
        return GearLayer(self)

    def compress(self, x: Tensor, keys: bool, rank: int) -> Compressed:
        """``x (batch, heads, n, dim)``, n a multiple of `GROUP`; GEAR's algorithm 1."""
        rest, outliers = take_out(vector(x, keys), self.outliers)
        plain = unvector(rest, x.shape, keys)
        codes = of_keys(plain, self.bits) if keys else of_values(plain, self.bits)
        rough = codes.expand()
        error = plain.float() - (rough.flatten(2, 3) if keys else rough)
        left, right = low_rank(error, min(rank, *x.shape[2:]))
        return Compressed(codes, left.bfloat16(), right.bfloat16(), outliers, keys)


class GearLayer(KeptLayer):
    """Compressed blocks of positions, and behind them a buffer that is compressed by whole groups."""

    def __init__(self, method: Gear) -> None:
        super().__init__()
        self.method = method

    def empty(self, keys: Tensor) -> State:
        return State([], keys[:, :, :0], keys[:, :, :0])

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        state, method = self.state, self.method
        recent = torch.cat([state.keys, keys], 2), torch.cat([state.values, values], 2)
        read = self._joined(state.blocks, recent)
        due = max(0, recent[0].shape[2] - method.recent) // GROUP * GROUP
        blocks = list(state.blocks)
        if due:
            rank = method.rank if due > GROUP else method.later_rank
            k, v = (method.compress(x[:, :, :due], x is recent[0], rank) for x in recent)
            blocks.append((k, v))
        self.state = State(blocks, *(x[:, :, due:].clone() if due else x for x in recent))
        return read

    def cut(self, length: int) -> None:
        """A block that is cut through goes back into the buffer, as it was left by compression."""
        blocks, starts = list(self.state.blocks), [0]
        for keys, _ in blocks:
            starts.append(starts[-1] + keys.left.shape[2])
        recent = self.state.keys, self.state.values
        opened: list[tuple[Compressed, Compressed]] = []
        while starts[-1] > length:
            opened.insert(0, blocks.pop())
            starts.pop()
        k, v = (x[:, :, : length - starts[-1]].clone() for x in self._joined(opened, recent))
        self.state = State(blocks, k, v)

    @staticmethod
    def _joined(
        blocks: list[tuple[Compressed, Compressed]], recent: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor]:
        def parts(which: int) -> Iterator[Tensor]:
            yield from (block[which].expand() for block in blocks)
            yield recent[which]

        return (torch.cat(list(parts(0)), 2), torch.cat(list(parts(1)), 2)) if blocks else recent


def vector(x: Tensor, keys: bool) -> Tensor:
    """Vectors in the last dimension: channels of keys over positions, or a position's values of all heads."""
    return x.mT if keys else x.transpose(1, 2).flatten(2)


def unvector(vectors: Tensor, shape: torch.Size, keys: bool) -> Tensor:
    """The inverse of `vector`, of tensors of ``shape``."""
    return vectors.mT if keys else split(vectors, 2, shape[1], shape[3]).transpose(1, 2)


def take_out(vectors: Tensor, share: float) -> tuple[Tensor, Outliers]:
    """``vectors`` with the mean where the largest and least ``share`` of each were, and those."""
    length = vectors.shape[-1]
    count = int(share * length + 0.5)
    places = vectors.topk(count - count // 2, -1).indices
    others = vectors.scatter(-1, places, torch.inf).topk(count // 2, -1, largest=False).indices
    places = torch.cat([places, others], -1)
    means = vectors.float().mean(-1, keepdim=True).to(vectors.dtype)
    rest = vectors.scatter(-1, places, means.expand(places.shape))
    small = places.to(torch.int16 if length <= 2**15 else torch.int32)
    return rest, Outliers(vectors.gather(-1, places), small)


def low_rank(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``left (..., n, rank)`` and ``right (..., dim, rank)`` with left rightᵀ near ``x (..., n, dim)``, by
    power iteration from the same start each time."""
    generator = torch.Generator().manual_seed(0)
    right = torch.randn((x.shape[-1], rank), generator=generator).to(x.device).expand(*x.shape[:-2], -1, -1)
    left = x.new_zeros((*x.shape[:-1], rank))
    for _ in range(LOOPS if rank else 0):
        left = torch.linalg.qr(x @ right).Q
        right = x.mT @ left
    return left, right
