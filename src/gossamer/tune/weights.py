"""A weight under tuning: its mask holds at every step, and integers are rounded as they will be stored."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.matrices.values import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Quantized,
    ValueType,
    integer_type,
    quantize_codes,
)


class TunedWeight(nn.Module):
    """What a layer multiplies by while ``latent`` ``(out, in)`` is tuned, float32.

    ``mask``: bool ``(out, in)``, True = kept, or None; ``quantized``: the codes to begin with where values
    are integers. Then ``scales`` ``(out, groups)`` are tuned too (LSQ, Esser et al. 2020), and the forward
    pass sees ``scale * clamp(round(latent / scale))``, gradients passing straight through the rounding
    (Bengio et al. 2013). Scales are rounded to float16 as they are stored, so that tuning sees the finished
    weight.
    """

    def __init__(self, weight: Tensor, mask: Tensor | None, quantized: Quantized | None = None) -> None:
        super().__init__()
        self.latent = nn.Parameter(weight.detach().float().clone())
        self.mask: Tensor | None
        self.register_buffer("mask", mask)
        self.values: ValueType | None = None
        self.scales: nn.Parameter | None = None
        if quantized is not None:
            self.values, self.group = integer_type(quantized.bits), quantized.group
            self.scales = nn.Parameter(quantized.scales.float())

    def forward(self) -> Tensor:
        """The weight as it will be multiplied, float32 ``(out, in)``: zero wherever it was pruned."""
        kept = self.latent if self.mask is None else self.latent * self.mask
        if self.scales is None or self.values is None:
            return kept
        scales = _straight_through(self.scales, _stored(self.scales))
        scales = scales.repeat_interleave(self.group, dim=1)[:, : kept.shape[1]]
        codes = kept / scales
        codes = _straight_through(codes, codes.round()).clamp(self.values.qmin, self.values.qmax)
        return codes * scales

    @torch.no_grad()
    def finished(self) -> tuple[Tensor, Quantized | None]:
        """The tuned weight, and its codes where values are integers."""
        weight = self().detach().clone()
        if self.scales is None or self.values is None:
            return weight, None
        scales = _stored(self.scales).half()
        kept = self.latent if self.mask is None else self.latent * self.mask
        codes = torch.empty(weight.shape, dtype=torch.int8)
        for index, start in enumerate(range(0, weight.shape[1], self.group)):
            part = slice(start, start + self.group)
            codes[:, part] = quantize_codes(kept[:, part], scales[:, index], self.values)
        return weight, Quantized(codes, scales, self.group, self.values.bits)


def _stored(scales: Tensor) -> Tensor:
    """Scales as float16 holds them, in its normal range, their sign kept."""
    size = scales.detach().abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.copysign(size, scales.detach()).half().float()


def _straight_through(x: Tensor, value: Tensor) -> Tensor:
    """``value`` to the bit, with the gradient of ``x``."""
    return value.detach() + (x - x.detach())
