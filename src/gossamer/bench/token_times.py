"""What layers cost in time: a token's product with a weight of each shape, dense and at a few sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gossamer.bench.kinds import made_up
from gossamer.bench.machine import OtherWork
from gossamer.bench.timing import call_seconds, token_seconds
from gossamer.progress import Progress, silent

Shape = tuple[int, int]


@dataclass(frozen=True)
class TokenTimes:
    """``seconds`` by shape ``(out, in)``: dense, and then at each sparsity; ``other_work``: cores that other
    processes kept busy meanwhile."""

    seconds: dict[Shape, list[float]]
    other_work: float


def token_times(
    counts: Mapping[Shape, int],
    values: str,
    pattern: str,
    sparsities: Sequence[float],
    group: int,
    *,
    progress: Progress = silent,
) -> TokenTimes:
    """Times a token's product with one weight of each shape: dense, and then as ``pattern`` packs it at each
    of ``sparsities``, with the threads that are set, random weights in turn in one run.

    ``counts``: how many weights of each shape the model has, all of which are walked, so that they come from
    where the model's lie. The call from Python is taken off: the decoder does not make it. Raises KernelError
    without the native kernels.
    """
    others, call = OtherWork(), call_seconds()
    dense = {shape: made_up(shape, values, None, None, group) for shape in counts}
    working_set = sum(count * dense[shape].nbytes for shape, count in counts.items())
    found: dict[Shape, list[float]] = {}
    for index, shape in enumerate(counts):
        progress("timing", index, len(counts))
        sparse = [made_up(shape, values, pattern, sparsity, group) for sparsity in sparsities]
        copies = max(1, round(working_set / dense[shape].nbytes))
        taken = token_seconds([dense[shape], *sparse], copies)
        found[shape] = [max(1e-9, seconds - call) for seconds in taken]
    progress("timing", len(counts), len(counts))
    return TokenTimes(found, others.cores())
