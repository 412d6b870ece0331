"""Streaming statistics: the model is walked block by block, and each layer's inputs are summed up."""

from gossamer.calibrate.statistics import Gram, InputNorm, Statistic, matmul_precision
from gossamer.calibrate.stream import Visit, fast_dtype, walk
from gossamer.calibrate.work import Inputs, WorkFolder

__all__ = [
    "Gram",
    "InputNorm",
    "Inputs",
    "Statistic",
    "Visit",
    "WorkFolder",
    "fast_dtype",
    "matmul_precision",
    "walk",
]
