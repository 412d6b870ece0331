"""Statistics of any model in memory: batches run through it, and what weights multiply is summed up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.calibrate.gradients import Gradient
from gossamer.calibrate.statistics import Statistic
from gossamer.errors import CalibrationError
from gossamer.nn.views import WeightView

Batch = Tensor | tuple[Any, ...] | Mapping[str, Any]
Loss = Callable[[nn.Module, Any], Tensor]
Statistics = dict[type[Statistic], Statistic]


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
    by_module = _by_module(views)
    reached: set[nn.Module] = set()

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        if module in reached:
            return
        reached.add(module)
        x = _first(module, args)
        if id(x) not in of_tensor:
            of_tensor[id(x)] = x, []  # held, so that no other tensor takes its place in memory
            found.append(of_tensor[id(x)][1])
        of_tensor[id(x)][1].extend(by_module[module])

    with _hooked(by_module, see):
        call(model, batch)
    for module, its in by_module.items():
        if module not in reached:
            raise CalibrationError(f"no calibration input reached {its[0].name}: name it in `skip`")
    return found


@torch.no_grad()
def gather_inputs(
    model: nn.Module, views: Sequence[WeightView], batches: Sequence[Batch], needs: Sequence[type[Statistic]]
) -> dict[str, Statistics]:
    """Statistics ``needs`` of what each of ``views`` multiplies, by name; a batch runs no further than to the
    last of them. Those that read the same tensor share theirs."""
    by_module = _by_module(views)
    found: dict[str, Statistics] = {}
    leaders: dict[str, str] = {}
    seen: dict[tuple[Any, ...], tuple[Tensor, str]] = {}
    calls: dict[nn.Module, int] = {}
    usual: dict[nn.Module, int] = {}  # calls in a batch, where the model was run to its end

    def see(module: nn.Module, args: tuple[Any, ...]) -> None:
        x = _first(module, args)
        for view in by_module[module]:
            first = seen.setdefault((id(x), *view.reads), (x, view.name))[1]
            if view.name not in found:
                leaders[view.name] = first
                fresh = {kind: kind(view.shape[1]) for kind in needs}
                found[view.name] = fresh if first == view.name else found[first]
            elif leaders[view.name] != first:
                raise CalibrationError(
                    f"{view.name} reads the input of {first}, and before read that of {leaders[view.name]}: "
                    "a model that changes its wiring between batches cannot be calibrated"
                )
            if first == view.name:
                rows = view.inputs(module, args)
                for statistic in found[view.name].values():
                    statistic.update(rows)
        calls[module] = calls.get(module, 0) + 1
        if usual and calls == usual:
            raise _StopError

    with _hooked(by_module, see):
        for batch in batches:
            seen.clear()
            calls.clear()
            try:
                call(model, batch)
            except _StopError:
                continue
            if not usual:
                usual.update(calls)
    _finish(found)
    return found


def _finish(found: Mapping[str, Statistics]) -> None:
    finished: set[int] = set()
    for name, statistics in found.items():
        for statistic in statistics.values():
            if id(statistic) in finished:
                continue
            finished.add(id(statistic))
            try:
                statistic.finish()
            except CalibrationError as error:
                raise CalibrationError(f"{name}: {error}") from error


def gather_gradients(
    model: nn.Module, views: Sequence[WeightView], batches: Sequence[Batch], loss: Loss
) -> dict[str, Gradient]:
    """A `Gradient` of each of ``views`` by name: ``loss(model, batch)`` is a scalar, and a batch counts as a
    window. Its ``outputs`` are not known here (NaN)."""
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
        gradients[view.name] = Gradient(mean, squares, torch.full((view.shape[0],), torch.nan))
    return gradients


def _by_module(views: Sequence[WeightView]) -> dict[nn.Module, list[WeightView]]:
    found: dict[nn.Module, list[WeightView]] = {}
    for view in views:
        found.setdefault(view.module, []).append(view)
    return found


def _first(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    if not args or not isinstance(args[0], Tensor):
        if isinstance(module, nn.RNNBase):
            raise CalibrationError("a recurrent layer is calibrated on plain tensors, not packed sequences")
        raise CalibrationError(f"a {type(module).__name__} was called without its input as first argument")
    x: Tensor = args[0]
    return x


@contextmanager
def _hooked(
    modules: Mapping[nn.Module, Any], see: Callable[[nn.Module, tuple[Any, ...]], None]
) -> Iterator[None]:
    handles = [module.register_forward_pre_hook(see) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
