"""How far long work is, on stderr: bars with the time left in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from gossamer.cli.guard import check_stop
from gossamer.progress import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import Task, TaskID

EVERY = 10.0  # seconds between plain lines
SHORT = 2.0  # seconds: work that took less is not worth a plain line


@contextmanager
def progress() -> Iterator[Progress]:
    """A callable ``(stage, done, total)`` that draws on stderr until the block ends."""
    if not sys.stderr.isatty():
        yield _checked(PlainLines(lambda line: print(line, file=sys.stderr, flush=True)))
        return
    bars = _bars()
    with bars:
        yield _checked(_Drawn(bars))


def _checked(report: Progress) -> Progress:
    def checked(stage: str, done: int, total: int) -> None:
        check_stop()
        report(stage, done, total)

    return checked


class Pace:
    """Time left of one stage, from its pace since it was first seen (a resumed stage starts midway)."""

    def __init__(self, done: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first, self._start = done, clock()

    @property
    def elapsed(self) -> float:
        """Seconds since the stage was first seen."""
        return self._clock() - self._start

    def left(self, done: int, total: int) -> float | None:
        """Seconds left; None before the first step is done."""
        steps = done - self._first
        return self.elapsed / steps * (total - done) if steps > 0 else None


class PlainLines:
    """Progress as lines of text, at most one every EVERY seconds, and one at the end of a longer stage."""

    def __init__(self, write: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._write, self._clock = write, clock
        self._stage: str | None = None
        self._pace = Pace(0, clock)
        self._told = clock()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._stage, self._pace, self._told = stage, Pace(done, self._clock), self._clock()
        if done >= total:
            if self._pace.elapsed >= SHORT:
                self._write(f"{stage}: done in {duration(self._pace.elapsed)}")
            self._stage = None
        elif self._clock() - self._told >= EVERY:
            self._told = self._clock()
            left = self._pace.left(done, total)
            about = "" if left is None else f", about {duration(left)} left"
            self._write(f"{stage}: {amount(done, total)}{about}")


class _Drawn:
    """Progress as bars, one for each stage."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int) -> None:
        task = self._tasks.get(stage)
        if task is None:
            task = self._bars.add_task(stage, total=total, pace=Pace(done))
            self._tasks[stage] = task
        self._bars.update(task, completed=done, total=total)
        if done >= total:
            del self._tasks[stage]  # the same stage may come again, as a bar of its own


def _bars() -> Bars:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(amount(int(task.completed), int(task.total or 0)))

    class Left(ProgressColumn):
        def render(self, task: Task) -> Text:
            if task.finished:
                return Text(duration(task.elapsed or 0.0), style="dim")
            left = task.fields["pace"].left(int(task.completed), int(task.total or 0))
            return Text("" if left is None else f"{duration(left)} left", style="cyan")

    # twice a second: drawing must not disturb what is being timed
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), Amount(), Left())
    return Bars(*columns, console=console, refresh_per_second=2)


def amount(done: int, total: int) -> str:
    """Steps as they are, bytes and other large numbers in percent."""
    return f"{done}/{total}" if total < 100_000 else f"{100 * done // total} %"


def duration(seconds: float) -> str:
    """``0.4 s``, ``41 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
