"""Any PyTorch model made sparse in memory: encoders, vision transformers, convolutions, recurrent nets.

    gs.sparsify(vit, batches, pattern="2:4")

The same methods as for language models. Weights are seen as matrices (`gossamer.nn.views`), and layers are
pruned in the order in which inputs reach them, each on what reaches it through those pruned before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibrate import Gradient, Statistic
from gossamer.calibrate.modules import Batch, Loss, gather_gradients, gather_inputs, waves
from gossamer.errors import CalibrationError, MethodError, ModelError
from gossamer.models.place import takes_matrix
from gossamer.nn import StructuredLinear, replace_module
from gossamer.nn.modes import evaluating
from gossamer.nn.views import WeightView, weight_views
from gossamer.progress import Progress, silent
from gossamer.prune import Combination, Layer, Pruned, check_combination
from gossamer.prune.method import check_finite
from gossamer.recipes.prune_layer import pack_pruned, prune_layer, record_of
from gossamer.sparse.allocate import LayerInfo, allocation
from gossamer.sparse.masks import unit_scores

ALLOCATIONS = ("uniform", "global", "er", "erk")


@dataclass(frozen=True)
class Sparsified:
    """``layers``: a record of each weight; ``masks``: bool ``(out, in)`` by name, True = kept, for tuning
    under them; ``left``: modules with weights that were left as they are, and why."""

    layers: list[dict[str, Any]]
    masks: dict[str, Tensor] = field(repr=False)
    left: dict[str, str]

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights that were pruned."""
        sizes: list[int] = [one["shape"][0] * one["shape"][1] for one in self.layers]
        zeros = sum(s * float(one["sparsity"]) for s, one in zip(sizes, self.layers, strict=True))
        return zeros / sum(sizes)


