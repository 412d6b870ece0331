"""How a command ends: errors, Ctrl-C, SIGTERM and closed pipes become one line and an exit code.

2: something that a person can mend, in a sentence; 130: Ctrl-C; 143: SIGTERM; 141: the reader of the output
went away. ``GOSSAMER_DEBUG=1`` shows tracebacks.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import ParamSpec

import typer

from gossamer.errors import GossamerError

MISUSE, INTERRUPTED, CLOSED_PIPE, TERMINATED = 2, 130, 141, 143
P = ParamSpec("P")


class Terminated(KeyboardInterrupt):
    """SIGTERM, on the road of Ctrl-C: whatever undoes half-done work there must do so here."""


def guarded(command: Callable[P, None]) -> Callable[P, None]:
    """``command`` with every expected end as its exit code; the unexpected keeps its traceback."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except GossamerError as error:
            raise _exit(f"error: {error}", MISUSE) from error
        except KeyboardInterrupt as error:
            raise interrupted(error, "nothing is left behind") from error
        except BrokenPipeError as error:
            _drop_output()
            raise typer.Exit(CLOSED_PIPE) from error
        except OSError as error:  # a file that nothing below has a sentence for, or a full disk behind stdout
            if error.filename is None:
                _drop_output()
            what = "the output" if error.filename is None else error.filename
            raise _exit(f"error: {what}: {error.strerror or error}", MISUSE) from error

    return run


def _drop_output() -> None:
    """What is still buffered would fail again when the interpreter ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def resumable(work: Path) -> Iterator[None]:
    """Inside, an interruption says that the same command goes on with what lies in the folder ``work``."""
    try:
        yield
    except KeyboardInterrupt as error:
        kept = f"what is done is kept in {work}: run the same command again to go on"
        raise interrupted(error, kept if work.exists() else "nothing was begun") from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Inside, Ctrl-C ends the block and not the command; SIGTERM still ends the command."""
    try:
        yield
    except Terminated:
        raise
    except KeyboardInterrupt:
        _asked.clear()


def interrupted(error: KeyboardInterrupt, left: str) -> typer.Exit:
    """The end of a command that was stopped; ``left``: what there is of its work."""
    _asked.clear()
    terminated = isinstance(error, Terminated)
    word = "stopped (SIGTERM)" if terminated else "interrupted"
    return _exit(f"{word}: {left}", TERMINATED if terminated else INTERRUPTED)


def _exit(line: str, code: int) -> typer.Exit:
    if os.environ.get("GOSSAMER_DEBUG"):
        import traceback

        traceback.print_exc()
    print(f"\n{line}" if code in (INTERRUPTED, TERMINATED) else line, file=sys.stderr, flush=True)
    return typer.Exit(code)


@contextmanager
def stoppable() -> Iterator[None]:
    """Inside, SIGTERM ends a command as Ctrl-C does (in the main thread, where signals can be caught), and
    `check_stop` raises again what was lost."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell's background job ignores it
        caught.append(signal.SIGINT)
    before = {number: signal.signal(number, _stop) for number in caught}
    _asked.clear()
    try:
        yield
    finally:
        _asked.clear()
        for number, handler in before.items():
            signal.signal(number, handler)


def check_stop() -> None:
    """Raises KeyboardInterrupt where a signal came and its exception was lost, as Python loses those that are
    raised while it destroys objects. Long work calls it with its progress."""
    if _asked:
        raise Terminated if _asked[-1] == signal.SIGTERM else KeyboardInterrupt


_asked: list[int] = []


def _stop(number: int, frame: FrameType | None) -> None:
    _asked.append(number)
    check_stop()
