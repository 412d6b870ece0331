"""One budget of activation sparsity split over the layers of each block, as TEAL does it.

Liu et al. 2024, Training-Free Activation Sparsity in Large Language Models: the block-wise greedy search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.dynamic.activations.calibrate import Calibrated
from gossamer.errors import SparsityError
from gossamer.models.walk import capture_block_inputs, find_parts, run_block
from gossamer.nn.modes import evaluating
from gossamer.progress import Progress, silent
from gossamer.sparse.masks import check_sparsity

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STEP = 0.05  # of a block's bytes, skipped in one step of the search
LAST = 0.25  # of each window's positions count in the error, as in the paper's code
MOST = 0.98  # sparsity of one site: a layer that reads nothing is another method


def greedy_levels(
    sizes: Mapping[str, float],
    sparsity: float,
    error: Callable[[dict[str, float]], float],
    step: float = STEP,
    start: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Levels of sparsity that skip a share ``sparsity`` of all bytes; ``sizes``: bytes of each place;
    ``start``: levels to go on from, such as those of a smaller sparsity.

    Every step skips ``step`` of all bytes more, in the one place where ``error(levels)`` then rises least by
    the byte (a place that is nearly used up takes what is left of it). Raises SparsityError past MOST.
    """
    check_sparsity(sparsity)
    if sparsity > MOST:
        raise SparsityError(f"layers of one block can share a sparsity of at most {MOST}, not {sparsity}")
    levels = {name: (start or {}).get(name, 0.0) for name in sizes}
    total = sum(sizes.values())
    left = sparsity * total - sum(levels[name] * size for name, size in sizes.items())
    now = error(levels) if start else 0.0
    while left > 1e-9 * total:
        best: tuple[float, float, float, str] | None = None
        for name, size in sizes.items():
            skipped = min(step * total, left, (MOST - levels[name]) * size)
            if skipped <= 1e-9 * total:
                continue
            then = error({**levels, name: levels[name] + skipped / size})
            if best is None or (then - now) / skipped < best[0]:
                best = ((then - now) / skipped, then, skipped, name)
        if best is None:
            break
        _, now, skipped, name = best
        levels[name] += skipped / sizes[name]
        left -= skipped
    return levels


def greedy(
    model: PreTrainedModel,
    calibrated: Calibrated,
    sparsity: float,
    windows: Tensor,
    *,
    step: float = STEP,
    start: Mapping[str, float] | None = None,
    progress: Progress = silent,
) -> dict[str, float]:
    """Sparsity of each site by `greedy_levels` within each block, ``sparsity`` of the bytes of every block.

    The error is that of the block's outputs, ``||block(h) - gated(h)||^2``, on the hidden states ``h`` of
    the dense model for ``windows``, token ids ``(n, seqlen)``; all are in memory at once, so a few will do.
    The last quarter of each window's positions counts: the outputs of its first tokens, which attention falls
    back on, may be a thousand times as large as all others, and would decide alone.
    A step runs a block once for each of its sites; ``start``: levels that were found for a smaller
    ``sparsity``, whose steps are not taken again.
    """
    parts = find_parts(model)
    with evaluating(model), torch.no_grad():
        inputs = capture_block_inputs(model, windows, batch=len(windows), parts=parts)
        hidden, found = inputs.hidden, {}
        for index, block in enumerate(parts.blocks):
            progress("allocate", index, len(parts.blocks))
            run = partial(run_block, block, hidden, inputs.kwargs[index])
            dense = run()
            error = partial(_error, model, calibrated, run, dense)
            inside = f"{block.name}."
            sizes = {n: site.bytes for n, site in calibrated.sites.items() if n.startswith(inside)}
            found.update(greedy_levels(sizes, sparsity, error, step, start))
            hidden = dense
        progress("allocate", len(parts.blocks), len(parts.blocks))
    return found


def _error(
    model: PreTrainedModel,
    calibrated: Calibrated,
    run: Callable[[], Tensor],
    dense: Tensor,
    levels: Mapping[str, float],
) -> float:
    """``||run() - dense||^2`` over the last positions ``(n, seqlen, hidden)`` with gates of these levels."""
    first = int((1 - LAST) * dense.shape[1])
    with calibrated.gates(levels).attach(model):
        return float((run() - dense)[:, first:].double().square().sum())
