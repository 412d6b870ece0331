"""GPUSQ-ViT: a vision transformer (or any other model) pruned to 2:4, then rounded while it is tuned, both
times drawn to its dense self by three losses at once.

Yu et al. 2023, Boost Vision Transformer with GPU-Friendly Sparsity and Quantization.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.calibrate.modules import Batch, call
from gossamer.claim import Claim, Experiment
from gossamer.errors import CalibrationError, MethodError, ModelError
from gossamer.matrices.values import value_type
from gossamer.nn.listen import listening
from gossamer.nn.modes import evaluating
from gossamer.progress import Progress, silent
from gossamer.recipes.modules import MODULES
from gossamer.recipes.sparsify import sparsify
from gossamer.tune.losses.kl import KL
from gossamer.tune.losses.squarehead import SquareHead
from gossamer.tune.losses.task import Task
from gossamer.tune.modules import ModuleTuning

Labelled = tuple[Batch, Tensor | None]


def logits_of(out: Any) -> Tensor:
    """The tensor that a module gives, of several the one that is called ``logits``, or else the first.
    Raises CalibrationError where there is none."""
    if isinstance(out, Mapping):
        out = out.get("logits", next(iter(out.values()), None))
    elif isinstance(out, (tuple, list)) and out:
        out = out[0]
    if not isinstance(out, Tensor):
        raise CalibrationError(
            f"what is tuned by is a tensor, not a {type(out).__name__}: name it by `logits`"
        )
    return out


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
        """A scalar. ``logits`` ``(..., classes)``, ``labels`` ``(...)``; ``shares``: how much each layer's
        features count; they sum to the number of layers."""
        total = self.soft * KL(self.temperature).of(logits, teacher, logits).mean()
        if labels is not None and self.hard:
            labels = labels.flatten(0, logits.dim() - 2)
            total = total + self.hard * Task().of(logits.flatten(0, -2), None, labels).mean()
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
    batches: Iterable[Labelled | Tensor | Mapping[str, Any]],
    *,
    features: Sequence[str] = (),
    values: str = "int8",
    group: int = 64,
    pattern: str = "2:4",
    method: str = "magnitude",
    epochs: int = 4,
    loss: Mixed | None = None,
    skip: str | Sequence[str] = (),
    logits: Callable[[Any], Tensor] = logits_of,
    seed: int = 0,
    progress: Progress = silent,
) -> Gpusq:
    """Makes ``model`` sparse and its kept weights ``values``, in place.

    First it is pruned to ``pattern`` and tuned for ``epochs`` passes over ``batches``; then tuned as long
    again with rounded weights. A batch is a pair of inputs, as for `sparsify`, and labels or None; a tensor
    or mapping by itself has no labels. Where logits or features have an axis of tokens, those that a
    mapping's ``attention_mask`` ``(batch, seqlen)`` hides do not count.

    ``features``: names of modules whose outputs are drawn to the dense model's, the blocks, say; in the
    second stage each counts in proportion to how far rounding alone moves it (the paper weighs layers by
    importance to quantization; this measure is ours). ``logits`` finds them in what the model gives. Weights
    alone are rounded, not activations.

    Raises a GossamerError as `sparsify` does, ModelError for ``features`` that are not there or not called,
    and CalibrationError for batches of another form, and where a loss is not finite: then the model keeps
    what the finished stages made of it.
    """
    if not value_type(values).is_integer:
        raise MethodError(f"GPUSQ-ViT rounds to integers, not to {values}")
    known = dict(model.named_modules())
    for name in features:
        if name not in known:
            raise ModelError(f"{type(model).__name__} has no module {name!r}")
    pairs = [_labelled(one) for one in ([batches] if isinstance(batches, (Tensor, Mapping)) else batches)]
    if not pairs:
        raise CalibrationError("GPUSQ-ViT tunes on batches, and there are none")
    pair = _Pair(model, copy.deepcopy(model).eval(), tuple(features), loss or Mixed(), logits)
    inputs = [x for x, _ in pairs]
    pair.taught(inputs[0])  # what cannot be read is told before anything is pruned
    found = sparsify(model, inputs, method=method, pattern=pattern, skip=skip, seed=seed)
    losses: dict[str, list[float]] = {}
    total = epochs * len(pairs)
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
            for index in torch.randperm(len(pairs), generator=order).tolist():
                done = epoch * len(pairs) + len(each)
                progress(stage, done, total)
                value = pair.loss(tuning, shares, *pairs[index])
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


@MODULES.register(
    "gpusq",
    cite="Yu et al. 2023, Boost Vision Transformer with GPU-Friendly Sparsity and Quantization (GPUSQ-ViT)",
)
class GpusqVit:
    """Prunes a model to N:M and tunes it, then rounds it while it is tuned, drawn to its dense self by logits
    and features at once."""

    needs = ("batches", "labels where there are any")
    accepts = ("N:M",)
    made_of = ("magnitude", "kl", "squarehead", "task")
    Options: ClassVar[Any] = staticmethod(gpusq)
    claim: ClassVar[Claim | None] = Claim(
        says="Vision transformers lose next to no accuracy at 2:4 and in int8 (DeiT and Swin on ImageNet; "
        "here: a small one on digits, within a hundredth of the dense one's).",
        experiment=Experiment(
            model="digits:vit",
            pattern="2:4",
            sparsity=None,
            values="int8",
            against=("magnitude", "labels"),
            distilled={
                "gpusq": {"epochs": 20},
                "labels": {"epochs": 20, "loss": {"soft": 0.0, "features": 0.0}},
            },
        ),
        metric="accuracy",
        than="dense",
        factor=0.99,
        bound="at_least",
    )


@dataclass(frozen=True)
class _Pair:
    """The model under tuning, and its dense self."""

    model: nn.Module
    teacher: nn.Module
    features: tuple[str, ...]
    mixed: Mixed
    logits: Callable[[Any], Tensor]

    def loss(
        self, tuning: ModuleTuning, shares: Mapping[str, float], x: Batch, labels: Tensor | None
    ) -> Tensor:
        taught, wanted = self.taught(x)
        got, states = self._run(tuning, self.model, x)
        if labels is not None:
            labels = _unpadded(labels, x, classes=labels.is_floating_point())
        return self.mixed.of(got, labels, taught, states, wanted, shares)

    @torch.no_grad()
    def taught(self, x: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits and features of the dense model."""
        return self._run(self.teacher, self.teacher, x)

    @torch.no_grad()
    def shares(self, tuning: ModuleTuning, x: Batch) -> dict[str, float]:
        """How much each layer's features count: in proportion to their relative error after rounding."""
        with evaluating(self.model):  # noise of dropout is no error of rounding
            _, plain = self._run(self.model, self.model, x)
            _, rounded = self._run(tuning, self.model, x)
        errors = {name: float(SquareHead().of([rounded[name]], [plain[name]])) for name in self.features}
        total = sum(errors.values())
        return {name: len(errors) * error / total if total else 1.0 for name, error in errors.items()}

    def _run(self, run: Callable[..., Any], model: nn.Module, x: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits, and features by name, of what ``run`` does with ``model``."""
        with listening({name: model.get_submodule(name) for name in self.features}) as heard:
            got = self.logits(call(run, x))
        for name in self.features:
            if name not in heard:
                raise ModelError(f"{name} gives no features: it is not called when the model runs")
        return _unpadded(got, x), {name: _unpadded(logits_of(state), x) for name, state in heard.items()}


def _labelled(batch: Labelled | Tensor | Mapping[str, Any]) -> Labelled:
    """Raises CalibrationError for what is no batch."""
    if isinstance(batch, (Tensor, Mapping)):
        return batch, None
    if isinstance(batch, (tuple, list)) and len(batch) == 2 and isinstance(batch[1], (Tensor, type(None))):
        return batch[0], batch[1]
    raise CalibrationError(
        "a batch is a pair of inputs and labels (or None), or a tensor or a mapping alone, not a "
        f"{type(batch).__name__}"
    )


def _unpadded(x: Tensor, batch: Batch, classes: bool = True) -> Tensor:
    """Of ``x`` ``(batch, seqlen, ...)`` the tokens that are no padding, in a row; anything else as it is.
    ``classes``: behind the axis of tokens there is another one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or x.dim() < 2 + classes or x.shape[:2] != mask.shape:
        return x
    return x[mask.bool()]
