"""Any PyTorch model made sparse in memory: encoders, vision transformers, convolutions, recurrent nets.

    gs.sparsify(vit, batches, pattern="2:4")

The same methods as for language models. Weights are seen as matrices (`gossamer.nn.views`), and layers are
pruned in the order in which inputs reach them, each on what reaches it through those pruned before. Those
inside one module (the layers of an LSTM, both weights of fused attention) are pruned together, on what the
module itself computed before.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibrate import Gradient, gradient_kind
from gossamer.calibrate.modules import Batch, Loss, Waves, gather_gradients, gather_inputs, waves
from gossamer.errors import CalibrationError, MethodError, ModelError
from gossamer.matrices.values import value_types
from gossamer.models.place import takes_matrix
from gossamer.models.walk import is_router
from gossamer.nn import StructuredLinear, replace_module
from gossamer.nn.modes import evaluating
from gossamer.nn.views import WeightView, weight_views
from gossamer.progress import Progress, silent
from gossamer.prune import Combination, Layer, Pruned, check_combination
from gossamer.prune.method import check_finite, pattern_asked
from gossamer.prune.outliers import OutlierColumns, needs_of, outlier_columns
from gossamer.recipes.layer_shares import Needs, allocation_needs, competing_scores, curve, outlier_scores
from gossamer.recipes.prune_layer import mean_sparsity, pack_layer, prune_layer, record_of
from gossamer.sparse.allocate import LayerInfo
from gossamer.sparse.allocate.owl import OWL


@dataclass(frozen=True)
class Sparsified:
    """``layers``: a record of each weight; ``masks``: bool ``(out, in)`` by name, True = kept, for tuning
    under them; ``left``: modules with weights that were left as they are, or have another layer's weight, and
    matrices that are parameters by themselves, each with the reason."""

    layers: list[dict[str, Any]]
    masks: dict[str, Tensor] = field(repr=False)
    left: dict[str, str]

    @property
    def sparsity(self) -> float:
        """The share of zeros among the weights that were pruned."""
        return mean_sparsity(self.layers)


def sparsify(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    *,
    method: str = "obs",
    pattern: str | None = None,
    sparsity: float | None = None,
    allocation: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None,
    values: str = "float32",
    group: int = 64,
    outliers: float | None = None,
    outlier_share: float | None = None,
    skip: str | Sequence[str] = (),
    loss: Loss | None = None,
    pack: bool = False,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    progress: Progress = silent,
) -> Sparsified:
    """Prunes the weights of ``model`` in place: linear layers, convolutions, recurrent layers, attention; not
    the routers of mixtures of experts, nor experts that are fused in one tensor.

    ``batches``: calibration inputs, each a tensor, a tuple or list of arguments or a mapping of named ones;
    they run through the model many times, in its evaluation mode. What a mapping's ``attention_mask``
    ``(batch, seqlen)`` hides is padding, and does not count for layers that read as many rows as it has
    places. Rows are taken to run as the mask's do, one sequence after the other; step after step where a
    layer's input begins with the axes (seqlen, batch), or, both being as long, belongs to one of PyTorch's
    recurrent, attention and transformer layers with ``batch_first=False``. For other layers every row counts.
    Layers that have one weight are pruned once, on what all of them read.

    ``method``, ``pattern``, ``sparsity``, ``allocation``, ``allocation_options``, ``values``, ``group``,
    ``outliers``, ``outlier_share``, ``seed`` and ``options`` as for `compress` (neither pattern nor sparsity:
    ``32:64``); what ``owl`` takes for a block ends at the first number in a weight's name. ``skip``: regular
    expressions, found anywhere in a weight's name, of those to leave as they are (a classifier's last layer).
    ``loss``: a scalar of model and batch, for what reads gradients: some methods, and the allocation
    ``sensitivity``. A batch is one sample of the gradient: of a single one the scores of ``fisher`` rank as
    those of ``taylor`` (they are half of their squares), so give many small ones. ``pack``: linear layers
    become `StructuredLinear`, packed, which run by our kernels; not those with a forward of their own, nor
    whose weights another module reads (`nn.TransformerEncoderLayer`).

    Nothing is changed where it fails. Raises a GossamerError for whatever a person can mend: no batches,
    values that are not finite, a weight that no input reaches, a pattern that does not fit.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"sparsify takes a PyTorch module, not {model!r}: compress takes models on disk")
    if len(value_types(values)) > 1:
        raise MethodError(f"sparsify stores all weights in one format, not in {values}")
    combination = check_combination(
        method,
        pattern=pattern_asked(method, pattern, sparsity),
        sparsity=sparsity,
        allocation_name=allocation,
        allocation_options=allocation_options,
        values=values,
        group=group,
        options=dict(options or {}),
        seed=seed,
    )
    apart = outlier_columns(outliers, outlier_share, combination.values)
    given: list[Batch] = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    job = _Job(model, given, combination, apart, skip, loss, progress)
    if pack and job.views[0].name == "":
        raise ModelError(
            f"a {type(model).__name__} by itself cannot be replaced by a packed layer: put it into a "
            "torch.nn.Sequential"
        )
    with evaluating(model):
        found, packed = job.run(pack)
    for old, new in packed.items():
        for name in [name for name, one in model.named_modules(remove_duplicate=False) if one is old]:
            replace_module(model, name, new.train(old.training))
    return found


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
        outliers: OutlierColumns | None,
        skip: str | Sequence[str],
        loss: Loss | None,
        progress: Progress,
    ) -> None:
        self.model, self.batches, self.combination = model, batches, combination
        self.outliers, self.loss, self.progress = outliers, loss, progress
        found, left = weight_views(model)
        routers = _routers(model)
        found = [view for view in found if view.name not in routers]
        left |= dict.fromkeys(routers, "it chooses experts")
        skipped = _skipped(skip, [*(view.name for view in found), *left])
        self.views = [view for view in found if view.name not in skipped]
        self.left = {name: why for name, why in left.items() if name not in skipped}
        self.left |= {view.name: "skipped" for view in found if view.name in skipped}
        if not self.views:
            why = "; ".join(dict.fromkeys(self.left.values())) or "none is of a known kind"
            raise ModelError(f"{type(model).__name__} has no weights to prune: {why}")
        for view in self.views:
            check_finite(Layer(view.name, view.matrix()))
        self.needs = needs_of(combination.method, outliers)
        self.gradients: dict[str, Gradient] = {}
        self.reached: Waves | None = None
        for asks, needs in (
            (f"the method {combination.method.name}", combination.method.needs),
            ("keeping outliers apart", self.needs),
            (f"the allocation {combination.allocation}", allocation_needs(combination)),
        ):
            if needs and not batches:
                raise CalibrationError(f"{asks} needs calibration batches, and there are none")
            if Gradient in needs and loss is None:
                raise CalibrationError(f"{asks} reads gradients: give a loss of model and batch")

    def run(self, pack: bool) -> tuple[Sparsified, dict[nn.Module, StructuredLinear]]:
        """What was done, and with ``pack`` what is to stand in the place of linear layers."""
        before = {view.name: view.weight.detach().clone() for view in self.views}
        try:
            return self._prune(pack)
        except BaseException:
            with torch.no_grad():
                for view in self.views:
                    view.weight.copy_(before[view.name])
            raise

    def _prune(self, pack: bool) -> tuple[Sparsified, dict[nn.Module, StructuredLinear]]:
        if self.loss is not None and Gradient in (*self.needs, *allocation_needs(self.combination)):
            kind = gradient_kind(self.needs)
            self.gradients = gather_gradients(self.model, self.views, self.batches, self.loss, kind)
        shares = self.combination.split(self._infos(), self.combination.sparsity)
        taken = _read_elsewhere(self.model)
        records: list[dict[str, Any]] = []
        masks: dict[str, Tensor] = {}
        packed: dict[nn.Module, StructuredLinear] = {}
        for wave in self._waves("pruning", self.needs):
            pruned: list[tuple[WeightView, Pruned]] = []
            for view, layer in wave:
                one = prune_layer(layer, self.combination, shares[view.name], self.outliers)
                pruned.append((view, one))
                records.append(record_of(layer, one))
            for view, one in pruned:
                view.replace(one.weight)
                if one.mask is not None:
                    masks[view.name] = one.mask
                if pack and _is_linear(view) and view.module not in taken:
                    packed[view.module] = self._packed(view, one)
        return Sparsified(records, masks, self.left), packed

    def _waves(self, stage: str, needs: Needs) -> Iterator[list[tuple[WeightView, Layer]]]:
        """The layers in the order in which inputs reach them, those together that read the same, with
        statistics ``needs`` of what reaches them then."""
        streaming = tuple(kind for kind in needs if kind.passes == "streaming")
        if streaming and self.reached is None:
            self.reached = waves(self.model, self.views, self.batches)
        calls = self.reached.calls if self.reached else {}
        ordered = self.reached.order if self.reached and streaming else [[view] for view in self.views]
        for index, wave in enumerate(ordered):
            self.progress(stage, index, len(ordered))
            found = gather_inputs(self.model, wave, self.batches, streaming, calls) if streaming else {}
            layers = [Layer(view.name, view.matrix(), dict(found.get(view.name, {}))) for view in wave]
            for layer in layers:
                if layer.name in self.gradients:
                    layer.statistics[Gradient] = self.gradients[layer.name]
            yield list(zip(wave, layers, strict=True))
        self.progress(stage, len(ordered), len(ordered))

    def _infos(self) -> list[LayerInfo]:
        """What the allocation may know of each weight, measured on the dense model."""
        c = self.combination
        infos = {v.name: LayerInfo(v.name, v.kernel_shape, block=_block(v.name)) for v in self.views}
        measures = {"global": self._scored, "owl": self._outlying, "sensitivity": self._curved}
        if c.allocation in measures:
            measures[c.allocation](infos)
        return list(infos.values())

    def _dense(self) -> Iterator[Layer]:
        for wave in self._waves("scoring", allocation_needs(self.combination)):
            yield from (layer for _, layer in wave)

    def _scored(self, infos: dict[str, LayerInfo]) -> None:
        scores = {layer.name: competing_scores(layer, self.combination) for layer in self._dense()}
        for name, info in infos.items():
            infos[name] = replace(info, scores=partial(scores.__getitem__, name))

    def _outlying(self, infos: dict[str, LayerInfo]) -> None:
        blocks: dict[str, list[Tensor]] = {}
        for layer in self._dense():
            blocks.setdefault(infos[layer.name].block, []).append(outlier_scores(layer))
        owl = self.combination.split
        assert isinstance(owl, OWL)
        shares = {block: owl.outlier_share(partial(blocks.__getitem__, block)) for block in blocks}
        for name, info in infos.items():
            infos[name] = replace(info, outliers=shares[info.block])

    def _curved(self, infos: dict[str, LayerInfo]) -> None:
        for layer in self._dense():
            infos[layer.name] = replace(infos[layer.name], curve=tuple(curve(layer, self.combination)))

    def _packed(self, view: WeightView, pruned: Pruned) -> StructuredLinear:
        bias = getattr(view.module, "bias", None)
        return StructuredLinear(pack_layer(pruned, self.combination), bias)


def _block(name: str) -> str:
    """The part of a model that a weight belongs to: its name up to the first number, else the whole name."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", name)
    return found.group() if found else name


def _routers(model: nn.Module) -> list[str]:
    """What chooses experts in a model that has any: elsewhere a ``gate`` is a layer like others."""
    modules = dict(model.named_modules())
    if not any("experts" in name.split(".") for name in modules):
        return []
    return [
        name
        for name, module in modules.items()
        if is_router(name) and any(weight.dim() == 2 for weight in module.parameters(recurse=False))
    ]


def _read_elsewhere(model: nn.Module) -> set[nn.Module]:
    """Layers whose weights are read by the module around them, which could not read a packed one's."""
    readers = [one for one in model.modules() if isinstance(one, nn.TransformerEncoderLayer)]
    return {part for one in readers for part in one.modules()}


def _is_linear(view: WeightView) -> bool:
    return view.parameter == "weight" and takes_matrix(view.module)
