"""Quality of a language model on fixed windows: perplexity, and distance to a reference (dense) model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import EvaluationError
from gossamer.evaluate.bootstrap import (
    Interval,
    bootstrap_mean,
    exp,
    perplexity_interval,
    perplexity_ratio_interval,
)
from gossamer.evaluate.confidence import Bins
from gossamer.evaluate.logits import LogitReader, eval_mode
from gossamer.progress import Progress, silent

CHUNK = 256  # positions whose logits are held at once: 50 MB a model at a vocabulary of 49,152


@dataclass(frozen=True)
class Quality:
    """What was measured on ``windows`` windows of ``seqlen`` tokens, each predicting all of them but those up
    to position ``first``, which are read and not measured.

    ``nll``: mean negative log-likelihood of each window, nats per token. With a reference model also
    ``reference_nll`` (its own), ``kl``: mean KL(reference || model) of each window, nats per token, and
    ``agreement``: the fraction of positions where both models rank the same token first.
    All windows are equally long, so the mean over windows is the mean over tokens. ``calibration_error``, of
    all tokens, and that of the reference: `evaluate.confidence.Bins`.
    """

    seqlen: int
    nll: tuple[float, ...]
    reference_nll: tuple[float, ...] | None = None
    kl: tuple[float, ...] | None = None
    agreement: tuple[float, ...] | None = None
    calibration_error: float | None = None
    reference_calibration_error: float | None = None
    first: int = 0

    @property
    def windows(self) -> int:
        """Number of windows."""
        return len(self.nll)

    @property
    def tokens(self) -> int:
        """Number of predicted tokens."""
        return self.windows * (self.seqlen - 1 - self.first)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per token."""
        return exp(_mean(self.nll))

    @property
    def reference_perplexity(self) -> float | None:
        """The reference model's perplexity on the same windows."""
        return None if self.reference_nll is None else exp(_mean(self.reference_nll))

    @property
    def perplexity_ratio(self) -> float | None:
        """Perplexity over the reference's (1.02 = 2 % worse)."""
        if self.reference_nll is None:
            return None
        return exp(_mean(self.nll) - _mean(self.reference_nll))

    @property
    def mean_kl(self) -> float | None:
        """KL(reference || model), nats per token."""
        return None if self.kl is None else _mean(self.kl)

    @property
    def top1_agreement(self) -> float | None:
        """Fraction of positions where both models rank the same token first."""
        return None if self.agreement is None else _mean(self.agreement)

    def intervals(self, *, confidence: float = 0.95, seed: int = 0) -> dict[str, Interval]:
        """Bootstrap intervals over windows: ``perplexity``, and with a reference ``perplexity_ratio``
        (paired), ``kl`` and ``agreement``. Empty for a single window, which has no spread."""
        if self.windows < 2:
            return {}
        options: dict[str, Any] = {"confidence": confidence, "seed": seed}
        found = {"perplexity": perplexity_interval(self.nll, **options)}
        if self.reference_nll is not None:
            found["perplexity_ratio"] = perplexity_ratio_interval(self.nll, self.reference_nll, **options)
        if self.kl is not None:
            found["kl"] = bootstrap_mean(self.kl, **options).within(0)
        if self.agreement is not None:
            found["agreement"] = bootstrap_mean(self.agreement, **options).within(0, 1)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: the means, their intervals, and the values of each window."""
        return {
            "perplexity": self.perplexity,
            "reference_perplexity": self.reference_perplexity,
            "perplexity_ratio": self.perplexity_ratio,
            "kl": self.mean_kl,
            "agreement": self.top1_agreement,
            "calibration_error": self.calibration_error,
            "reference_calibration_error": self.reference_calibration_error,
            "tokens": self.tokens,
            "windows": self.windows,
            "seqlen": self.seqlen,
            "first": self.first,
            "intervals": {name: interval.to_dict() for name, interval in self.intervals().items()},
            "per_window": {
                "nll": list(self.nll),
                "reference_nll": None if self.reference_nll is None else list(self.reference_nll),
                "kl": None if self.kl is None else list(self.kl),
                "agreement": None if self.agreement is None else list(self.agreement),
            },
        }


def evaluate(
    model: nn.Module,
    windows: Tensor,
    *,
    reference: nn.Module | LogitReader | None = None,
    first: int = 0,
    batch: int = 1,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> Quality:
    """Measure one causal language model on ``windows``; see `compare`."""
    options: dict[str, Any] = {"first": first, "batch": batch, "chunk": chunk, "progress": progress}
    return compare({"the model": model}, windows, reference=reference, **options)["the model"]


def compare(
    models: Mapping[str, nn.Module],
    windows: Tensor,
    *,
    reference: nn.Module | LogitReader | None = None,
    first: int = 0,
    batch: int = 1,
    chunk: int = CHUNK,
    progress: Progress = silent,
) -> dict[str, Quality]:
    """Measure several models on the same windows, the reference once per window for all of them.

    ``windows``: int64 token ids ``(n, seqlen)``, cut without overlap; each window starts anew and predicts
    its tokens 1 .. seqlen - 1, so n * (seqlen - 1) tokens count. ``reference``: the dense model, which may be
    one of ``models``, and is then run once; or its reader, which may remember what it read. ``first``: only
    predictions made from this position on count (those of long contexts, say). ``batch``: windows run
    together (memory). ``chunk``: positions whose logits are held at once (the result does not depend on it,
    beyond the rounding of a matrix product).
    ``progress("evaluate", done, n)`` is called after each batch of windows.

    Logits are taken in the dtype the model gives, log-softmax is in float32, sums in float64.
    Raises EvaluationError for windows that are no ``(n, seqlen >= 2)`` integers or hold tokens outside the
    vocabulary, for NaN or infinite logits, and where a model's vocabulary is not the reference's.
    """
    _check_windows(windows, first, batch, chunk)
    base = LogitReader(reference, "the reference model") if isinstance(reference, nn.Module) else reference
    dense = None if base is None else base.model
    for name, model in models.items():
        _check_vocabulary(name, model, windows, dense)
    n, seqlen = windows.shape
    counted = seqlen - 1 - first
    windows = windows.to(torch.int64)
    readers = {name: LogitReader(model, name) for name, model in models.items()}
    tallies = {name: _Tally() for name in models}
    base_tally = _Tally()
    with ExitStack() as stack:
        for module in {*models.values(), *([] if dense is None else [dense])}:
            stack.enter_context(eval_mode(module))
        for start in range(0, n, batch):
            ids = windows[start : start + batch]
            base_rows = None if base is None else base(ids)
            rows = {name: reader(ids) for name, reader in readers.items() if reader.model is not dense}
            for tally in (base_tally, *tallies.values()):
                tally.open(len(ids))
            for start_at in range(first, seqlen - 1, chunk):
                last = min(start_at + chunk, seqlen - 1)
                targets = ids[:, start_at + 1 : last + 1]
                expected = None
                if base_rows is not None:
                    logp = base_rows(start_at, last).log_softmax(dim=-1)
                    expected = logp, base_tally.add(logp, targets, None)
                for name, tally in tallies.items():
                    if name in rows:
                        tally.add(rows[name](start_at, last).log_softmax(dim=-1), targets, expected)
                    elif expected is not None:
                        tally.add(expected[0], targets, expected)
            progress("evaluate", min(start + batch, n), n)
    reference_nll = None if base is None else base_tally.mean("nll", counted)
    return {
        name: Quality(
            seqlen=seqlen,
            nll=tally.mean("nll", counted),
            reference_nll=reference_nll,
            kl=None if base is None else tally.mean("kl", counted),
            agreement=None if base is None else tally.mean("agreement", counted),
            calibration_error=tally.sure.error,
            reference_calibration_error=None if base is None else base_tally.sure.error,
            first=first,
        )
        for name, tally in tallies.items()
    }


@dataclass
class _Tally:
    """Sums of one model: a float64 total per finished or open window."""

    sums: dict[str, list[float]] = field(default_factory=lambda: {"nll": [], "kl": [], "agreement": []})
    sure: Bins = field(default_factory=Bins)
    opened: int = 0

    def open(self, windows: int) -> None:
        for values in self.sums.values():
            values.extend([0.0] * windows)
        self.opened = windows

    def add(self, logp: Tensor, targets: Tensor, expected: tuple[Tensor, Tensor] | None) -> Tensor:
        """``logp``: float32 log-probabilities ``(windows, positions, vocab)``; ``expected``: those of the
        reference, and its likeliest tokens. Returns the likeliest tokens."""
        self._add("nll", -logp.gather(-1, targets[..., None])[..., 0])
        found = self.sure.add(logp, targets)
        if expected is not None:
            wanted, first = expected
            kl = torch.sub(wanted, logp).mul_(wanted.exp()).sum(dim=-1)
            self._add("kl", kl)
            self._add("agreement", first == found)
        return found

    def _add(self, name: str, values: Tensor) -> None:
        totals = values.to(torch.float64).sum(dim=1).tolist()
        offset = len(self.sums[name]) - self.opened
        for i, total in enumerate(totals):
            self.sums[name][offset + i] += total

    def mean(self, name: str, positions: int) -> tuple[float, ...]:
        return tuple(total / positions for total in self.sums[name])


def _check_vocabulary(name: str, model: nn.Module, windows: Tensor, reference: nn.Module | None) -> None:
    """Refuse tokens outside the vocabulary before any work (models that declare none are trusted)."""
    size = getattr(getattr(model, "config", None), "vocab_size", None)
    if size is not None and int(windows.max()) >= size:
        raise EvaluationError(
            f"the windows hold token {int(windows.max())}, but the vocabulary of {name} ends at {size - 1}: "
            "the text was tokenised for another model"
        )
    other = getattr(getattr(reference, "config", None), "vocab_size", None)
    if size is not None and other is not None and size != other:
        raise EvaluationError(
            f"{name} has a vocabulary of {size} tokens and the reference model one of {other}: "
            "KL and agreement need the same tokens on both sides"
        )


def _check_windows(windows: Tensor, first: int, batch: int, chunk: int) -> None:
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise EvaluationError(
            f"windows must be token ids of shape (n, seqlen >= 2), got {tuple(windows.shape)}"
        )
    if windows.is_floating_point() or windows.dtype == torch.bool:
        raise EvaluationError(f"windows must be integer token ids, got {windows.dtype}")
    if int(windows.min()) < 0:
        raise EvaluationError(f"windows hold the negative token id {int(windows.min())}")
    if not 0 <= first < windows.shape[1] - 1:
        raise EvaluationError(f"windows of {windows.shape[1]} tokens have nothing to measure from {first} on")
    if batch < 1 or chunk < 1:
        raise EvaluationError(f"batch and chunk must be at least 1, got {batch} and {chunk}")


def _mean(values: tuple[float, ...]) -> float:
    return math.fsum(values) / len(values)
