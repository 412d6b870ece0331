"""How results are printed: tables for people, one JSON document for programs, both on stdout."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from rich.console import Console

    from gossamer.recipes.answer import Timing

PIPED_WIDTH = 160  # columns where stdout is no terminal: nothing is cut short there


def document(value: Any) -> None:
    """Prints ``value`` as the one JSON document of a command; numbers that are not finite become null."""
    print(json.dumps(_plain(value), indent=1, ensure_ascii=False, allow_nan=False))


def facts(title: str, rows: Iterable[tuple[str, str]], notes: Sequence[str] = ()) -> None:
    """Prints pairs of a name and a value under ``title``, and ``notes`` below."""
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    _print(table, notes)


def columns(
    title: str, header: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = (), left: int = 1
) -> None:
    """Prints a table with one line a contender; all but the first ``left`` columns are figures. Where the
    terminal is too narrow for that without breaking words, each contender has its figures below it."""
    from rich import box
    from rich.table import Table

    rows, width = [list(row) for row in rows], stdout().width
    cells = [[line for row in rows for line in row[i].split("\n")] for i in range(len(header))]
    widths = [_least_width(name, cells[i], words=i < left) for i, name in enumerate(header)]
    spare = width - sum(widths) - 3 * len(widths) + 1  # what the box takes between columns
    if spare < 0:
        facts(title, [pair for row in rows for pair in _below(header, row)], notes)
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        more = min(max(map(len, [name, *cells[index]])) - widths[index], spare)
        justify: Literal["left", "right"] = "left" if index < left else "right"
        table.add_column(name, justify=justify, overflow="fold", width=widths[index] + more)
        spare -= more
    for row in rows:
        table.add_row(*row)
    _print(table, notes)


def _least_width(name: str, cells: Sequence[str], words: bool) -> int:
    """Of a column that breaks no word of its head, and none of its ``words`` or else none of its cells."""
    parts = [word for cell in cells for word in re.findall(r"^\s*\S+|\S+", cell)] if words else cells
    return max(map(len, [*name.split(), *parts]), default=0)


def _below(header: Sequence[str], row: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The first cell of a row, then the names and figures of the others."""
    yield row[0].strip(), ""
    yield from ((f"  {name}", cell) for name, cell in zip(header[1:], row[1:], strict=True) if cell)


def _print(table: Any, notes: Sequence[str]) -> None:
    console = stdout()
    console.print(table)
    for note in notes:
        console.print(note)


def stdout() -> Console:
    """A console on the present stdout that takes text as it is: names in brackets are no markup."""
    from rich.console import Console

    class Plain(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError  # `guarded` knows what to do; rich would exit with 1

    width = None if sys.stdout.isatty() else PIPED_WIDTH
    return Plain(width=width, markup=False, highlight=False, soft_wrap=False)


def size(count: float) -> str:
    """Bytes in decimal units, as disks are sold: ``84.9 MB``."""
    for unit, step in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= step:
            return f"{count / step:.3g} {unit}" if count < 999.5 * step else f"{count / step:,.0f} {unit}"
    return f"{count:.0f} B"


def percent(share: float) -> str:
    """A share of one in percent, with two decimals where they say something: ``50 %``, ``49.98 %``."""
    return f"{100 * share:.2f}".rstrip("0").rstrip(".") + " %"


def pace(timing: Timing) -> str:
    """How fast an answer came: ``12 prompt tokens (8 kept) in 0.10 s; then 55.0 tokens/s``."""
    speed = timing.decode_speed
    then = "" if speed is None else f"; then {speed:.1f} tokens/s"
    kept = f" ({timing.reused_tokens} kept)" if timing.reused_tokens else ""
    return f"{timing.prompt_tokens} prompt tokens{kept} in {timing.prompt_seconds:.2f} s{then}"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value
