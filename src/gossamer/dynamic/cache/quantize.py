"""Uniform quantization of keys or values to codes of few bits, packed into bytes (Liu et al. 2024, KIVI)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.claim import Unclaimed
from gossamer.dynamic.cache.parts import split

BITS = (2, 4, 8)
GROUP = 64  # positions that share a scale of a channel
_MOST = torch.finfo(torch.float16).max
UNCLAIMED = Unclaimed(
    name="KIVI",
    cite="Liu et al. 2024, KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    figures="Caches",
    why="It runs as the contender `kivi` of the claim of `gear`, whose codes it is.",
)


@dataclass(frozen=True)
class Quantized:
    """``code * scale + low``: codes uint8 ``(..., dim * bits / 8)``, float16 scales and lows that broadcast.

    Byte i of a row holds the codes of numbers i, i + w, i + 2 w, ... from its low bits on, w bytes a row.
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    bits: int

    def expand(self) -> Tensor:
        """The numbers that the codes stand for, float32."""
        if self.bits == 8:
            return self.codes * self.scale.float() + self.low.float()
        shifts = range(0, 8, self.bits)
        fields = [(self.codes >> shift) & (2**self.bits - 1) for shift in shifts]
        return torch.cat(fields, -1) * self.scale.float() + self.low.float()


def quantize(x: Tensor, dim: int, bits: int) -> Quantized:
    """Codes of ``x (..., dim)`` in equal steps from its least to its largest number along ``dim``.

    Scale and low are rounded to float16 before codes are chosen. The last dimension of ``x`` is a multiple of
    ``8 / bits``.
    """
    x = x.float()
    low = x.amin(dim, keepdim=True).clamp(-_MOST, _MOST).half()
    scale = ((x.amax(dim, keepdim=True) - low.float()) / (2**bits - 1)).clamp(0, _MOST).half()
    steps = (x - low.float()) / torch.where(scale > 0, scale, 1).float()
    codes = steps.round_().clamp_(0, 2**bits - 1).to(torch.uint8)
    if bits < 8:
        fields = split(codes, codes.ndim - 1, 8 // bits, -1).unbind(-2)
        codes = fields[0]
        for number, field in enumerate(fields[1:], 1):
            codes = codes | field << bits * number
    return Quantized(codes, scale, low, bits)


def of_keys(keys: Tensor, bits: int) -> Quantized:
    """Keys ``(batch, heads, n, dim)`` with a scale for each channel of `GROUP` positions; n is a multiple."""
    return quantize(split(keys, 2, -1, GROUP), 3, bits)


def of_values(values: Tensor, bits: int) -> Quantized:
    """Values ``(batch, heads, n, dim)`` with a scale for each position and head."""
    return quantize(values, 3, bits)
