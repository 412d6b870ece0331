"""Thresholds for any sparsity, from one or two passes of the dense model over calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gossamer.dynamic.activations.gates import Gate, Gates, check_width, scores_of
from gossamer.dynamic.activations.method import ActivationMethod
from gossamer.dynamic.activations.quantiles import Quantiles
from gossamer.dynamic.activations.sites import Site, run_body, tap
from gossamer.errors import CalibrationError, MethodError


@dataclass(frozen=True)
class Calibrated:
    """A method made ready for one model: from it come gates of any sparsity.

    ``importance`` and ``quantiles`` (of the scores on the calibration text; None where the method selects
    without thresholds) by names of ``sites``.
    """

    method: ActivationMethod
    sites: dict[str, Site]
    importance: dict[str, Tensor | None]
    quantiles: dict[str, Quantiles] | None

    def gates(self, sparsity: float | Mapping[str, float]) -> Gates:
        """Gates that drop a share ``sparsity`` in [0, 1) of the activations: of each site, or by names of
        sites (those that are not named stay dense). The share is one of the dense model's activations: below
        other gates they are smaller, and somewhat more are dropped (`settle` mends that).

        Raises SparsityError, and MethodError for an unknown name.
        """
        levels = sparsity if isinstance(sparsity, Mapping) else dict.fromkeys(self.sites, sparsity)
        if unknown := [name for name in levels if name not in self.sites]:
            raise MethodError(f"the method {self.method.name} gates no {unknown[0]} in this model")
        return Gates(self.method.name, {name: self._gate(name, level) for name, level in levels.items()})

    def _gate(self, name: str, level: float) -> Gate:
        importance = self.importance[name]
        return Gate(
            features=self.sites[name].features,
            sparsity=level,
            threshold=None if self.quantiles is None else self.quantiles[name].below(level),
            importance=None if importance is None else tuple(importance.tolist()),
        )


def calibrate(model: nn.Module, method: ActivationMethod, windows: Tensor | None = None) -> Calibrated:
    """Makes ``method`` ready for ``model``, which must be in memory and runs dense.

    ``windows``: token ids ``(n, seqlen)`` of calibration text, needed for thresholds and where sites have
    partners. Raises CalibrationError where there are none, where an activation is NaN or infinite, or none
    reached a site.
    """
    sites = method.sites(model)
    partners = {name: site.partner for name, site in sites.items() if site.partner is not None}
    thresholds = method.selection == "threshold"
    if windows is None and (partners or thresholds):
        raise CalibrationError(f"the method {method.name} needs calibration text, and there is none")
    means: dict[str, Tensor] = {}
    if partners:
        assert windows is not None
        means = _mean_outputs(model, partners, windows)
    importance = {name: method.importance(site, means.get(name)) for name, site in sites.items()}
    if not thresholds:
        return Calibrated(method, sites, importance, None)
    assert windows is not None
    quantiles = {name: Quantiles() for name in sites}

    def see(name: str) -> Callable[[Tensor], None]:
        return lambda x: _add(quantiles[name], scores_of(x, importance[name]), name)

    handles = [tap(site.module, see(name)) for name, site in sites.items()]
    try:
        run_body(model, windows)
    finally:
        for handle in handles:
            handle.remove()
    if empty := [name for name, seen in quantiles.items() if seen.total == 0]:
        raise CalibrationError(f"no calibration input reached {empty[0]} (an expert never chosen?)")
    return Calibrated(method, sites, importance, quantiles)


def settle(model: nn.Module, gates: Gates, windows: Tensor) -> Gates:
    """The gates with thresholds at which each site drops its share of what reaches it below the other gates.

    ``windows``, token ids ``(n, seqlen)``, run as one batch: each site sets its threshold on what it is
    handed, and hands on what it leaves. Gates without a threshold stay as they are. Raises CalibrationError
    where an activation is NaN or infinite, ModelError where the gates are those of another model.
    """
    settled = dict(gates.gates)

    def see(name: str, gate: Gate) -> Callable[[Tensor], Tensor]:
        importance = gate.importance_tensor()
        quantiles = Quantiles()

        def drop(x: Tensor) -> Tensor:
            check_width(name, gate, x)
            scores = scores_of(x, importance)
            if gate.threshold is not None:
                _add(quantiles, scores, name)
                settled[name] = replace(gate, threshold=quantiles.below(gate.sparsity))
            return x.masked_fill(settled[name].drops(scores), 0)

        return drop

    modules = gates.modules(model)
    handles = [tap(module, see(name, gates.gates[name])) for name, module in modules.items()]
    try:
        run_body(model, windows, batch=len(windows))
    finally:
        for handle in handles:
            handle.remove()
    return Gates(gates.method, settled)


def _add(quantiles: Quantiles, scores: Tensor, name: str) -> None:
    try:
        quantiles.update(scores)
    except CalibrationError as error:
        raise CalibrationError(f"{name}: {error}") from error


def _mean_outputs(model: nn.Module, modules: Mapping[str, nn.Module], windows: Tensor) -> dict[str, Tensor]:
    """The mean absolute output of each module, float32 ``(features,)``."""
    sums: dict[str, Tensor] = {}
    tokens = dict.fromkeys(modules, 0)

    def see(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def add(_: nn.Module, args: object, output: Tensor) -> None:
            rows = output.detach().abs().double().reshape(-1, output.shape[-1])
            sums[name] = sums.get(name, torch.zeros(())) + rows.sum(dim=0)
            tokens[name] += len(rows)

        return add

    handles = [module.register_forward_hook(see(name)) for name, module in modules.items()]
    try:
        run_body(model, windows)
    finally:
        for handle in handles:
            handle.remove()
    for name in modules:
        if name not in sums:
            raise CalibrationError(f"no calibration input reached {name} (an expert never chosen?)")
        if not torch.isfinite(sums[name]).all():
            raise CalibrationError(
                f"{name}: an activation is NaN or infinite: NaN or infinite weights before it?"
            )
    return {name: (total / tokens[name]).float() for name, total in sums.items()}
