"""Sums of what weights multiply while a model, or a block of it, runs: one piece for all walks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.calibrate.statistics import Statistic
from gossamer.errors import CalibrationError
from gossamer.nn.views import WeightView

Statistics = dict[type[Statistic], Statistic]


class InputSums:
    """Sums up ``needs`` of what each of ``views`` multiplies: `see` is a forward pre-hook of their modules,
    `next_batch` comes before each forward pass, `finish` once.

    Views that read the same tensor alike share their statistics; one that once differs is an error. Modules
    that are ``spare``, such as experts, may be reached by no input: their statistics are then those of inputs
    that are all alike (`Statistic.unseen`).
    """

    def __init__(
        self,
        views: Sequence[WeightView],
        needs: Sequence[type[Statistic]],
        spare: Collection[nn.Module] = (),
    ) -> None:
        self.views, self.needs, self.spare = views, needs, spare
        self.by_module = by_module(views)
        self._found: dict[str, Statistics] = {}
        self._leaders: dict[str, str] = {}
        # this pass: tensor, and how it is read -> the view that summed it up
        self._seen: dict[tuple[Any, ...], tuple[Tensor, str]] = {}

    def next_batch(self) -> None:
        self._seen.clear()

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = first_input(module, args)
        for view in self.by_module[module]:
            name = view.name
            first = self._seen.setdefault((id(x), *view.reads), (x, name))[1]
            if name not in self._leaders:
                self._leaders[name] = first
                if first == name:
                    self._found[name] = {kind: kind(view.shape[1]) for kind in self.needs}
                else:
                    self._found[name] = self._found[first]
            elif self._leaders[name] != first:
                raise CalibrationError(
                    f"{name} reads the input of {first}, and before read that of {self._leaders[name]}: "
                    "what changes its wiring between windows cannot be calibrated"
                )
            if first == name:
                try:
                    rows = view.inputs(module, args)
                except CalibrationError as error:
                    raise CalibrationError(f"{name}: {error}") from error
                for statistic in self._found[name].values():
                    statistic.update(rows)

    def finish(self) -> dict[str, Statistics]:
        """Statistics by the names of views; raises CalibrationError for a view that no input reached, or
        whose inputs are not finite."""
        for view in self.views:
            if view.name not in self._found and view.module not in self.spare:
                raise CalibrationError(f"no calibration input reached {view.name}")
        for name, statistics in self._found.items():
            if self._leaders[name] != name:
                continue
            for statistic in statistics.values():
                try:
                    statistic.finish()
                except CalibrationError as error:
                    raise CalibrationError(f"{name}: {error}") from error
        for view in self.views:
            if view.name not in self._found:
                self._found[view.name] = {kind: kind.unseen(view.shape[1]) for kind in self.needs}
        return self._found


def by_module(views: Sequence[WeightView]) -> dict[nn.Module, list[WeightView]]:
    """Views by the modules that hold their weights."""
    found: dict[nn.Module, list[WeightView]] = {}
    for view in views:
        found.setdefault(view.module, []).append(view)
    return found


def first_input(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """What a module reads; raises CalibrationError where it is no plain tensor."""
    if not args or not isinstance(args[0], Tensor):
        if isinstance(module, nn.RNNBase):
            raise CalibrationError("a recurrent layer is calibrated on plain tensors, not packed sequences")
        raise CalibrationError(f"a {type(module).__name__} was called without its input as first argument")
    x: Tensor = args[0]
    return x
