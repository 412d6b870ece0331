"""Statistics of any model in memory: batches run through it, and what weights multiply is summed up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibrate.gradients import Gradient
from gossamer.calibrate.inputs import InputSums, Statistics, by_module, first_input, identity, summed
from gossamer.calibrate.statistics import Statistic
from gossamer.errors import CalibrationError
from gossamer.nn.views import WeightView, positional

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]
Loss = Callable[[nn.Module, Any], Tensor]


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """``model`` on a batch: one argument, several (a tuple or list), or named ones (a mapping). Raises
    CalibrationError where they are not what it takes."""
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except TypeError as error:
        raise CalibrationError(
            "the model is called with all that is in a batch, the items of a tuple or list one by one, those "
            f"of a mapping by their names; leave out what it does not take, such as labels: {error}"
        ) from error


class _StopError(Exception):
    """All that is asked for was seen."""


@dataclass(frozen=True)
class Waves:
    """``order``: views in the order in which inputs reach them, those together that read the same tensor or
    belong to one module. ``calls``: how often a batch calls each module, where every batch does so as often;
    empty where that depends on the batch."""

    order: list[list[WeightView]]
    calls: dict[nn.Module, int]


@torch.no_grad()
def waves(model: nn.Module, views: Sequence[WeightView], batches: Sequence[Batch]) -> Waves:
    """Runs ``batches`` through ``model`` to see how they reach ``views``. Raises CalibrationError for one
    that none of them reaches."""
    found: list[list[WeightView]] = []
    of_tensor: dict[tuple[int, int], tuple[Tensor, list[WeightView]]] = {}
    modules = by_module(views)
    unreached = {view.name: view for view in views}
    calls: Counter[nn.Module] = Counter()

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[module] += 1
        names = dict.fromkeys(view.name for view in modules[module] if view.name in unreached)
        if not names:
            return
        x = first_input(module, args)
        if identity(x) not in of_tensor:
            of_tensor[identity(x)] = x, []  # held, so that no other tensor takes its place in memory
            found.append(of_tensor[identity(x)][1])
        of_tensor[identity(x)][1].extend(unreached.pop(name) for name in names)

    each: list[dict[nn.Module, int]] = []
    with _hooked(modules, see):
        for batch in batches:
            calls.clear()
            call(model, batch)
            of_tensor.clear()
            each.append(dict(calls))
    for name in unreached:
        raise CalibrationError(f"no calibration input reached {name}: name it in `skip`")
    return Waves(found, each[0] if all(one == each[0] for one in each) else {})


@torch.no_grad()
def gather_inputs(
    model: nn.Module,
    views: Sequence[WeightView],
    batches: Sequence[Batch],
    needs: Sequence[type[Statistic]],
    calls: Mapping[nn.Module, int],
) -> dict[str, Statistics]:
    """Statistics ``needs`` of what each of ``views`` multiplies, by name. ``calls``: those of `Waves`; where
    they are known, a batch runs no further than to the last of the views. Those that always read the same
    tensors share theirs; padding (an ``attention_mask`` among a batch's named arguments, `InputSums`) does
    not count."""
    modules = by_module(views)
    wanted = Counter({module: calls.get(module, 0) for module in modules})

    def walked(share: bool) -> dict[str, Statistics]:
        sums = InputSums(views, needs, share=share)
        made: Counter[nn.Module] = Counter()

        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            sums.see(module, args)
            made[module] += 1
            if made == wanted:
                raise _StopError

        with _hooked(modules, see):
            for batch in batches:
                sums.next_batch(batch)
                made.clear()
                try:
                    call(model, batch)
                except _StopError:
                    continue
        return sums.finish()

    return summed(walked)


def gather_gradients(
    model: nn.Module, views: Sequence[WeightView], batches: Sequence[Batch], loss: Loss
) -> dict[str, Gradient]:
    """A `Gradient` of each of ``views`` by name: ``loss(model, batch)`` is a scalar, and a batch counts as a
    window: one sample of the gradient, whose square is that of its mean over what the batch holds. Its
    ``outputs`` are not seen here."""
    sums = {view.name: (torch.zeros(view.shape), torch.zeros(view.shape)) for view in views}
    weights = [view.weight for view in views]
    was = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                told = loss(model, batch)
                if not isinstance(told, Tensor) or told.numel() != 1 or not told.requires_grad:
                    raise CalibrationError(
                        "the loss of a batch is to be one number that gradients can be taken of: a scalar "
                        "tensor, made outside torch.no_grad"
                    )
                grads = torch.autograd.grad(told.sum(), weights, allow_unused=True)
            for view, grad in zip(views, grads, strict=True):
                if grad is not None:
                    found = view.matrix_of(grad).float()
                    sums[view.name][0].add_(found)
                    sums[view.name][1].addcmul_(found, found)
    finally:
        for weight, needed in zip(weights, was, strict=True):
            weight.requires_grad_(needed)
    gradients = {}
    for view in views:
        mean, squares = (part / len(batches) for part in sums[view.name])
        if not torch.isfinite(squares).all():
            raise CalibrationError(f"{view.name}: its gradients are not finite")
        if not squares.any():
            raise CalibrationError(f"{view.name}: the loss does not depend on it: name it in `skip`")
        gradients[view.name] = Gradient(mean, squares)
    return gradients


@contextmanager
def _hooked(
    modules: Mapping[nn.Module, Any], see: Callable[[nn.Module, tuple[Any, ...]], None]
) -> Iterator[None]:
    def heard(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        see(module, positional(module, args, kwargs))

    handles = [module.register_forward_pre_hook(heard, with_kwargs=True) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
