"""Number formats: which values a packed weight may hold, and how scales and integer codes are chosen."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gossamer.errors import MatrixError

SMALLEST_SCALE = 2.0**-14  # the smallest normal float16
LARGEST_SCALE = 65504.0  # the largest finite float16
CHUNK_ROWS = 512  # groups searched at once: 512 x 64 float32 and a temporary or two stay in a core's cache


@dataclass(frozen=True)
class ValueType:
    """One number format: ``bits`` a stored value, float or integer with a scale per group.

    Integers q are all of ``bits`` bits, or the ``levels`` of a table, rising, one for each code.
    """

    name: str
    bits: int
    is_integer: bool
    levels: tuple[int, ...] = ()

    @property
    def qmin(self) -> int:
        """Least integer, ``-2^(bits-1)`` or the first level; raises MatrixError for floats."""
        self._check_integer()
        return self.levels[0] if self.levels else -(1 << (self.bits - 1))

    @property
    def qmax(self) -> int:
        """Greatest integer, ``2^(bits-1) - 1`` or the last level; raises MatrixError for floats."""
        self._check_integer()
        return self.levels[-1] if self.levels else (1 << (self.bits - 1)) - 1

    @property
    def zero_code(self) -> int:
        """The unsigned code that stands for zero; raises MatrixError for floats."""
        return self.levels.index(0) if self.levels else -self.qmin

    @property
    def has_zero(self) -> bool:
        """Whether zero is among the levels. What lacks it can be tried (benchmarks.grids), but not packed."""
        return not self.levels or 0 in self.levels

    def codes(self, q: Tensor) -> Tensor:
        """uint8 codes of integers in [qmin, qmax]; raises MatrixError for one that is no level."""
        if not self.levels:
            return (q.to(torch.int16) + self.zero_code).to(torch.uint8)
        levels = torch.tensor(self.levels, dtype=q.dtype)
        codes = torch.bucketize(q, levels, out_int32=True).clamp_max_(len(levels) - 1)
        if not torch.equal(levels[codes], q):
            raise MatrixError(f"{self.name} integers are {', '.join(map(str, self.levels))}")
        return codes.to(torch.uint8)

    def integers(self, codes: Tensor) -> Tensor:
        """int8 integers of uint8 codes."""
        if not self.levels:
            return (codes.to(torch.int16) - self.zero_code).to(torch.int8)
        return torch.tensor(self.levels, dtype=torch.int8)[codes.int()]

    @property
    def dtype(self) -> torch.dtype:
        """What the values are held in while unpacked: the float type itself, int8 for integers."""
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}.get(self.name, torch.int8)

    def _check_integer(self) -> None:
        if not self.is_integer:
            raise MatrixError(f"{self.name} values have no integer codes: use {INTEGERS}")


# Least squared error over groups of 64 of trained and of Gaussian weights, with a zero, which layouts without
# a mask store. Steps grow outwards, as weights become few. Levels lie in [-64, 63] (csrc/packed.h).
NL4 = (-62, -48, -39, -31, -24, -17, -11, -5, 0, 6, 12, 19, 26, 34, 44, 58)
NL3 = (-30, -19, -11, -5, 0, 6, 13, 23)

INTEGERS = "int8, int4, int3, nl4 or nl3"

VALUES: dict[str, ValueType] = {
    value.name: value
    for value in (
        ValueType("float32", 32, False),
        ValueType("bfloat16", 16, False),
        ValueType("int8", 8, True),
        ValueType("int4", 4, True),
        ValueType("int3", 3, True),
        ValueType("nl4", 4, True, NL4),
        ValueType("nl3", 3, True, NL3),
    )
}


def value_type(name: str) -> ValueType:
    """The format called ``name`` (``bf16`` also means bfloat16); raises MatrixError with the list."""
    value = VALUES.get({"bf16": "bfloat16"}.get(name, name))
    if value is None:
        raise MatrixError(f"unknown values {name!r} (there are: {', '.join(VALUES)})")
    return value


def value_types(names: str) -> tuple[ValueType, ...]:
    """The formats of a list such as ``nl4,nl3``, or of one name; raises MatrixError."""
    return tuple(value_type(name.strip()) for name in names.split(","))


@dataclass
class Quantized:
    """Integers and scales of one weight: ``w ≈ scale * q``.

    ``q``: int8 ``(out, in)``, 0 where pruned; ``scales``: float16 ``(out, ceil(in / group))``;
    ``clamped`` counts the scales that had to be clamped to float16's normal range.
    """

    q: Tensor
    scales: Tensor
    group: int
    values: ValueType
    clamped: int = 0

    def to_dense(self) -> Tensor:
        """float32 ``(out, in)``."""
        scales = self.scales.float().repeat_interleave(self.group, dim=1)[:, : self.q.shape[1]]
        return self.q.float() * scales


@dataclass(frozen=True)
class _Search:
    """Where scales are looked for: factors of the scale that maps the group's peak to the end of the
    code range, on both signs; then fractions of a coarse step around the best; then ``rounds`` of
    alternation between codes and the closed-form scale."""

    factors: tuple[float, ...]
    step: float
    fine: tuple[float, ...]
    rounds: int


def _grid(low: float, high: float, step: float) -> tuple[float, ...]:
    count = round((high - low) / step)
    return tuple(sorted((low + step * i for i in range(count + 1)), key=lambda f: abs(f - 1.0)))


# Squared error beside an exhaustive search of 800 scales, each refined once (4,000 groups of 64; Gaussian,
# Student t, magnitude-pruned, and importances over three decades): int4 +0.02 to +0.35 %, int3 +0.01 to
# +0.12 %, int8 +5 to +13 % of an error that is itself about 1/250 of int4's. Absmax / qmax gives +43 to
# +77 % at int4, +75 to +150 % at int3, +16 to +49 % at int8. tests/matrices/test_values.py holds bounds.
_THIRDS = (-2 / 3, -1 / 3, 1 / 3, 2 / 3)
_SEARCHES = {
    8: _Search(_grid(0.96, 1.01, 0.01), 0.01, _THIRDS, 1),
    4: _Search(_grid(0.50, 1.05, 0.05), 0.05, _THIRDS, 2),
    3: _Search(_grid(0.40, 1.06, 0.06), 0.06, _THIRDS, 2),
}


def overflows(x: Tensor, rounded: Tensor) -> bool:
    """Whether a finite number of ``x`` became infinite in ``rounded``."""
    return bool(rounded.isinf().any()) and bool((rounded.isinf() & x.isfinite()).any())


def choose_scales(
    w: Tensor, values: ValueType, mask: Tensor | None = None, importance: Tensor | None = None
) -> tuple[Tensor, int]:
    """The scale of each group that gives the least weighted squared error over its kept weights.

    ``w``: float ``(rows, n)``, one group a row; ``mask``: bool like ``w``, True = kept; ``importance``:
    the weight of each squared error, float ``(n,)`` or ``(rows, n)``, at least 0 (the Gram diagonal of
    the inputs, where known). Returns float16 ``(rows,)`` and how many of them were clamped.

    Every candidate is rounded to float16 before its codes are chosen, and its error is measured with
    the rounded value. A scale may be negative, since codes reach one further below zero than above.
    Never worse than ``max|w| / qmax`` (with ``levels``: than the greatest weight on either end of them). A
    scale outside float16's normal range is clamped to its border (sign kept) and counted; a group whose kept
    weights are all zero, or that keeps none, gets the smallest normal float16 and is not counted, since
    nothing is lost (without a zero, next to nothing).
    Deterministic.
    Raises MatrixError on NaN or infinite weights, and on negative or non-finite importances.
    """
    _check_weights(w, mask)
    rows, n = w.shape
    search = _SEARCHES[values.bits] if values.is_integer else None
    if search is None:
        raise MatrixError(f"{values.name} values have no scales: use {INTEGERS}")
    weighting = _normalized(importance, rows, n)
    scales = torch.empty(rows, dtype=torch.float16)
    clamped = 0
    for start in range(0, rows, CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        # inputs run down and groups across, so that a scale a group is a vector and broadcasts for free
        chunk = w[part].detach().float().T.contiguous()
        pruned = None if mask is None else ~mask[part].T
        if pruned is not None:
            chunk.masked_fill_(pruned, 0.0)
        if values.has_zero:
            pruned = None  # a zero takes care of itself
        per_row = weighting is not None and weighting.dim() == 2 and weighting.shape[1] > 1
        weigh = weighting[:, part].contiguous() if per_row and weighting is not None else weighting
        best, hits = _search_chunk(chunk, values, weigh, search, pruned)
        scales[part] = best.half()
        clamped += hits
    return scales, clamped


def _check_weights(w: Tensor, mask: Tensor | None) -> None:
    if w.dim() != 2:
        raise MatrixError(f"weights are (rows, n), got shape {tuple(w.shape)}")
    if mask is not None and (mask.shape != w.shape or mask.dtype != torch.bool):
        raise MatrixError(
            f"the mask is bool {tuple(w.shape)} like the weights, got {mask.dtype} {tuple(mask.shape)}"
        )
    if not bool(torch.isfinite(w).all()):
        raise MatrixError("the weights hold NaN or infinity: they cannot be quantized")


def _normalized(importance: Tensor | None, rows: int, n: int) -> Tensor | None:
    """Importances as float32 ``(n, 1)`` or ``(n, rows)``, the greatest of each group 1 (all ones where
    every one is 0), so that no product overflows."""
    if importance is None:
        return None
    if tuple(importance.shape) not in ((n,), (rows, n)):
        raise MatrixError(f"importances are ({n},) or ({rows}, {n}), got {tuple(importance.shape)}")
    across = importance.detach().float().reshape(-1, n).T
    if not bool(torch.isfinite(across).all()) or bool((across < 0).any()):
        raise MatrixError("importances must be finite and at least 0")
    if n == 0:
        return across
    top = across.amax(dim=0, keepdim=True)
    return torch.where(top > 0, across / top.clamp_min(torch.finfo(torch.float32).tiny), 1.0)


def _clamp(scale: Tensor) -> tuple[Tensor, Tensor]:
    """Scales as float32 values that float16 holds as normal numbers, and which of them were clamped."""
    size = scale.abs()
    outside = ~((size >= SMALLEST_SCALE) & (size <= LARGEST_SCALE))
    size = size.nan_to_num(SMALLEST_SCALE, posinf=LARGEST_SCALE).clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.copysign(size, scale).half().float(), outside


def _search_chunk(
    w: Tensor, values: ValueType, weigh: Tensor | None, search: _Search, pruned: Tensor | None
) -> tuple[Tensor, int]:
    """Best scales of ``w`` float32 ``(n, groups)`` as float32 ``(groups,)``, and how many were clamped;
    ``pruned`` weights are zero whatever the grid."""
    n, groups = w.shape
    if n == 0 or groups == 0:
        return torch.full((groups,), SMALLEST_SCALE), 0
    q, rest = torch.empty_like(w), torch.empty_like(w)
    peak = w.gather(0, w.abs().argmax(dim=0, keepdim=True))[0]
    best, best_outside = _clamp(peak / values.qmin)
    best_error = torch.full_like(peak, torch.inf)

    def consider(wanted: Tensor) -> None:
        nonlocal best, best_outside, best_error
        scale, outside = _clamp(wanted)
        _fill_codes(w, scale, values, q, pruned)
        torch.mul(q, scale, out=rest)
        rest.sub_(w).square_()
        error = (rest if weigh is None else rest.mul_(weigh)).sum(dim=0)
        better = error < best_error
        best = torch.where(better, scale, best)
        best_outside = torch.where(better, outside, best_outside)
        best_error = torch.where(better, error, best_error)

    for factor in search.factors:
        consider(peak * (factor / values.qmin))
        consider(peak * (factor / values.qmax))
    centre = best
    for fraction in search.fine:
        consider(centre + centre.sign() * peak.abs() * (fraction * search.step / values.qmax))
    for _ in range(search.rounds):
        _fill_codes(w, best, values, q, pruned)
        weighted = q if weigh is None else torch.mul(q, weigh, out=rest)
        above, below = (weighted * w).sum(dim=0), (weighted * q).sum(dim=0)
        consider(torch.where(below > 0, above / below, best))
    empty = peak == 0
    best = torch.where(empty, SMALLEST_SCALE, best)
    return best, int((best_outside & ~empty).sum())


def _fill_codes(w: Tensor, scale: Tensor, values: ValueType, out: Tensor, pruned: Tensor | None) -> None:
    torch.div(w, scale, out=out)
    nearest_(out, values)
    if pruned is not None:
        out.masked_fill_(pruned, 0.0)


def nearest_(x: Tensor, values: ValueType) -> Tensor:
    """``x`` float32, in units of the scale, in place as the nearest integers of ``values`` (ties: to the even
    one, or to the lower level). Raises MatrixError for floats."""
    if not values.levels:
        return x.round_().clamp_(values.qmin, values.qmax)
    low, high = 2 * values.qmin, 2 * values.qmax
    halves = x.mul_(2).ceil_().clamp_(low, high).nan_to_num_(high).sub_(low).int()
    return x.copy_(_nearest_levels(values).index_select(0, halves.flatten()).view_as(x))


@cache
def _nearest_levels(values: ValueType) -> Tensor:
    """The level nearest to any number, by its double rounded up and counted from that of the first level:
    halfway points between integers are halves, so that no more of a number decides."""
    levels = torch.tensor(values.levels, dtype=torch.float32)
    doubles = torch.arange(2 * values.qmin, 2 * values.qmax + 1)
    return levels[torch.bucketize(doubles.float(), levels[1:] + levels[:-1])]


def quantize_codes(w: Tensor, scale: Tensor, values: ValueType) -> Tensor:
    """int8 integers nearest to ``w / scale`` (`nearest_`) of ``w`` float ``(rows, n)``, with the float16
    ``scale`` ``(rows,)`` as it is stored. The caller zeroes pruned weights."""
    return nearest_(torch.div(w.detach().float(), scale.float()[:, None]), values).to(torch.int8)


def quantize(
    w: Tensor,
    values: ValueType,
    group: int = 64,
    mask: Tensor | None = None,
    importance: Tensor | None = None,
) -> Quantized:
    """Round-to-nearest over a whole weight: scales by :func:`choose_scales`, then codes.

    ``w``: float ``(out, in)``; ``group``: inputs a scale, 64 or 32; ``mask``: bool like ``w``;
    ``importance``: float ``(in,)`` (the Gram diagonal) or like ``w``. Raises as choose_scales does.
    """
    check_group(group)
    _check_weights(w, mask)
    out, width = w.shape
    if importance is not None and tuple(importance.shape) not in ((width,), (out, width)):
        raise MatrixError(f"importances are ({width},) or ({out}, {width}), got {tuple(importance.shape)}")
    q = torch.zeros(out, width, dtype=torch.int8)
    scales = torch.empty(out, -(-width // group), dtype=torch.float16)
    clamped = 0
    for index, start in enumerate(range(0, width, group)):
        part = slice(start, start + group)
        kept = None if mask is None else mask[:, part]
        weigh = None if importance is None else importance[..., part]
        scale, hits = choose_scales(w[:, part], values, kept, weigh)
        codes = quantize_codes(w[:, part], scale, values)
        q[:, part] = codes if kept is None else codes * kept
        scales[:, index] = scale
        clamped += hits
    return Quantized(q, scales, group, values, clamped)


def check_group(group: int) -> None:
    """Raises MatrixError unless ``group`` is a number of inputs that one scale may cover."""
    if group not in (32, 64):
        raise MatrixError(f"a scale covers 64 or 32 inputs, got group {group}")
