"""Scores to masks: the one place where counts, groups and ties are decided."""

from __future__ import annotations

import math
from fractions import Fraction
from numbers import Real

import torch
from torch import Tensor

from gossamer.errors import PatternError, ScoreError, SparsityError
from gossamer.sparse.patterns import NM, Block, Channel, Pattern, Unstructured


def check_sparsity(sparsity: object) -> None:
    """Raises SparsityError unless 0 <= sparsity < 1."""
    if not (isinstance(sparsity, Real) and 0.0 <= float(sparsity) < 1.0):
        raise SparsityError(f"sparsity is a fraction of zeros in [0, 1), got {sparsity!r}")


def count_pruned(n: int, sparsity: float) -> int:
    """How many of ``n`` entries are pruned: ``floor(sparsity * n + 0.5)``, computed on the decimal
    that was written, so that 0.7 of 45 is 32 and not what binary rounding makes of it."""
    check_sparsity(sparsity)
    return math.floor(Fraction(repr(float(sparsity))) * n + Fraction(1, 2))


def resolve_sparsity(pattern: Pattern, sparsity: float | None) -> float:
    """The sparsity that ``pattern`` is asked for: N:M implies its own, the others need a number.

    Raises SparsityError where both are given and disagree, or where neither gives one.
    """
    if isinstance(pattern, NM):
        if sparsity is not None and abs(sparsity - pattern.sparsity) > 5e-4:
            raise SparsityError(
                f"the pattern {pattern} keeps {pattern.n} of {pattern.m}, a sparsity of "
                f"{pattern.sparsity:.4g}, but {sparsity:g} was asked for; leave the sparsity out"
            )
        return pattern.sparsity
    if sparsity is None:
        raise SparsityError(f"the pattern {pattern} needs a sparsity in [0, 1)")
    check_sparsity(sparsity)
    return float(sparsity)


def keep_highest(scores: Tensor, pruned: int) -> Tensor:
    """Bool mask that drops the ``pruned`` lowest of each row of (groups, n) ``scores``; of equal
    scores the one with the lower index is dropped first."""
    groups, n = scores.shape
    mask = torch.ones((groups, n), dtype=torch.bool, device=scores.device)
    if pruned == 0:
        return mask
    # k-th smallest decides almost everything; ties at the threshold are counted off by index
    threshold = scores.kthvalue(pruned, dim=1, keepdim=True).values
    below = scores < threshold
    ties = scores == threshold
    room = pruned - below.sum(dim=1, keepdim=True)
    drop = below | (ties & (ties.cumsum(dim=1) <= room))
    return mask & ~drop


def mask_from_scores(scores: Tensor, pattern: Pattern, sparsity: float | None = None) -> Tensor:
    """The mask (True = kept) that ``pattern`` allows and that keeps the highest ``scores``.

    ``scores``: float ``(out_features, in_features)``; returns bool of that shape. Per comparison group
    of n entries exactly ``floor(sparsity * n + 0.5)`` are pruned; among equal scores the lower index
    goes first; the result is deterministic. For N:M the sparsity is the pattern's own, of a last group of
    fewer inputs at most. The group
    ``model`` is not one tensor's affair: allocate first (``allocate.compete``), then it compares as
    ``tensor``. Raises ScoreError on NaN, SparsityError, PatternError where the pattern cannot apply.
    """
    if scores.dim() != 2:
        raise ScoreError(f"scores are (out_features, in_features), got shape {tuple(scores.shape)}")
    if torch.isnan(scores).any():
        raise ScoreError("the scores hold NaN: the weights or the calibration statistics are not finite")
    sparsity = resolve_sparsity(pattern, sparsity)
    scores = scores.detach().float()
    rows, cols = scores.shape
    if isinstance(pattern, NM):
        return _nm_mask(scores, pattern)
    if isinstance(pattern, Block):
        return _block_mask(scores, pattern, sparsity)
    if isinstance(pattern, Channel):
        totals = unit_scores(scores, pattern).reshape(1, -1)
        kept = keep_highest(totals, count_pruned(totals.shape[1], sparsity))
        return (kept.T if pattern.axis == 0 else kept).expand(rows, cols).contiguous()
    return _unstructured_mask(scores, pattern, sparsity)


