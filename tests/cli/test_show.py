"""Tables of any width of the terminal: no word and no figure is broken."""

from __future__ import annotations

from io import StringIO

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from gossamer.cli import show

HEADER = ("", "size", "perplexity", "top-1 agreement", "decode 64 tok/s")
ROWS = [
    ["> dense int4", "85.8 MB", "23.10", "77.3 %", "337.0"],
    ["  32:64", "72.5 MB", "", "63.7 %", "209.1"],
]


def printed(width: int, header: tuple[str, ...], rows: list[list[str]], left: int = 1) -> str:
    file = StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(show, "stdout", lambda: Console(file=file, width=width, markup=False, highlight=False))
        show.columns("Models", header, rows, ["a note"], left)
    return file.getvalue()


def test_a_narrow_terminal_has_figures_below_their_name() -> None:
    lines = [" ".join(line.split()) for line in printed(40, HEADER, ROWS).splitlines()]
    assert lines[1] == "> dense int4"
    assert "decode 64 tok/s 337.0" in lines
    assert lines.index("32:64") < lines.index("size 72.5 MB") < lines.index("a note")
    assert sum("perplexity" in line for line in lines) == 1  # not where there is none


@settings(deadline=None)
@given(st.integers(30, 200))
def test_nothing_is_broken_at_any_width(width: int) -> None:
    text = printed(width, HEADER, ROWS)
    assert all(len(line.rstrip()) <= width for line in text.splitlines())
    for whole in ("85.8 MB", "77.3 %", "337.0", "perplexity", "agreement", "tok/s", "32:64", "a note"):
        assert whole in text


def test_long_text_takes_what_is_left() -> None:
    rows = [["wanda", "inputs", "a long sentence of a paper " * 8]]
    lines = printed(70, ("method", "needs", "cite"), rows, left=3).splitlines()
    assert lines[2].split() == ["method", "needs", "cite"]
    assert " ".join(" ".join(lines[4:-2]).split()) == f"wanda inputs {rows[0][2].strip()}"
