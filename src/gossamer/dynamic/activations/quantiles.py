"""Quantiles of a stream of numbers that does not fit in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import CalibrationError
from gossamer.sparse.masks import count_pruned

_DROPPED = 15  # low bits of a float32 that are not told apart: 8 of its 23 bits of mantissa stay
_BINS = 1 << (31 - _DROPPED)


class Quantiles:
    """Counts of numbers >= 0 by the upper bits of their float32 form, which sorts as the numbers do.

    A bin is a 2^-8th of a binade wide, so that a quantile is off by at most that share of itself (0.4 %;
    below 2^-126 by at most 2^-134), whatever the distribution and the order. 512 KiB.
    """

    RELATIVE_ERROR = 2.0**-8

    def __init__(self) -> None:
        self.counts = torch.zeros(_BINS, dtype=torch.int64)

    def update(self, values: Tensor) -> None:
        """Takes numbers of any shape; raises CalibrationError where one is negative, NaN or infinite."""
        values = values.detach().float().flatten()
        if values.numel() == 0:
            return
        low, high = values.aminmax()
        if not (low >= 0 and torch.isfinite(high)):
            raise CalibrationError("an activation is NaN or infinite: NaN or infinite weights before it?")
        bins = values.abs().view(torch.int32) >> _DROPPED  # abs: -0.0 is a zero
        self.counts += torch.bincount(bins, minlength=_BINS)

    @property
    def total(self) -> int:
        """How many numbers were taken."""
        return int(self.counts.sum())

    def below(self, share: float) -> float:
        """The least number t such that a ``share`` in [0, 1) of all numbers is at most t, which is the
        ``floor(share * total + 0.5)``-th smallest within RELATIVE_ERROR; 0 where that is none of them.

        Raises SparsityError for another share, CalibrationError where there are no numbers.
        """
        rank = count_pruned(self.total, share)
        if self.total == 0:
            raise CalibrationError("no calibration input reached this layer (an expert never chosen?)")
        if rank == 0:
            return 0.0
        upto = self.counts.cumsum(0)
        found = int(torch.searchsorted(upto, rank))
        inside = int(self.counts[found])
        place = rank - int(upto[found]) + inside  # 1 .. inside, taken as evenly spread over the bin
        offset = max(0, (place << _DROPPED) // inside - 1)
        bits = torch.tensor([(found << _DROPPED) + offset], dtype=torch.int32)
        return float(bits.view(torch.float32).item())
