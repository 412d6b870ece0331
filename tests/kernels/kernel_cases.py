"""Shared by kernel tests: cached weights, and how far a float result may lie from the reference."""

from __future__ import annotations

from functools import cache

import torch
from kernel_packer import BITS, Weight, random_weight
from torch import Tensor

from gossamer import kernels
from gossamer.kernels import Handle, reference

LAYOUTS = ("dense", "bitmap", "16x4", "32:64", "7:64")
VALUES = ("float32", "bfloat16", "int8", "int4", "int3")
KINDS = [(v, g) for v in VALUES for g in ((64, 32) if v in BITS else (64,))]


def tiers() -> tuple[str, ...]:
    return kernels.available() if kernels.native_available() else ("none",)


def handle_of(w: Weight) -> Handle:
    return kernels.make_handle(w.layout, w.values, *w.mask.shape, w.group, w.sections())


@cache
def case(
    layout: str, values: str, out: int, cols: int, group: int = 64, density: float = 0.5
) -> tuple[Weight, Handle]:
    w = random_weight(layout, values, out, cols, group, density)
    return w, handle_of(w)


def exact(w: Weight, x: Tensor) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far a float32 result may lie from it: both ``(rows, out)``.

    Integer values: the codes and steps of ``reference.quantize_activations``, so a result is a sum of n
    terms, one a scale. A kernel rounds each scale product, each term, and each addition but the first: by the
    usual bound for sums ``(n + 2) * 2**-24`` of the terms' magnitudes, whatever way the roundings point.
    Float values: n products that round (bfloat16's fit float32) in chains of at most n / 2, met by at most
    two more additions: ``n / 2 + 4``.
    """
    rows, cols = x.shape
    if w.values not in BITS:
        if w.values == "bfloat16":
            x = x.to(torch.bfloat16)
        stored = torch.from_numpy(w.stored).double()
        magnitude = x.double().abs() @ stored.abs().T
        return x.double() @ stored.T, (cols / 2 + 4) * 2.0**-24 * magnitude + 1e-37
    assert w.scales is not None
    codes, steps = reference.quantize_activations(x.float())
    parts, groups = 64 // w.group, codes.shape[1]
    padded = torch.zeros(len(w.stored), groups * 64, dtype=torch.float64)
    padded[:, :cols] = torch.from_numpy(w.stored)
    sums = torch.einsum(
        "rpi,opi->rop",
        codes.double().reshape(rows, groups * parts, w.group),
        padded.reshape(-1, groups * parts, w.group),
    )[..., : w.scales.shape[1]]
    steps_of = steps.double().repeat_interleave(parts, 1)[:, None, : w.scales.shape[1]]
    terms = torch.from_numpy(w.scales).double()[None] * steps_of * sums
    return terms.sum(2), (terms.shape[2] + 2) * 2.0**-24 * terms.abs().sum(2) + 1e-37


def check_product(w: Weight, x: Tensor, y: Tensor) -> None:
    """Fails unless ``y`` is ``x Wᵀ`` as the reference defines it, up to the rounding of float32 sums."""
    want, room = exact(w, x)
    assert y.shape == want.shape
    assert y.dtype == x.dtype
    if y.dtype == torch.bfloat16:
        room = room + 2.0**-8 * want.abs()
    wrong = (y.double() - want).abs() > room
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} results are wrong, first {wrong.nonzero()[0]}"
    )