def unit_scores(scores: Tensor, pattern: Pattern) -> Tensor:
    """The scores of the units that ``pattern`` keeps or prunes whole: each weight's, or the sums over
    blocks ``(block rows, block columns)`` or channels ``(channels,)``. A block that a border cuts off
    scores as a whole one of its mean."""
    if isinstance(pattern, Channel):
        return scores.sum(dim=1 - pattern.axis)
    if not isinstance(pattern, Block):
        return scores
    rows, cols = scores.shape
    if pattern.rows > rows or pattern.cols > cols:
        raise PatternError(f"blocks of {pattern.rows}x{pattern.cols} do not fit a weight of {rows}x{cols}")
    down, across = -(-rows // pattern.rows), -(-cols // pattern.cols)
    padded = scores.new_zeros(down * pattern.rows, across * pattern.cols)
    padded[:rows, :cols] = scores
    sums = padded.reshape(down, pattern.rows, across, pattern.cols).sum(dim=(1, 3))
    if ragged := rows % pattern.rows:
        sums[-1] *= pattern.rows / ragged
    if ragged := cols % pattern.cols:
        sums[:, -1] *= pattern.cols / ragged
    return sums


def _unstructured_mask(scores: Tensor, pattern: Unstructured, sparsity: float) -> Tensor:
    rows, cols = scores.shape
    if pattern.group == "row":
        return keep_highest(scores, count_pruned(cols, sparsity))
    if pattern.group in ("tensor", "model"):
        return keep_highest(scores.reshape(1, -1), count_pruned(scores.numel(), sparsity)).reshape(rows, cols)
    width = int(pattern.group.removeprefix("columns:"))
    parts = [
        keep_highest(part.reshape(1, -1), count_pruned(part.numel(), sparsity)).reshape(part.shape)
        for part in torch.split(scores, width, dim=1)
    ]
    return torch.cat(parts, dim=1)


def _nm_mask(scores: Tensor, pattern: NM) -> Tensor:
    rows, cols = scores.shape
    m, whole = pattern.m, cols - cols % pattern.m
    parts = []
    if whole:
        groups = scores[:, :whole].reshape(-1, m)
        parts.append(keep_highest(groups, m - pattern.n).reshape(rows, whole))
    if whole < cols:
        parts.append(keep_highest(scores[:, whole:], ragged_pruned(pattern, cols - whole)))
    return torch.cat(parts, dim=1)


def ragged_pruned(pattern: NM, width: int) -> int:
    """How many weights a last group of ``width`` < M inputs loses: at most the pattern's share, since
    else every output would lose all of one input, or of two of 1:4."""
    return width * (pattern.m - pattern.n) // pattern.m


def most_kept(shape: tuple[int, int], pattern: Pattern, sparsity: float) -> int:
    """How many weights a mask of ``shape`` (out, in) keeps, known without scores; with blocks that a border
    cuts off at most so many."""
    rows, cols = shape
    if isinstance(pattern, NM):
        ragged = cols % pattern.m
        return rows * (cols // pattern.m * pattern.n + ragged - ragged_pruned(pattern, ragged))
    if isinstance(pattern, Channel):
        lines = shape[pattern.axis]
        return (lines - count_pruned(lines, sparsity)) * shape[1 - pattern.axis]
    if isinstance(pattern, Block):
        down, across = -(-rows // pattern.rows), -(-cols // pattern.cols)
        groups, width = (down, across) if pattern.group == "row" else (1, down * across)
        kept = groups * (width - count_pruned(width, sparsity))
        return min(rows * cols, kept * pattern.rows * pattern.cols)
    if pattern.group == "row":
        return rows * (cols - count_pruned(cols, sparsity))
    if not pattern.group.startswith("columns:"):
        return rows * cols - count_pruned(rows * cols, sparsity)
    width = int(pattern.group.removeprefix("columns:"))
    whole, ragged = divmod(cols, width)
    return rows * cols - whole * count_pruned(rows * width, sparsity) - count_pruned(rows * ragged, sparsity)


def _block_mask(scores: Tensor, pattern: Block, sparsity: float) -> Tensor:
    rows, cols = scores.shape
    units = unit_scores(scores, pattern)
    if pattern.group == "row":
        kept = keep_highest(units, count_pruned(units.shape[1], sparsity))
    else:
        kept = keep_highest(units.reshape(1, -1), count_pruned(units.numel(), sparsity)).reshape(units.shape)
    full = kept.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
    return full[:rows, :cols].contiguous()


def check_mask(mask: Tensor, pattern: Pattern) -> None:
    """Raises PatternError unless ``mask`` is one that ``pattern`` allows (for N:M: at most N kept)."""
    rows, cols = mask.shape
    if isinstance(pattern, NM):
        whole = cols - cols % pattern.m
        kept = mask[:, :whole].reshape(rows, -1, pattern.m).sum(dim=2)
        if whole and int(kept.max()) > pattern.n:
            row, group = divmod(int(kept.argmax()), kept.shape[1])
            raise PatternError(
                f"row {row} keeps {int(kept.max())} of the {pattern.m} inputs from {group * pattern.m} on; "
                f"{pattern} allows {pattern.n}"
            )
        if whole < cols:
            allowed = cols - whole - ragged_pruned(pattern, cols - whole)
            if int(mask[:, whole:].sum(dim=1).max()) > allowed:
                raise PatternError(f"a row keeps more than {allowed} of the last {cols - whole} inputs")
    elif isinstance(pattern, Block):
        rebuilt = mask[:: pattern.rows, :: pattern.cols]
        rebuilt = rebuilt.repeat_interleave(pattern.rows, 0).repeat_interleave(pattern.cols, 1)
        if not torch.equal(rebuilt[:rows, :cols], mask):
            raise PatternError(f"the mask cuts through blocks of {pattern.rows}x{pattern.cols}")
    elif isinstance(pattern, Channel):
        line = mask[:, :1] if pattern.axis == 0 else mask[:1, :]
        if not torch.equal(line.expand(rows, cols), mask):
            raise PatternError("the mask does not keep or prune whole channels")
