"""Tuning of any PyTorch model whose weights were pruned: encoders, vision transformers, recurrent nets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.errors import CalibrationError, MethodError, ModelError
from gossamer.matrices import Dense, Sparse
from gossamer.matrices.values import value_type
from gossamer.nn.views import WeightView, weight_views
from gossamer.tune.formats import Format
from gossamer.tune.weights import SHARE, WEIGHTS, TunedWeight, adamw, check_warmup, set_rates


class ModuleTuning:
    """``model`` under tuning: it is called like the model, computes with weights that keep their masks and
    number formats at every step, and puts them into the model at the end.

        found = gs.sparsify(vit, batches, pattern="2:4")
        tuning = ModuleTuning(vit, found.masks, values="int8")
        for fraction, (images, labels) in batches:  # fraction of the whole run that is done
            cross_entropy(tuning(images), labels).backward()
            tuning.step(fraction)
        tuning.merge()

    What was stopped goes on to the bit in a tuning made alike, where both its ``state_dict()`` and that of
    its ``optimizer`` were kept.

    ``masks``: bool ``(out, in)``, True = kept, by the names of weights (`weight_views`), as `sparsify` gives
    them; None: a weight that is tuned without a mask. ``values``: weights see themselves rounded to these (in
    groups of ``group`` inputs a scale), gradients passing straight through. ``method`` with ``options``:
    which weights move, or masks (`WEIGHTS`); ``dense``: the model before it was pruned, which methods that
    search among dense weights take them from. All other parameters are tuned too, as they are, unless
    ``others`` is False. ``share`` of a layer's mean size is the most that a step moves it; it rises over the
    share ``warmup`` of the run and falls to zero by a straight line.

    Raises ModelError for masks of weights that are not there or have another shape, and MethodError for
    ``values`` that are no integers, a method that asks for more than is given, and a ``warmup`` outside
    [0, 1).
    """

    def __init__(
        self,
        model: nn.Module,
        masks: Mapping[str, Tensor | None],
        *,
        values: str | None = None,
        group: int = 64,
        method: str = "full",
        options: Mapping[str, Any] | None = None,
        dense: nn.Module | None = None,
        others: bool = True,
        share: float = SHARE,
        warmup: float = 0.05,
        clip: float = 1.0,
    ) -> None:
        if values is not None and not value_type(values).is_integer:
            raise MethodError(f"weights of a module are rounded to integers, not to {values}")
        check_warmup(warmup)
        self.model, self.share, self.warmup, self.clip = model, share, warmup, clip
        views = {view.name: view for view in weight_views(model)[0]}
        if unknown := masks.keys() - views.keys():
            raise ModelError(f"{type(model).__name__} has no weight {min(unknown)!r} that is a matrix")
        self.views = {name: views[name] for name in masks}
        kind = WEIGHTS[method]

        def begin(view: WeightView, mask: Tensor | None) -> TunedWeight:
            return _begin(view, mask, Format("auto", values, group), kind, options or {})

        self.weights = {name: begin(views[name], mask) for name, mask in masks.items()}
        if kind.brings_back(kind.chosen(options or {})):
            self._fill(method, dense)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._parameters = {name: names[id(view.weight)] for name, view in self.views.items()}
        tuned = set(self._parameters.values())
        # in float32, since a step is below half of what bfloat16 can tell apart
        self.others = {
            name: nn.Parameter(p.detach().float().clone())
            for name, p in model.named_parameters()
            if others and name not in tuned and p.requires_grad and p.is_floating_point()
        }
        self._dtypes = {name: model.get_parameter(name).dtype for name in self.others}
        self.optimizer = self._optimizer()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the model gives with its weights as they stand."""
        given = {
            self._parameters[name]: view.tensor_of(self.weights[name]()).to(view.weight.dtype)
            for name, view in self.views.items()
        }
        given |= {name: value.to(self._dtypes[name]) for name, value in self.others.items()}
        return functional_call(self.model, given, args, kwargs)

    def step(self, fraction: float) -> None:
        """One step with the gradients that backward passes left, ``fraction`` of the run done."""
        set_rates(self.optimizer, self._factor(fraction))
        for weight in self.weights.values():
            weight.before_step(fraction)
        trained = [p for group in self.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(trained, self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for weight in self.weights.values():
            weight.after_step(fraction)

    def masks(self) -> dict[str, Tensor | None]:
        """Those that weights are finished with, by name; a method may have moved them."""
        return {name: weight.final_mask() for name, weight in self.weights.items()}

    def state_dict(self) -> dict[str, Tensor]:
        """Weights as they stand with their masks, other parameters, and buffers of the model, such as running
        means, as tensors by name; the moments are in ``optimizer.state_dict()``."""
        found = {
            f"weights/{name}.{key}": tensor
            for name, weight in self.weights.items()
            for key, tensor in {**weight.state_dict(), **dict(weight.named_buffers())}.items()
        }
        found |= {f"others/{name}": value.detach() for name, value in self.others.items()}
        return found | {f"buffers/{name}": buffer for name, buffer in self.model.named_buffers()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Comes back to what `state_dict` gave; raises CalibrationError where names, shapes or masks
        differ."""
        own = self.state_dict()
        if own.keys() != state.keys() or any(own[name].shape != state[name].shape for name in own):
            raise CalibrationError("this is the state of another tuning: names or shapes differ")
        for name, weight in self.weights.items():
            fixed = weight.mask if "mask" not in weight.state_dict() else None
            if fixed is not None and not torch.equal(fixed, state[f"weights/{name}.mask"]):
                raise CalibrationError(f"this is the state of another tuning: the mask of {name} differs")
        for name, tensor in own.items():
            tensor.copy_(state[name])

    @torch.no_grad()
    def merge(self) -> None:
        """Puts the tuned weights and other parameters into the model."""
        for name, view in self.views.items():
            view.replace(self.weights[name].finished()[0])
        for name, value in self.others.items():
            self.model.get_parameter(name).copy_(value)

    def _fill(self, method: str, dense: nn.Module | None) -> None:
        """Shows a ``method`` that brings back pruned weights what they were."""
        if dense is None:
            raise MethodError(f"{method} searches among dense weights: give the dense model")
        before = {view.name: view for view in weight_views(dense)[0]}
        for name, weight in self.weights.items():
            if name not in before or before[name].shape != self.views[name].shape:
                raise MethodError(f"{method} searches among dense weights, and the dense model has no {name}")
            weight.fill(before[name].matrix().float())

    def _factor(self, fraction: float) -> float:
        fraction = min(max(fraction, 0.0), 1.0)
        return min(fraction / self.warmup if self.warmup else 1.0, (1 - fraction) / (1 - self.warmup))

    def _optimizer(self) -> torch.optim.AdamW:
        groups = [group for weight in self.weights.values() for group in weight.groups(self.share)]
        for other in self.others.values():
            size = float(other.detach().abs().mean()) or 1.0  # biases that begin at zero
            groups.append({"params": [other], "lr": 0.1 * self.share * size})
        return adamw(groups)


def _begin(
    view: WeightView,
    mask: Tensor | None,
    form: Format,
    kind: type[TunedWeight],
    options: Mapping[str, Any],
) -> TunedWeight:
    if mask is not None and tuple(mask.shape) != view.shape:
        raise ModelError(f"{view.name}: a mask {tuple(mask.shape)} for a weight {view.shape}")
    weight = view.matrix()
    matrix = Dense(weight) if mask is None else Sparse(mask, weight)
    return form.begin(matrix, kind, options)
