"""What a method may ask to know of a layer's inputs, accumulated window by window.

A statistic sees each input once, as ``(tokens, in_features)``, and is shared by all layers that read
the same tensor (query, key and value; gate and up).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gossamer.errors import CalibrationError


class Statistic:
    """Base: ``update`` with inputs, ``finish`` once, then read its attributes. ``passes``: how it is
    gathered, ``streaming`` (on the walk) or ``gradient`` (in a pass of its own, before it)."""

    name: ClassVar[str]
    passes: ClassVar[str] = "streaming"
    reached = True

    def __init__(self, features: int) -> None:
        self.features = features
        self.tokens = 0

    def update(self, x: Tensor) -> None:
        """Takes inputs ``x``, float ``(tokens, in_features)``."""
        raise NotImplementedError

    def select(self, inputs: Tensor) -> Statistic:
        """The finished statistic of some inputs alone, bool ``(in_features,)``, True = of these. Raises
        CalibrationError where there is no such thing."""
        raise CalibrationError(f"{self.name} cannot be taken of some inputs alone")

    def finish(self) -> None:
        """Ends accumulation; raises CalibrationError where nothing or nothing finite was seen."""
        if self.tokens == 0:
            raise CalibrationError("no calibration input reached this layer (an expert never chosen?)")

    def forget(self) -> None:
        """Drops what solvers derived from it and keep for layers to come; they derive it again."""

    @classmethod
    def unseen(cls, features: int) -> Statistic:
        """The finished statistic of a layer that no token reached, ``reached`` False: of inputs of size 1
        that have nothing to do with each other, so that its weights alone decide."""
        found = cls(features)
        found.update(torch.eye(features) * features**0.5)
        found.finish()
        found.reached = False
        return found


class InputNorm(Statistic):
    """``norm``: the L2 norm of each input feature over all calibration tokens, float32 ``(in_features,)``."""

    name = "input_norm"

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self._squares = torch.zeros(features, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        self._squares += x.float().square().sum(dim=0).double()
        self.tokens += x.shape[0]

    def select(self, inputs: Tensor) -> InputNorm:
        return _with(self, inputs, norm=self.norm[inputs])

    def finish(self) -> None:
        super().finish()
        self.norm = self._squares.sqrt().float()
        check_inputs_finite(self.norm)


class InputPeak(Statistic):
    """``peak``: the largest ``|x_j|`` of each input feature over all calibration tokens, float32
    ``(in_features,)``."""

    name = "input_peak"

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.peak = torch.zeros(features)

    def update(self, x: Tensor) -> None:
        if len(x):
            self.peak = torch.maximum(self.peak, x.abs().amax(dim=0).float())
        self.tokens += x.shape[0]

    @classmethod
    def unseen(cls, features: int) -> Statistic:
        found = super().unseen(features)
        assert isinstance(found, InputPeak)
        found.peak.zero_()  # none is an outlier
        return found

    def select(self, inputs: Tensor) -> InputPeak:
        return _with(self, inputs, peak=self.peak[inputs])

    def finish(self) -> None:
        super().finish()
        check_inputs_finite(self.peak)


class InputMoments(Statistic):
    """``mean`` and ``variance`` of each input feature over all calibration tokens, float32."""

    name = "input_moments"

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self._sums = torch.zeros(features, dtype=torch.float64)
        self._squares = torch.zeros(features, dtype=torch.float64)

    def update(self, x: Tensor) -> None:
        x = x.double()
        self._sums += x.sum(dim=0)
        self._squares += x.square().sum(dim=0)
        self.tokens += x.shape[0]

    def select(self, inputs: Tensor) -> InputMoments:
        return _with(self, inputs, mean=self.mean[inputs], variance=self.variance[inputs])

    def finish(self) -> None:
        super().finish()
        mean = self._sums / self.tokens
        self.mean = mean.float()
        self.variance = (self._squares / self.tokens - mean.square()).clamp_min(0).float()
        check_inputs_finite(self._squares)


class Gram(Statistic):
    """``matrix``: sum of ``x xᵀ`` over all calibration tokens, float32 ``(in_features, in_features)``."""

    name = "gram"
    STRIP = 384  # columns multiplied at a time: only strips on and above the diagonal are computed

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.matrix = torch.zeros(features, features, dtype=torch.float32)
        self.factors: dict[Any, Any] = {}  # what solvers derive from the matrix, shared by its layers

    @classmethod
    def unseen(cls, features: int) -> Statistic:
        found = cls(features)
        found.matrix, found.tokens = torch.eye(features) * features, features  # no need to multiply it
        found.reached = False
        return found

    def update(self, x: Tensor) -> None:
        # bfloat16 inputs multiply as bfloat16 with float32 sums: exact products, twice the speed
        precision = "medium" if x.dtype == torch.bfloat16 else "highest"
        x = x.float()
        with matmul_precision(precision):
            for start in range(0, self.features, self.STRIP):
                stop = min(start + self.STRIP, self.features)
                self.matrix[start:stop, start:] += x[:, start:stop].T @ x[:, start:]
        self.tokens += x.shape[0]

    def forget(self) -> None:
        self.factors.clear()

    def select(self, inputs: Tensor) -> Gram:
        key = ("select", inputs.numpy().tobytes())
        if key not in self.factors:
            self.factors[key] = _with(self, inputs, matrix=self.matrix[inputs][:, inputs], factors={})
        found: Gram = self.factors[key]
        return found

    def finish(self) -> None:
        super().finish()
        upper = self.matrix.triu()
        self.matrix = upper + upper.triu(1).T
        check_inputs_finite(self.matrix)


def check_inputs_finite(found: Tensor) -> None:
    """Raises CalibrationError unless all that was ``found`` of a layer's inputs is finite."""
    if not torch.isfinite(found).all():
        raise CalibrationError("the layer's inputs are not finite: NaN or infinite weights before it?")


S = TypeVar("S", bound=Statistic)


def _with(statistic: S, inputs: Tensor, **held: Any) -> S:
    """A copy of the statistic for some inputs, which holds what is given in place of its own."""
    made = copy(statistic)
    made.__dict__ |= {"features": int(inputs.sum()), **held}
    return made


@contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    """Sets torch's float32 matmul precision within, and restores it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
