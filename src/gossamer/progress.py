"""How long work reports how far it is: one callable, no dependency on what draws it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""``progress(stage, done, total)``: called often and cheaply; ``done == total`` ends the stage."""


def silent(stage: str, done: int, total: int) -> None:
    """The progress of programs that want none."""
