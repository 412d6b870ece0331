"""A block's layers worked on side by side, each on one thread."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from gossamer.calibrate.stream import Visit

R = TypeVar("R")


def side_by_side(work: Callable[[str], R], visit: Visit) -> list[R]:
    """``work`` of every layer's name. Layers that share statistics are one task, whose names come in turn and
    which then forgets what was derived from them; tasks run on threads of their own, each with one thread for
    PyTorch: a sweep is many small steps that gain nothing from more, and its result must not depend on their
    number."""
    tasks: dict[int, list[str]] = {}
    for name in visit.layers:
        tasks.setdefault(id(visit.statistics.get(name, name)), []).append(name)

    def run(names: list[str]) -> list[R]:
        done = [work(name) for name in names]
        for statistic in visit.statistics.get(names[0], {}).values():
            statistic.forget()
        return done

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return [found for part in pool.map(run, tasks.values()) for found in part]
    finally:  # what a pool's thread sets is there for all
        torch.set_num_threads(threads)
