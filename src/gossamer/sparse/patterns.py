"""Patterns are data: which masks are allowed, and within which group scores compete."""

from __future__ import annotations

import re
from dataclasses import dataclass

from gossamer.errors import PatternError

COMPARISON_GROUPS = ("row", "tensor", "model")  # and "columns:C"


@dataclass(frozen=True)
class Unstructured:
    """Any weight may go. ``group``: ``row`` (each output), ``tensor``, ``model`` or ``columns:C``
    (all rows of C consecutive input columns together, as SparseGPT's blocks compare)."""

    group: str = "row"

    def __post_init__(self) -> None:
        check_group(self.group)

    def __str__(self) -> str:
        return f"unstructured:{self.group}"


@dataclass(frozen=True)
class NM:
    """Keep ``n`` of every ``m`` consecutive weights along the input dimension (2:4 keeps 2).

    Some tools name the pruned count instead. A ragged last group of r < m inputs keeps ``ceil(r * n / m)``,
    so that every output keeps some of it.
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not (2 <= self.m <= 64 and 1 <= self.n <= self.m):
            raise PatternError(f"N:M needs 1 <= N <= M and 2 <= M <= 64, got {self.n}:{self.m}")

    @property
    def sparsity(self) -> float:
        return 1.0 - self.n / self.m

    def __str__(self) -> str:
        return f"{self.n}:{self.m}"


@dataclass(frozen=True)
class Block:
    """Blocks of ``rows`` outputs x ``cols`` inputs are kept or pruned whole, by the mean of their scores.

    ``group``: ``row`` (a row of blocks), ``tensor`` or ``model``. Ragged blocks at the borders count
    as blocks of their own size; the number of *blocks* pruned is exact.
    """

    rows: int
    cols: int
    group: str = "tensor"

    def __post_init__(self) -> None:
        if self.rows < 1 or self.cols < 1:
            raise PatternError(f"a block needs at least 1 row and 1 column, got {self.rows}x{self.cols}")
        check_group(self.group)
        if self.group.startswith("columns:"):
            raise PatternError("blocks compare within row, tensor or model, not columns")

    def __str__(self) -> str:
        return f"{self.rows}x{self.cols}" + ("" if self.group == "tensor" else f":{self.group}")


@dataclass(frozen=True)
class Channel:
    """Whole channels: ``axis`` 0 prunes rows (outputs), 1 prunes columns (inputs)."""

    axis: int

    def __post_init__(self) -> None:
        if self.axis not in (0, 1):
            raise PatternError(f"a channel's axis is 0 (out) or 1 (in), got {self.axis}")

    def __str__(self) -> str:
        return f"channel:{'in' if self.axis else 'out'}"


Pattern = Unstructured | NM | Block | Channel


def check_group(group: str) -> None:
    """Raises PatternError unless ``group`` names a comparison group."""
    if group in COMPARISON_GROUPS or re.fullmatch(r"columns:[1-9]\d*", group):
        return
    raise PatternError(f"unknown comparison group {group!r}: use row, tensor, model or columns:C")


def parse_pattern(text: str) -> Pattern:
    """``"2:4"``, ``"32:64"``, ``"16x4"``, ``"unstructured"``, ``"unstructured:tensor"``,
    ``"unstructured:columns:128"``, ``"16x4:row"``, ``"channel:in"`` or ``"channel:out"`` as a pattern.

    Raises PatternError with the accepted forms.
    """
    text = text.strip()
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(match[1]), int(match[2]))
    if match := re.fullmatch(r"(\d+)x(\d+)(?::(.+))?", text):
        return Block(int(match[1]), int(match[2]), *([match[3]] if match[3] else []))
    if match := re.fullmatch(r"unstructured(?::(.+))?", text):
        return Unstructured(*([match[1]] if match[1] else []))
    if text in ("channel:in", "channel:out"):
        return Channel(1 if text == "channel:in" else 0)
    raise PatternError(
        f"cannot read the pattern {text!r}: use N:M (2:4, 32:64), RxC (16x4), unstructured[:GROUP], "
        "channel:in or channel:out"
    )