def sparsify(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    *,
    method: str = "obs",
    pattern: str | None = None,
    sparsity: float | None = None,
    allocation: str = "uniform",
    values: str = "float32",
    group: int = 64,
    skip: str | Sequence[str] = (),
    loss: Loss | None = None,
    pack: bool = False,
    options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Sparsified:
    """Prunes the weights of ``model`` in place: linear layers, convolutions, recurrent layers, attention.

    ``batches``: calibration inputs, each a tensor, a tuple of arguments or a mapping of named ones; they run
    through the model many times, in its evaluation mode. ``method``, ``pattern``, ``sparsity``, ``values``,
    ``group`` and ``options`` as for `compress`; ``allocation``: uniform, global, er or erk. ``skip``: regular
    expressions, found anywhere in a weight's name, of those to leave as they are (a classifier's last layer).
    ``loss``: a scalar of model and batch, for methods that read gradients. ``pack``: linear layers become
    `StructuredLinear`, packed, which run by our kernels; those with a forward of their own do not.

    Nothing is changed where it fails. Raises a GossamerError for whatever a person can mend: no batches,
    values that are not finite, a weight that no input reaches, a pattern that does not fit.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"sparsify takes a PyTorch module, not {model!r}: compress takes models on disk")
    combination = check_combination(
        method,
        pattern=pattern,
        sparsity=sparsity,
        allocation_name=allocation,
        values=values,
        group=group,
        options=dict(options or {}),
    )
    if allocation not in ALLOCATIONS:
        raise MethodError(f"sparsify allocates by one of {', '.join(ALLOCATIONS)}, not {allocation}")
    given: list[Batch] = [batches] if isinstance(batches, Tensor) else list(batches)
    job = _Job(model, given, combination, skip, loss, progress)
    with evaluating(model):
        return job.run(pack)


def _skipped(skip: str | Sequence[str], names: Iterable[str]) -> set[str]:
    """Of ``names`` those that an expression of ``skip`` is found in; raises MethodError for one that is found
    in none, such as a misspelled one."""
    known, found = list(names), set()
    for one in [skip] if isinstance(skip, str) else skip:
        try:
            hits = {name for name in known if re.search(one, name)}
        except re.error as error:
            raise MethodError(f"skip takes regular expressions: {error}") from error
        if not hits:
            raise MethodError(f"skip is in no weight's name: {one!r} (there are: {', '.join(known)})")
        found |= hits
    return found


class _Job:
    def __init__(
        self,
        model: nn.Module,
        batches: list[Batch],
        combination: Combination,
        skip: str | Sequence[str],
        loss: Loss | None,
        progress: Progress,
    ) -> None:
        self.model, self.batches, self.combination = model, batches, combination
        self.loss, self.progress = loss, progress
        found, left = weight_views(model)
        skipped = _skipped(skip, [*(view.name for view in found), *left])
        self.views = [view for view in found if view.name not in skipped]
        self.left = {name: why for name, why in left.items() if name not in skipped}
        self.left |= {view.name: "skipped" for view in found if view.name in skipped}
        if not self.views:
            raise ModelError(
                f"{type(model).__name__} has no weights to prune: all are skipped, or of no known kind"
            )
        for view in self.views:
            check_finite(Layer(view.name, view.matrix()))
        self.streaming = tuple(k for k in combination.method.needs if k.passes == "streaming")
        self.gradients: dict[str, Gradient] = {}
        if combination.method.needs and not batches:
            raise CalibrationError(
                f"the method {combination.method.name} needs calibration batches, and there are none"
            )
        if Gradient in combination.method.needs and loss is None:
            raise CalibrationError(
                f"the method {combination.method.name} reads gradients: give a loss of model and batch"
            )

    def run(self, pack: bool) -> Sparsified:
        before = {view.name: view.weight.detach().clone() for view in self.views}
        try:
            pruned, records = self._prune()
            packed = {
                view.name: self._packed(view, pruned[view.name])
                for view in self.views
                if pack and _is_linear(view)
            }
        except BaseException:
            with torch.no_grad():
                for view in self.views:
                    view.weight.copy_(before[view.name])
            raise
        for name, module in packed.items():
            replace_module(self.model, name, module)
        masks = {name: one.mask for name, one in pruned.items() if one.mask is not None}
        return Sparsified(records, masks, self.left)

    def _prune(self) -> tuple[dict[str, Pruned], list[dict[str, Any]]]:
        if self.loss is not None and Gradient in self.combination.method.needs:
            self.gradients = gather_gradients(self.model, self.views, self.batches, self.loss)
        shares = self._shares()
        ordered = (
            waves(self.model, self.views, self.batches[0]) if self.streaming else [[v] for v in self.views]
        )
        pruned: dict[str, Pruned] = {}
        records: list[dict[str, Any]] = []
        for index, wave in enumerate(ordered):
            self.progress("pruning", index, len(ordered))
            layers = self._layers(wave)
            for view in wave:
                one = prune_layer(layers[view.name], self.combination, shares[view.name])
                pruned[view.name] = one
                records.append(record_of(layers[view.name], one))
            for view in wave:
                view.replace(pruned[view.name].weight)
        self.progress("pruning", len(ordered), len(ordered))
        return pruned, records

    def _layers(self, views: Sequence[WeightView]) -> dict[str, Layer]:
        statistics: dict[str, dict[type[Statistic], Statistic]] = {}
        if self.streaming:
            statistics = gather_inputs(self.model, views, self.batches, self.streaming)
        found = {v.name: Layer(v.name, v.matrix(), dict(statistics.get(v.name, {}))) for v in views}
        for name, layer in found.items():
            if name in self.gradients:
                layer.statistics[Gradient] = self.gradients[name]
        return found

    def _shares(self) -> dict[str, float | None]:
        """Each weight's sparsity."""
        c = self.combination
        infos = [LayerInfo(view.name, view.kernel_shape) for view in self.views]
        if c.allocation == "global" and c.sparsity > 0:
            layers = self._layers(self.views)
            scored = {n: unit_scores(c.method.scores(la), c.pattern).flatten() for n, la in layers.items()}
            infos = [
                LayerInfo(view.name, view.kernel_shape, partial(scored.__getitem__, view.name))
                for view in self.views
            ]
        return allocation(c.allocation)(infos, c.sparsity)

    def _packed(self, view: WeightView, pruned: Pruned) -> StructuredLinear:
        bias = getattr(view.module, "bias", None)
        return StructuredLinear(pack_pruned(pruned, self.combination), bias).train(view.module.training)


def _is_linear(view: WeightView) -> bool:
    return view.parameter == "weight" and takes_matrix(view.module)
