"""Statistics of any model in memory: batches run through it, and what weights multiply is summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibrate.gradients import Gradient
from gossamer.calibrate.inputs import InputSums, Statistics, by_module, first_input
from gossamer.calibrate.statistics import Statistic
from gossamer.errors import CalibrationError
from gossamer.nn.views import WeightView, positional

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
Loss = Callable[[nn.Module, Any], Tensor]


def call(model: nn.Module, batch: Batch) -> Any:
    """``model`` on a batch: one argument, several (a tuple), or named ones (a mapping)."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple) else model(batch)


class _StopError(Exception):
    """All that is asked for was seen."""


@torch.no_grad()
def waves(model: nn.Module, views: Sequence[WeightView], batch: Batch) -> list[list[WeightView]]:
    """``views`` in the order in which ``batch`` reaches them, those together that read the same tensor or
    belong to one module. Raises CalibrationError for one that is not reached."""
    found: list[list[WeightView]] = []
    of_tensor: dict[int, tuple[Tensor, list[WeightView]]] = {}
    modules = by_module(views)
    reached: set[nn.Module] = set()

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in reached:
            return
        reached.add(module)
        x = first_input(module, args)
        if id(x) not in of_tensor:
            of_tensor[id(x)] = x, []  # held, so that no other tensor takes its place in memory
            found.append(of_tensor[id(x)][1])
        of_tensor[id(x)][1].extend(modules[module])

    with _hooked(modules, see):
        call(model, batch)
    for module, its in modules.items():
        if module not in reached:
            raise CalibrationError(f"no calibration input reached {its[0].name}: name it in `skip`")
    return found


@torch.no_grad()
def gather_inputs(
    model: nn.Module, views: Sequence[WeightView], batches: Sequence[Batch], needs: Sequence[type[Statistic]]
) -> dict[str, Statistics]:
    """Statistics ``needs`` of what each of ``views`` multiplies, by name; a batch runs no further than to the
    last of them. Those that read the same tensor share theirs."""
    sums = InputSums(views, needs)
    calls: dict[nn.Module, int] = {}
    usual: dict[nn.Module, int] = {}  # calls in a batch, where the model was run to its end

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        sums.see(module, args)
        calls[module] = calls.get(module, 0) + 1
        if usual and calls == usual:
            raise _StopError

    with _hooked(sums.by_module, see):
        for batch in batches:
            sums.next_batch()
            calls.clear()
            try:
                call(model, batch)
            except _StopError:
                continue
            if not usual:
                usual.update(calls)
    return sums.finish()


def gather_gradients(
    model: nn.Module, views: Sequence[WeightView], batches: Sequence[Batch], loss: Loss
) -> dict[str, Gradient]:
    """A `Gradient` of each of ``views`` by name: ``loss(model, batch)`` is a scalar, and a batch counts as a
    window. Its ``outputs`` are not seen here."""
    sums = {view.name: (torch.zeros(view.shape), torch.zeros(view.shape)) for view in views}
    weights = [view.weight for view in views]
    was = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        for batch in batches:
            with torch.enable_grad():
                grads = torch.autograd.grad(loss(model, batch), weights, allow_unused=True)
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
