"""`gossamer bench --plan`: each kind of layer in every layout that could hold it, and the fastest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gossamer.cli import show

if TYPE_CHECKING:
    from gossamer.bench import Plan, PlanRow


def print_plan(found: Plan, notes: list[str]) -> None:
    """The table of ``found``, and below it why, and ``notes``."""
    header = ("layers", "weight", "layout", "bytes", "token", "GB/s", "prompt", "both", "")
    rows = [line for row in found.rows for line in _lines(row, found.decode)]
    title = f"Plan: products with one weight (prompt of {found.prompt} tokens, then {found.decode} tokens)"
    show.columns(title, header, rows, [found.explain(), "", *notes], left=3)


def _lines(row: PlanRow, decode: int) -> list[tuple[str, ...]]:
    out, width = row.kind.shape
    layers = f"{len(row.names)} x {row.label}"
    lines: list[tuple[str, ...]] = []
    for times in (*row.candidates, row.reference):
        marks = [("as it is", times is row.present), ("chosen", times is row.chosen)]
        lines.append(
            (
                layers,
                f"{out} x {width}",
                f"{times.form}{'' if times is row.reference else f' {row.kind.values}'}",
                show.size(times.nbytes),
                _time(times.decode_seconds),
                f"{times.gb_per_second:.1f}",
                _time(times.prompt_seconds),
                _time(times.cost(decode)),
                ", ".join(mark for mark, holds in marks if holds),
            )
        )
        layers = ""
    return lines


def _time(seconds: float) -> str:
    """Microseconds: layers take from some to some ten thousand."""
    return f"{1e6 * seconds:,.1f} us" if seconds < 1e-4 else f"{1e6 * seconds:,.0f} us"
