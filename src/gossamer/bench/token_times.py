"""What layers cost in time: a token's product with a weight of each shape, dense and at a few sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from gossamer.bench.kinds import made_up
from gossamer.bench.plan_cache import PlanCache
from gossamer.bench.timing import call_seconds, token_seconds
from gossamer.progress import Progress, silent

Shape = tuple[int, int]


def token_times(
    counts: Mapping[Shape, int],
    values: str,
    pattern: str,
    sparsities: Sequence[float],
    group: int,
    *,
    progress: Progress = silent,
) -> dict[Shape, list[float]]:
    """Seconds of a token's product with one weight of each shape ``(out, in)``: dense, and then as
    ``pattern`` packs it at each of ``sparsities``, with the threads that are set, random weights in turn in
    one run.

    ``counts``: how many weights of each shape the model has, all of which are walked, so that they come from
    where the model's lie. The call from Python is taken off: the decoder does not make it. What the cache of
    this machine holds is not measured again. Raises KernelError without the native kernels.
    """
    cache = PlanCache(torch.get_num_threads())
    call = cache.number("a call", call_seconds)
    dense = {shape: made_up(shape, values, None, None, group) for shape in counts}
    working_set = sum(count * dense[shape].nbytes for shape, count in counts.items())
    levels = ", ".join(f"{sparsity:g}" for sparsity in sparsities)
    found: dict[Shape, list[float]] = {}
    for index, shape in enumerate(counts):
        progress("timing", index, len(counts))
        copies = max(1, round(working_set / dense[shape].nbytes))
        name = f"a token: {shape[0]} x {shape[1]} {values} in {group}, {pattern} at {levels}; {copies} copies"

        def measured(shape: Shape = shape, copies: int = copies) -> list[float]:
            sparse = [made_up(shape, values, pattern, sparsity, group) for sparsity in sparsities]
            return token_seconds([dense[shape], *sparse], copies)

        taken = cache.numbers(name, 1 + len(sparsities), measured)
        found[shape] = [max(1e-9, seconds - call) for seconds in taken]
    progress("timing", len(counts), len(counts))
    return found
