"""Whether a model is as sure as it is right, on clean and on corrupted text."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gossamer.claim import Unclaimed
from gossamer.errors import EvaluationError
from gossamer.evaluate.bootstrap import exp
from gossamer.evaluate.logits import LogitReader, eval_mode

CHUNK = 256  # positions whose logits are held at once
BINS = 15
UNCLAIMED = Unclaimed(
    name="expected calibration error",
    cite="Guo et al. 2017, On Calibration of Modern Neural Networks",
    figures="Dropped activations",
    why="It is a measure, of which nothing is claimed.",
)


class Bins:
    """Tokens by how likely the likeliest one was, in equal bins of that probability."""

    def __init__(self, bins: int = BINS) -> None:
        self.sums = torch.zeros(3, bins, dtype=torch.float64)  # tokens, right ones, probabilities

    def add(self, logp: Tensor, targets: Tensor) -> Tensor:
        """``logp (..., vocab)``: log-probabilities of ``targets (...)``. Returns the likeliest tokens, like
        ``targets``."""
        best, found = logp.max(-1)
        sure, bins = best.exp().double().flatten(), self.sums.shape[1]
        place = (sure * bins).long().clamp(max=bins - 1)
        right = (found == targets).double().flatten()
        self.sums.index_add_(1, place, torch.stack([torch.ones_like(sure), right, sure]))
        return found

    @property
    def accuracy(self) -> float:
        """The share of tokens whose likeliest prediction is right."""
        return float(self.sums[1].sum() / self.sums[0].sum())

    @property
    def error(self) -> float:
        """The expected calibration error: how far a bin's accuracy lies from its mean probability, averaged
        over tokens (Guo et al. 2017, On Calibration of Modern Neural Networks)."""
        return float((self.sums[1] - self.sums[2]).abs().sum() / self.sums[0].sum())


@dataclass(frozen=True)
class Confidence:
    """Of next tokens: ``perplexity``; ``accuracy``, the share where the likeliest one is right;
    ``calibration_error``: how far a bin's accuracy lies from its mean confidence, averaged over tokens."""

    perplexity: float
    accuracy: float
    calibration_error: float


def confidence(
    model: nn.Module, windows: Tensor, *, inputs: Tensor | None = None, bins: int = BINS
) -> Confidence:
    """Measures ``model`` on ``windows``, token ids ``(n, seqlen)``; with ``inputs`` of that shape it reads
    those, and the true tokens are still asked for (robustness: see `corrupted`).

    The error is that of `Bins`. Raises EvaluationError for other shapes, bins below 1, NaN or infinite
    logits.
    """
    inputs = windows if inputs is None else inputs
    if windows.ndim != 2 or windows.shape[1] < 2 or inputs.shape != windows.shape or bins < 1:
        raise EvaluationError(
            f"confidence takes windows (n, seqlen >= 2), inputs of the same shape and at least one bin, got "
            f"{tuple(windows.shape)}, {tuple(inputs.shape)} and {bins}"
        )
    reader, loss, sure = LogitReader(model), 0.0, Bins(bins)
    with eval_mode(model):
        for ids, read in zip(windows, inputs, strict=True):
            rows = reader(read[None])
            for first in range(0, len(ids) - 1, CHUNK):
                last = min(first + CHUNK, len(ids) - 1)
                logp = rows(first, last)[0].log_softmax(-1)
                targets = ids[first + 1 : last + 1]
                loss -= float(logp.gather(1, targets[:, None]).double().sum())
                sure.add(logp, targets)
    tokens = float(sure.sums[0].sum())
    return Confidence(exp(loss / tokens), sure.accuracy, sure.error)


def corrupted(windows: Tensor, share: float, vocabulary: int, seed: int = 0) -> Tensor:
    """``windows`` with a random ``share`` of the tokens replaced by random ones below ``vocabulary``; raises
    EvaluationError unless 0 <= share <= 1."""
    if not 0 <= share <= 1:
        raise EvaluationError(f"the share of corrupted tokens lies in [0, 1], got {share!r}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(windows.shape, generator=generator) < share
    others = torch.randint(vocabulary, windows.shape, generator=generator)
    return torch.where(chosen, others, windows)
