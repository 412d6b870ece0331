"""Shared by kernel tests: layouts, kinds of values, weights, and what must hold for a product."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from kernel_packer import BITS, Weight, random_weight, with_mask
from torch import Tensor

from gossamer import kernels
from gossamer.kernels import Handle, reference

# A new layout joins all kernel tests here, once kernel_packer.py makes its masks and sections.
LAYOUTS = ("dense", "columns", "bitmap", "16x4", "32:64", "7:64")
# Layouts whose kernels do not multiply what they prune, in blocks of outputs x inputs; others multiply zeros.
SKIPPED_BLOCKS = {"16x4": (16, 4)}
VALUES = ("float32", "bfloat16", "int8", "int4", "int3", "nl4", "nl3")
IN_COLUMNS = ("float32", "bfloat16", "int8", "int4")
KINDS = [(v, g) for v in VALUES for g in ((64, 32) if v in BITS else (64,))]
FORMATS = [(layout, v) for layout in LAYOUTS for v in VALUES if layout != "columns" or v in IN_COLUMNS]
PACKED = [(layout, v, g) for layout, v in FORMATS for kind, g in KINDS if kind == v]

Product = Callable[[Handle, Tensor, str], Tensor]


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


def any_weight(layout: str, values: str, group: int, out: int, cols: int, rng: np.random.Generator) -> Weight:
    """A weight with empty, sparse, half and full panel-groups, and numbers that are hard to multiply: -0.0,
    subnormal and large values and scales."""
    masks = np.stack(
        [
            random_weight(layout, values, out, cols, group, density, int(rng.integers(2**32))).mask
            for density in (0.0, 0.05, 0.5, 1.0)
        ]
    )
    choice = rng.integers(4, size=(-(-out // 16), -(-cols // 64))).repeat(16, 0).repeat(64, 1)[:out, :cols]
    mask = np.take_along_axis(masks, choice[None], 0)[0]
    if rng.random() < 0.3:  # panels in pairs of one mask, as blocks of 32 outputs have them
        mask = mask[np.arange(out) & ~16]
    w = with_mask(layout, values, mask, group, rng)
    numbers = w.stored if w.scales is None else w.scales
    hard = [-0.0, 1e-40, -3e-39, 1e12] if w.scales is None else [-0.0, 6e-8, -5e-5, 6e4]
    numbers[...] = np.where(rng.random(numbers.shape) < 0.05, rng.choice(hard, numbers.shape), numbers)
    if w.scales is None:
        w.stored = torch.from_numpy(w.stored).to(getattr(torch, values)).float().numpy()
        w.stored[~w.mask] = 0
    return w


def any_rows(rows: int, cols: int, rng: np.random.Generator) -> Tensor:
    """float32 activations ``(rows, cols)``: each row of usual, tied, tiny, huge, few or no numbers, one
    with an infinity or a NaN now and then."""
    x = rng.standard_normal((rows, cols))
    for row in x:
        kind = rng.integers(12)
        if kind < 7:
            row *= [0.0, -0.0, 1e-44, 1e-39, 3e-37, 1e-30, 1e15][kind]
        elif kind < 9:  # halves that int8 codes must round
            row[:] = rng.integers(-253, 254, cols) / 2
            row[::64] = 127
        elif kind < 11:
            row *= rng.random(cols) < rng.random()
    if rng.random() < 0.3:
        x[rng.integers(rows), rng.integers(cols)] = rng.choice([np.nan, np.inf, -np.inf])
    return torch.from_numpy(x.astype(np.float32))


def flushed(numbers: Tensor) -> Tensor:
    """Subnormal numbers as zeros."""
    return numbers.masked_fill(numbers.abs() < 2.0**-126, 0)


def multiplied(w: Weight) -> Tensor:
    """bool ``(out, 64 * groups)``: which weights a kernel multiplies at all, be it with zero."""
    out, cols = w.mask.shape
    panels, groups = -(-out // 16), -(-cols // 64)
    if w.layout not in SKIPPED_BLOCKS:
        return torch.ones(out, 64 * groups, dtype=torch.bool)
    high, wide = SKIPPED_BLOCKS[w.layout]
    kept = torch.zeros(16 * panels, 64 * groups, dtype=torch.bool)
    kept[:out, :cols] = torch.from_numpy(w.mask)
    blocks = kept.unflatten(0, (-1, high)).unflatten(2, (-1, wide)).any(3).any(1)
    return blocks.repeat_interleave(high, 0).repeat_interleave(wide, 1)[:out]


def exact(w: Weight, x: Tensor, isa: str) -> tuple[Tensor, Tensor]:
    """The product in float64, and how far a float32 result may lie from it: both ``(rows, out)``.

    Integer values: the codes and steps of ``reference.quantize_activations``, so a result is a sum of n
    terms, one a scale. A kernel rounds each scale product, each term, and each addition but the first: by the
    usual bound for sums ``(n + 2) * 2**-24`` of the terms' magnitudes, whatever way the roundings point.
    Float values: n products that round (bfloat16's fit float32) in chains of at most n / 2, met by at most
    two more additions: ``n / 2 + 4``; in the layout columns in one chain of n.
    Infinite and NaN activations meet the zeros of pruned weights, but not
    those that the layout skips.
    """
    rows, cols = x.shape
    met = multiplied(w)
    if w.values not in BITS:
        stored = torch.from_numpy(w.stored)
        if w.values == "bfloat16":
            x = x.to(torch.bfloat16).float()
            if isa in ("avx512", "amx") and w.layout != "columns":
                x, stored = flushed(x), flushed(stored)
        x, stored = x.double(), stored.double()
        want, magnitude = x @ stored.T, x.abs() @ stored.abs().T
        for row in (~x.isfinite().all(1)).nonzero().flatten():
            terms = (x[row] * stored).masked_fill(~met[:, :cols], 0)
            want[row], magnitude[row] = terms.sum(1), terms.abs().sum(1)
        chain = cols if w.layout == "columns" else cols / 2
        return want, (chain + 4) * 2.0**-24 * magnitude + cols * 2.0**-126
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
    terms = terms.masked_fill(~met.unflatten(1, (-1, w.group)).any(2)[:, : w.scales.shape[1]], 0)
    return terms.sum(2), (terms.shape[2] + 2) * 2.0**-24 * terms.abs().sum(2) + 1e-37


def check_product(w: Weight, x: Tensor, y: Tensor, isa: str | None = None) -> None:
    """Fails unless ``y`` is ``x Wᵀ`` as the reference defines it, up to the rounding of float32 sums; where
    that is infinite or NaN, so must ``y`` be. ``isa``: what computed it, None = the one in use."""
    want, room = exact(w, x, isa or kernels.isa())
    assert y.shape == want.shape
    assert y.dtype == x.dtype
    if y.dtype == torch.bfloat16:
        room = room + 2.0**-8 * want.abs()
    right = ((y.double() - want).abs() <= room) | (y == want) | (y.isnan() & want.isnan())
    wrong = ~right
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} results are wrong, first {wrong.nonzero()[0]}"
    )


def check_same(y: Tensor, want: Tensor, what: str) -> None:
    """Fails unless all numbers are equal, or both NaN."""
    assert torch.equal(y.isnan(), want.isnan()), what
    assert torch.equal(y.nan_to_num(), want.nan_to_num()), what


FEW_ROWS = 16  # calls of more may be multiplied by tiles


def same_bits(handle: Handle, isa: str | None, *rows: int) -> bool:
    """Whether a row has the same bits in calls of so many rows: all that is not bfloat16 by tiles, of which
    calls of few and of many rows add in an order of their own."""
    by_tiles = handle.values == "bfloat16" and handle.layout not in ("16x4", "columns")
    return not (by_tiles and (isa or kernels.isa()) == "amx") or len({n > FEW_ROWS for n in rows}) == 1


def check_everything(
    w: Weight, handle: Handle, x: Tensor, isa: str, matmul: Product = kernels.matmul
) -> None:
    """What holds for every kernel and any finite weight, on float32 ``x (rows, in)``.

    The product is the reference's, portable integers to the bit; rows do not depend on their neighbours; a
    bfloat16 result is the float32 one of the same numbers, rounded."""
    y = matmul(handle, x, isa)
    check_product(w, x, y, isa)
    if isa == "portable" and w.values in BITS:
        usual = x.isfinite().all(1)
        check_same(y[usual], w.reference(x[usual]), "other bits than the reference's")
    rows = len(x)
    for first, last in ((0, 1), (rows // 2, rows), (rows // 3, rows // 3 + 2), (rows // 8, rows)):
        if not same_bits(handle, isa, rows, last - first):
            continue
        check_same(matmul(handle, x[first:last], isa), y[first:last], f"rows {first}:{last} depend on others")
    narrow = x.bfloat16()
    wide = matmul(handle, narrow.float(), isa)
    check_product(w, narrow.float(), wide, isa)
    check_same(matmul(handle, narrow, isa), wide.bfloat16(), "bfloat16 results are not rounded float32 ones")
