"""GPUSQ-ViT: a vision transformer (or any other model) pruned to 2:4, then rounded while it is tuned, both
times drawn to its dense self by three losses at once.

Yu et al. 2023, Boost Vision Transformer with GPU-Friendly Sparsity and Quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from gossamer.errors import CalibrationError, ModelError
from gossamer.progress import Progress, silent
from gossamer.recipes.sparsify import sparsify
from gossamer.tune.modules import ModuleTuning

Labelled = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Mixed:
    """The mixed-strategy distillation: ``hard`` · cross-entropy of the labels (where there are any) +
    ``soft`` · T² KL(teacher || student) of logits softened by ``temperature`` + ``features`` · Σ over layers
    of mse / mean square of the teacher's."""

    hard: float = 1.0
    soft: float = 10.0
    features: float = 5.0
    temperature: float = 1.0

    def of(
        self,
        logits: Tensor,
        labels: Tensor | None,
        teacher: Tensor,
        states: Mapping[str, Tensor],
        wanted: Mapping[str, Tensor],
        shares: Mapping[str, float],
    ) -> Tensor:
        """A scalar. ``shares``: how much each layer's features count; they sum to the number of layers."""
        t = self.temperature
        soft = kl_div(
            (logits / t).log_softmax(-1), (teacher / t).log_softmax(-1), reduction="none", log_target=True
        )
        total = self.soft * t**2 * soft.sum(-1).mean()
        if labels is not None and self.hard:
            total = total + self.hard * cross_entropy(logits, labels)
        for name, share in shares.items():
            error = (states[name] - wanted[name]).square().mean() / wanted[name].square().mean()
            total = total + self.features * share * error / len(shares)
        return total


@dataclass(frozen=True)
class Gpusq:
    """``masks`` by weight, as `sparsify` gives them; ``losses``: the mean loss of each epoch of both stages;
    ``shares``: how much each layer's features counted in the second."""

    masks: dict[str, Tensor] = field(repr=False)
    losses: dict[str, list[float]]
    shares: dict[str, float]


def gpusq(
    model: nn.Module,
    batches: Sequence[Labelled],
    *,
    features: Sequence[str] = (),
    values: str = "int8",
    group: int = 64,
    pattern: str = "2:4",
    method: str = "magnitude",
    epochs: int = 4,
    loss: Mixed | None = None,
    skip: str | Sequence[str] = (),
    logits: Callable[[Any], Tensor] = lambda out: out,
    seed: int = 0,
    progress: Progress = silent,
) -> Gpusq:
    """Makes ``model`` sparse and its kept weights ``values``, in place.

    First it is pruned to ``pattern`` and tuned for ``epochs`` passes over ``batches`` (inputs, and labels or
    None); then tuned as long again with rounded weights. ``features``: names of modules whose outputs are
    drawn to the dense model's, the blocks, say; in the second stage each counts in proportion to how far
    rounding alone moves it (the paper weighs layers by importance to quantization; this measure is ours).
    ``logits`` finds them in what the model gives. Weights alone are rounded, not activations.

    Raises a GossamerError as `sparsify` does, ModelError for ``features`` that are not there, and
    CalibrationError where a loss is not finite: then the model keeps what the finished stages made of it.
    """
    known = dict(model.named_modules())
    for name in features:
        if name not in known:
            raise ModelError(f"{type(model).__name__} has no module {name!r}")
    if not batches:
        raise CalibrationError("GPUSQ-ViT tunes on batches, and there are none")
    mixed, teacher = loss or Mixed(), copy.deepcopy(model).eval()
    inputs = [x for x, _ in batches]
    found = sparsify(model, inputs, method=method, pattern=pattern, skip=skip)
    losses = {}
    shares = dict.fromkeys(features, 1.0)
    for stage, rounded in (("sparse", None), ("quantized", values)):
        tuning = ModuleTuning(model, found.masks, values=rounded, group=group)
        if rounded is not None:
            shares = _shares(model, tuning, features, inputs[0])
        losses[stage] = _train(
            model, tuning, teacher, batches, shares, mixed, logits, epochs, seed, stage, progress
        )
        tuning.merge()
    return Gpusq(found.masks, losses, shares)


def _train(
    model: nn.Module,
    tuning: ModuleTuning,
    teacher: nn.Module,
    batches: Sequence[Labelled],
    shares: Mapping[str, float],
    mixed: Mixed,
    logits: Callable[[Any], Tensor],
    epochs: int,
    seed: int,
    stage: str,
    progress: Progress,
) -> list[float]:
    order = torch.Generator().manual_seed(seed)
    total, done, means = epochs * len(batches), 0, []
    for _ in range(epochs):
        losses = []
        for index in torch.randperm(len(batches), generator=order).tolist():
            x, labels = batches[index]
            progress(stage, done, total)
            with torch.no_grad(), _heard(teacher, shares) as wanted:
                taught = logits(teacher(x))
            with _heard(model, shares) as states:
                value = mixed.of(logits(tuning(x)), labels, taught, states, wanted, shares)
            if not bool(value.isfinite()):
                raise CalibrationError(f"the loss is not finite at step {done} of the stage {stage}")
            value.backward()  # type: ignore[no-untyped-call]
            tuning.step(done / total)
            losses.append(float(value.detach()))
            done += 1
        means.append(sum(losses) / len(losses))
    progress(stage, total, total)
    return means


@torch.no_grad()
def _shares(model: nn.Module, tuning: ModuleTuning, features: Sequence[str], x: Tensor) -> dict[str, float]:
    """How much each layer's features count: in proportion to their relative error after rounding."""
    with _heard(model, features) as plain:
        model(x)
    with _heard(model, features) as rounded:
        tuning(x)
    errors = {n: float((rounded[n] - plain[n]).square().mean() / plain[n].square().mean()) for n in features}
    total = sum(errors.values())
    return {n: len(errors) * error / total if total else 1.0 for n, error in errors.items()}


@contextmanager
def _heard(model: nn.Module, names: Mapping[str, float] | Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What the modules ``names`` give while the context lasts."""
    heard: dict[str, Tensor] = {}

    def hear(name: str) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            heard[name] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [model.get_submodule(name).register_forward_hook(hear(name)) for name in names]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
