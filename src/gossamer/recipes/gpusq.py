"""GPUSQ-ViT: a vision transformer (or any other model) pruned to 2:4, then rounded while it is tuned, both
times drawn to its dense self by three losses at once.

Yu et al. 2023, Boost Vision Transformer with GPU-Friendly Sparsity and Quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.claim import Unclaimed
from gossamer.errors import CalibrationError, MethodError, ModelError
from gossamer.matrices.values import value_type
from gossamer.nn.listen import listening
from gossamer.nn.modes import evaluating
from gossamer.progress import Progress, silent
from gossamer.recipes.sparsify import sparsify
from gossamer.tune.losses.kl import KL
from gossamer.tune.losses.squarehead import SquareHead
from gossamer.tune.losses.task import Task
from gossamer.tune.modules import ModuleTuning

Labelled = tuple[Tensor, Tensor | None]
UNCLAIMED = Unclaimed(
    name="GPUSQ-ViT",
    cite="Yu et al. 2023, Boost Vision Transformer with GPU-Friendly Sparsity and Quantization",
    figures="Tuning what is kept",
    why="It is of vision transformers, and claims run on a language model: `python -m benchmarks.gpusq` "
    "trains one and runs it.",
)


@dataclass(frozen=True)
class Mixed:
    """The mixed-strategy distillation: ``hard`` · cross-entropy of the labels (where there are any) +
    ``soft`` · T² KL(teacher || student) of logits softened by ``temperature`` + ``features`` · the mean
    over layers of mse / mean square of the teacher's."""

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
        total = self.soft * KL(self.temperature).of(logits, teacher, logits).mean()
        if labels is not None and self.hard:
            total = total + self.hard * Task().of(logits, None, labels).mean()
        for name, share in shares.items():
            error = SquareHead().of([states[name]], [wanted[name]])
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
    if not value_type(values).is_integer:
        raise MethodError(f"GPUSQ-ViT rounds to integers, not to {values}")
    known = dict(model.named_modules())
    for name in features:
        if name not in known:
            raise ModelError(f"{type(model).__name__} has no module {name!r}")
    if not batches:
        raise CalibrationError("GPUSQ-ViT tunes on batches, and there are none")
    pair = _Pair(model, copy.deepcopy(model).eval(), tuple(features), loss or Mixed(), logits)
    inputs = [x for x, _ in batches]
    found = sparsify(model, inputs, method=method, pattern=pattern, skip=skip, seed=seed)
    losses: dict[str, list[float]] = {}
    total = epochs * len(batches)
    shares = dict.fromkeys(features, 1.0)
    for stage, rounded in (("sparse", None), ("quantized", values)):
        before = copy.deepcopy(model.state_dict())
        tuning = ModuleTuning(model, found.masks, values=rounded, group=group)
        if rounded is not None:
            shares = pair.shares(tuning, inputs[0])
        order = torch.Generator().manual_seed(seed)
        losses[stage] = []
        for epoch in range(epochs):
            each: list[float] = []
            for index in torch.randperm(len(batches), generator=order).tolist():
                done = epoch * len(batches) + len(each)
                progress(stage, done, total)
                value = pair.loss(tuning, shares, *batches[index])
                if not bool(value.isfinite()):
                    model.load_state_dict(before)
                    raise CalibrationError(f"the loss is not finite at step {done} of the stage {stage}")
                value.backward()  # type: ignore[no-untyped-call]
                tuning.step((done + 0.5) / total)
                each.append(float(value.detach()))
            losses[stage].append(sum(each) / len(each))
        progress(stage, total, total)
        tuning.merge()
    return Gpusq(found.masks, losses, shares)


@dataclass(frozen=True)
class _Pair:
    """The model under tuning, and its dense self."""

    model: nn.Module
    teacher: nn.Module
    features: tuple[str, ...]
    mixed: Mixed
    logits: Callable[[Any], Tensor]

    def loss(
        self, tuning: ModuleTuning, shares: Mapping[str, float], x: Tensor, labels: Tensor | None
    ) -> Tensor:
        with torch.no_grad(), self._listening(self.teacher) as wanted:
            taught = self.logits(self.teacher(x))
        with self._listening(self.model) as states:
            got = self.logits(tuning(x))
        return self.mixed.of(got, labels, taught, states, wanted, shares)

    @torch.no_grad()
    def shares(self, tuning: ModuleTuning, x: Tensor) -> dict[str, float]:
        """How much each layer's features count: in proportion to their relative error after rounding."""
        with evaluating(self.model):  # noise of dropout is no error of rounding
            with self._listening(self.model) as plain:
                self.model(x)
            with self._listening(self.model) as rounded:
                tuning(x)
        errors = {name: float(SquareHead().of([rounded[name]], [plain[name]])) for name in self.features}
        total = sum(errors.values())
        return {name: len(errors) * error / total if total else 1.0 for name, error in errors.items()}

    def _listening(self, model: nn.Module) -> AbstractContextManager[dict[str, Tensor]]:
        return listening({name: model.get_submodule(name) for name in self.features})
