"""Where a curve of quality over sparsity begins to fall fast: the end of essential sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gossamer.claim import Unclaimed
from gossamer.errors import EvaluationError

UNCLAIMED = Unclaimed(
    name="essential sparsity",
    cite="Jaiswal et al. 2023, The Emergence of Essential Sparsity in Large Pre-trained Models",
    figures="Essential sparsity",
    why="It gives a curve and where that breaks (`gossamer.essential_sparsity`), not a figure to hold "
    "against another one.",
)


@dataclass(frozen=True)
class DropPoint:
    """``sparsity`` at which a loss that rises by ``slope_before`` per unit of sparsity begins to rise by
    ``slope_after``."""

    sparsity: float
    slope_before: float
    slope_after: float


def drop_point(curve: Sequence[tuple[float, float]], *, sharp: float = 2.0) -> DropPoint | None:
    """The drop point of a ``curve`` of (sparsity, loss): the break of the best fit by two joined lines.

    Each measured sparsity but the ends is tried as the break, and the fit of least squared error wins. None
    where the line after it is not ``sharp`` times as steep as the one before. Raises EvaluationError for
    fewer than five points, a sparsity measured twice, or values that are not finite.
    Jaiswal et al. 2023, The Emergence of Essential Sparsity in Large Pre-trained Models.
    """
    points = np.array(sorted(curve), dtype=np.float64)
    if len(points) < 5:
        raise EvaluationError(f"a drop point needs a curve of at least five sparsities, got {len(points)}")
    x, y = points.T
    if not np.isfinite(points).all() or (np.diff(x) == 0).any():
        raise EvaluationError("a curve of quality holds values that are not finite, or one sparsity twice")
    fits = []
    for corner in x[1:-1]:
        terms = np.stack([np.ones_like(x), x, np.maximum(x - corner, 0)], axis=1)
        found, *_ = np.linalg.lstsq(terms, y, rcond=None)
        fits.append((float(np.square(terms @ found - y).sum()), float(corner), *map(float, found[1:])))
    _, corner, before, more = min(fits)
    after = before + more
    if after <= 0 or after < sharp * before:
        return None
    return DropPoint(corner, before, after)
