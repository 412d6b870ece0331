"""What can go wrong, by name: every error says what was wrong, where, and what to do."""

from __future__ import annotations


class GossamerError(Exception):
    """Base of all errors that a user can mend; the command line prints its text and exits with 2."""


class PatternError(GossamerError):
    """A pattern cannot be parsed, or cannot apply to a weight of this shape."""


class SparsityError(GossamerError):
    """A sparsity lies outside [0, 1), or disagrees with the pattern."""


class ScoreError(GossamerError):
    """Scores hold NaN, or do not have the weight's shape."""


class MethodError(GossamerError):
    """A method is unknown, or does not accept the combination asked for."""


class MatrixError(GossamerError):
    """A structured matrix or packed weight has a wrong shape, layout or value type."""


class KernelError(GossamerError):
    """A kernel was asked for what it cannot do, or an unknown instruction set was forced."""


class ModelError(GossamerError):
    """A model cannot be found, loaded or walked."""


class SamplingError(GossamerError):
    """A setting of how tokens are chosen, or where an answer stops, is out of its range."""


class TextError(GossamerError):
    """A text is empty, unreadable, or shorter than one window."""


class CalibrationError(GossamerError):
    """Statistics are missing, not finite, or the solver could not use them."""


class ResumeError(GossamerError):
    """A work folder belongs to another run, or is damaged."""


class CheckpointError(GossamerError):
    """A checkpoint is missing, damaged, or of a newer schema; the text names the tensor or file."""


class OutputError(GossamerError):
    """The output folder exists, or cannot be written (disk full, no permission)."""


class RecipeError(GossamerError):
    """A recipe is missing, no YAML, or lacks what it needs to be applied."""


class EvaluationError(GossamerError):
    """A model cannot be measured: its logits are not finite, or shapes and vocabularies disagree."""
