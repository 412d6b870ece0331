"""Sums of what weights multiply while a model, or a block of it, runs: one piece for all walks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.calibrate.statistics import Statistic
from gossamer.errors import CalibrationError
from gossamer.nn.views import WeightView

Statistics = dict[type[Statistic], Statistic]


class DivergedError(Exception):
    """Views that read the same at first do not do so always: a module is called twice, or not by every
    batch."""


def summed(walk: Callable[[bool], dict[str, Statistics]]) -> dict[str, Statistics]:
    """What ``walk`` sums up, views sharing what they read in common where they always do."""
    try:
        return walk(True)
    except DivergedError:
        return walk(False)


def identity(x: Tensor) -> tuple[int, int]:
    """Tells a tensor that is held from others, and from what it was before it was changed in place."""
    return id(x), 0 if x.is_inference() else x._version


class InputSums:
    """Sums up ``needs`` of what each of ``views`` multiplies: `see` is a forward pre-hook of their modules,
    `next_batch` comes before each forward pass, `finish` once.

    Views that read the same tensors alike share their statistics; where they once differ, DivergedError asks
    for the walk to be done anew with ``share`` False, each for itself (`summed`). Modules that are ``spare``,
    such as experts, may be reached by no input: their statistics are then those of inputs that are all alike
    (`Statistic.unseen`).
    """

    def __init__(
        self,
        views: Sequence[WeightView],
        needs: Sequence[type[Statistic]],
        spare: Collection[nn.Module] = (),
        share: bool = True,
    ) -> None:
        self.views, self.needs, self.spare, self.share = views, needs, spare, share
        self.by_module = by_module(views)
        self._found: dict[str, Statistics] = {}
        self._leaders: dict[str, str] = {}
        # this pass: what each view read, and tensor and way of reading -> the view that summed it up
        self._read: dict[str, list[tuple[Any, ...]]] = {}
        self._seen: dict[tuple[Any, ...], tuple[Tensor, str]] = {}
        self._real: Tensor | None = None

    def next_batch(self, batch: Any = None) -> None:
        """Ends a pass; ``batch`` is what the next one is called with: tokens that its ``attention_mask``
        ``(windows, seqlen)`` hides are padding, and do not count where a module reads one row for each of
        the mask's places (`_real_rows`)."""
        for view in self.views:
            leader = self._leaders.get(view.name, view.name)
            if self._read.get(view.name) != self._read.get(leader):
                raise DivergedError
        self._seen.clear()
        self._read.clear()
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        self._real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None

    def see(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = first_input(module, args)
        for view in self.by_module[module]:
            name, key = view.name, (*identity(x), view.sequence_first, *view.reads)
            if not self.share:
                key = (name, *key)
            first = self._seen.setdefault(key, (x, self._leaders.get(name, name)))[1]
            self._read.setdefault(name, []).append(key)
            if name not in self._leaders:
                self._leaders[name] = first
                if first == name:
                    self._found[name] = {kind: kind(view.shape[1]) for kind in self.needs}
                else:
                    self._found[name] = self._found[first]
            elif self._leaders[name] != first:
                raise DivergedError
            if first == name:
                try:
                    rows = view.inputs(module, args)
                except CalibrationError as error:
                    raise CalibrationError(f"{name}: {error}") from error
                if self._real is not None and len(rows) == self._real.numel():
                    rows = rows[_real_rows(self._real, x, view.sequence_first)]
                for statistic in self._found[name].values():
                    statistic.update(rows)

    def finish(self) -> dict[str, Statistics]:
        """Statistics by the names of views; raises CalibrationError for a view that no input reached, or
        whose inputs are not finite."""
        self.next_batch()
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
        unseen: dict[int, Statistics] = {}
        for view in self.views:
            if view.name not in self._found:
                width = view.shape[1]
                if width not in unseen:
                    unseen[width] = {kind: kind.unseen(width) for kind in self.needs}
                self._found[view.name] = unseen[width]
        return self._found


def by_module(views: Sequence[WeightView]) -> dict[nn.Module, list[WeightView]]:
    """Views by the modules that hold their weights, those of tied modules among them."""
    found: dict[nn.Module, list[WeightView]] = {}
    for view in views:
        for one in (view, *view.tied):
            found.setdefault(one.module, []).append(one)
    return found


def _real_rows(real: Tensor, x: Tensor, sequence_first: bool) -> Tensor:
    """The mask ``real`` ``(windows, seqlen)`` in the order of the rows of ``x``: transposed where the axes of
    ``x`` are (seqlen, windows), which where both are as long must be known."""
    turned = x.shape[:2] == real.T.shape and (sequence_first or x.shape[:2] != real.shape)
    return (real.T if turned else real).flatten()


def first_input(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """What a module reads; raises CalibrationError where it is no plain tensor."""
    if not args or not isinstance(args[0], Tensor):
        if isinstance(module, nn.RNNBase):
            raise CalibrationError("a recurrent layer is calibrated on plain tensors, not packed sequences")
        raise CalibrationError(f"a {type(module).__name__} was called without its input as first argument")
    x: Tensor = args[0]
    if x.is_nested:
        raise CalibrationError(
            f"a {type(module).__name__} was called with a nested tensor, which has no rows to sum up: leave "
            "padding masks out, or set enable_nested_tensor=False on nn.TransformerEncoder"
        )
    return x
