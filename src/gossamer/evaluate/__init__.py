"""Quality of a model: perplexity, distance to the dense model, layer errors, size; with intervals."""

from gossamer.evaluate.bootstrap import (
    Interval,
    bootstrap_mean,
    exp,
    paired_difference,
    paired_ratio,
    perplexity_interval,
    perplexity_ratio_interval,
)
from gossamer.evaluate.confidence import Confidence, confidence, corrupted
from gossamer.evaluate.layer_error import reconstruction_error
from gossamer.evaluate.quality import Quality, compare, evaluate
from gossamer.evaluate.size import Size, memory_bytes, size_of, size_of_folder, size_of_model

__all__ = [
    "Confidence",
    "Interval",
    "Quality",
    "Size",
    "bootstrap_mean",
    "compare",
    "confidence",
    "corrupted",
    "evaluate",
    "exp",
    "memory_bytes",
    "paired_difference",
    "paired_ratio",
    "perplexity_interval",
    "perplexity_ratio_interval",
    "reconstruction_error",
    "size_of",
    "size_of_folder",
    "size_of_model",
]
