"""Gates of activations for the native decoder: plain data by the names of sites, checked and handed over."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer.errors import ModelError
from gossamer.kernels.native import native
from gossamer.sparse.masks import count_pruned


class ActivationGate(Protocol):
    """What drops activations of one site: scores ``importance_j * |x_j|`` (importance None: 1) up to
    ``threshold``, or, where that is None, the lowest ``floor(sparsity * features + 0.5)`` of each token."""

    @property
    def features(self) -> int: ...
    @property
    def sparsity(self) -> float: ...
    @property
    def threshold(self) -> float | None: ...
    @property
    def importance(self) -> tuple[float, ...] | None: ...


class NativeGates:
    """``gates`` by site for a decoder; ``sites``: names and widths of each layer's, in the order of
    csrc/gates.h. Raises ModelError where a gate is of no such site, or of another width."""

    def __init__(self, gates: Mapping[str, ActivationGate], sites: list[dict[str, int]]) -> None:
        self.handle: Any = native().Gates(len(sites))
        self._alive: list[Tensor] = []
        self._places: dict[str, tuple[int, int, int]] = {}
        widths = {name: width for layer in sites for name, width in layer.items()}
        places = {name: (i, at) for i, layer in enumerate(sites) for at, name in enumerate(layer)}
        for name, gate in gates.items():
            if name not in places:
                raise ModelError(f"the native decoder has no site {name}, which a gate names")
            if widths[name] != gate.features:
                raise ModelError(f"{name} has {widths[name]} activations, and its gate {gate.features}")
            pruned = -1 if gate.threshold is not None else count_pruned(gate.features, gate.sparsity)
            self.handle.set(*places[name], gate.threshold or 0.0, pruned, self._array(gate.importance))
            self._places[name] = (*places[name], gate.features)

    def achieved(self) -> dict[str, float]:
        """The share of activations that was dropped so far, by site; empty where nothing has run."""
        tokens = self.handle.tokens
        if not tokens:
            return {}
        return {
            name: self.handle.dropped(layer, at) / (tokens * width)
            for name, (layer, at, width) in self._places.items()
        }

    def _array(self, numbers: tuple[float, ...] | None) -> int:
        if numbers is None:
            return 0
        kept = torch.tensor(numbers, dtype=torch.float32)
        self._alive.append(kept)
        return kept.data_ptr()
