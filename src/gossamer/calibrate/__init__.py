"""Streaming statistics: the model is walked block by block, and each layer's inputs are summed up."""

from gossamer.calibrate.gradients import Gradient, SignedGradient, gather, gradient_file, gradient_kind
from gossamer.calibrate.statistics import (
    Gram,
    InputMoments,
    InputNorm,
    InputPeak,
    Statistic,
    matmul_precision,
)
from gossamer.calibrate.stream import Visit, fast_dtype, walk
from gossamer.calibrate.work import Inputs, WorkFolder

__all__ = [
    "Gradient",
    "Gram",
    "InputMoments",
    "InputNorm",
    "InputPeak",
    "Inputs",
    "SignedGradient",
    "Statistic",
    "Visit",
    "WorkFolder",
    "fast_dtype",
    "gather",
    "gradient_file",
    "gradient_kind",
    "matmul_precision",
    "walk",
]
