"""Progress on stderr: plain lines now and then, and how long is left."""

from __future__ import annotations

import pytest

from gossamer.cli.progress import PlainLines, amount, duration, progress


class Clock:
    """Seconds that pass only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_are_few_and_say_what_is_left() -> None:
    lines: list[str] = []
    clock = Clock()
    report = PlainLines(lines.append, clock)
    for block in range(31):
        report("pruning", block, 30)
        clock.now += 4
    assert lines[0] == "pruning: 3/30, about 1 min 48 s left"  # 12 s for 3, 27 to go
    assert len(lines) == 10
    assert lines[-1] == "pruning: done in 2 min 00 s"


def test_a_resumed_stage_counts_its_own_pace() -> None:
    lines: list[str] = []
    clock = Clock()
    report = PlainLines(lines.append, clock)
    report("pruning", 20, 30)
    clock.now = 10
    report("pruning", 22, 30)
    assert lines == ["pruning: 22/30, about 40 s left"]


def test_short_stages_are_silent() -> None:
    lines: list[str] = []
    clock = Clock()
    report = PlainLines(lines.append, clock)
    for stage in ("read", "convert"):
        report(stage, 0, 10)
        clock.now += 0.9
        report(stage, 10, 10)
    report("once", 1, 1)
    assert lines == []


def test_durations_and_amounts() -> None:
    assert [duration(s) for s in (0.44, 9.94, 41.2, 185, 3599.6, 7800)] == [
        "0.4 s",
        "9.9 s",
        "41 s",
        "3 min 05 s",
        "1 h 00 min",
        "2 h 10 min",
    ]
    assert amount(3, 30) == "3/30"
    assert amount(500_000, 1_000_000) == "50 %"


def test_bars_in_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with progress() as report:
        report("pruning", 0, 3)
        report("pruning", 2, 3)
        report("pruning", 3, 3)
        report("writing", 0, 1)
    drawn = capsys.readouterr()
    assert drawn.out == ""
    assert "pruning" in drawn.err
    assert "3/3" in drawn.err
