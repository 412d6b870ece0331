"""Gates: which activations are dropped at run time, as data, and their attachment to a model.

A gate scores each activation by ``importance_j * |x_j|`` (importance 1 where it has none) and drops those
that score too low: at most its threshold, or the lowest ones of each token where it has none. NaN is never
dropped, so that it shows in the model's outputs.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.dynamic.activations.sites import is_linear, shape_of, tap
from gossamer.errors import CheckpointError, ModelError
from gossamer.matrices.atomic import atomic_file
from gossamer.sparse.masks import check_sparsity, count_pruned, keep_highest

FILE = "activations.json"
SCHEMA = 1


@dataclass(frozen=True)
class Gate:
    """The gate of one site of ``features`` activations, made to drop a share ``sparsity`` of them.

    ``threshold``: scores up to it are dropped; None: exactly ``floor(sparsity * features + 0.5)`` of each
    token, ties by index. ``importance``: one factor >= 0 a feature, or None. Raises SparsityError or
    CheckpointError where these make no gate.
    """

    features: int
    sparsity: float
    threshold: float | None = None
    importance: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise CheckpointError(f"a threshold is a number >= 0, got {self.threshold!r}")
        if self.importance is not None:
            if len(self.importance) != self.features:
                raise CheckpointError(
                    f"a gate of {self.features} activations has {len(self.importance)} factors of importance"
                )
            if not all(0 <= factor < math.inf for factor in self.importance):
                raise CheckpointError("the importance of an activation is a number >= 0, and one is not")

    def importance_tensor(self) -> Tensor | None:
        """``importance``, float32 ``(features,)``."""
        return None if self.importance is None else torch.tensor(self.importance)

    def drops(self, scores: Tensor) -> Tensor:
        """Which activations of these ``scores`` ``(..., features)`` are dropped, bool of that shape."""
        if self.threshold is not None:
            return scores <= self.threshold
        pruned = count_pruned(self.features, self.sparsity)
        return ~keep_highest(scores.reshape(-1, self.features), pruned).reshape(scores.shape)


def scores_of(x: Tensor, importance: Tensor | None) -> Tensor:
    """``importance * |x|`` in float32, for ``x`` ``(..., features)``."""
    scores = x.abs().float()
    return scores if importance is None else scores * importance


def check_width(name: str, gate: Gate, x: Tensor) -> None:
    """Raises ModelError unless ``x`` ``(..., features)`` is as wide as the gate of the site ``name``."""
    if x.shape[-1] != gate.features:
        raise ModelError(f"{name} has {x.shape[-1]} activations, and its gate {gate.features}")


@dataclass(frozen=True)
class Gates:
    """The gates of a model by the names of their sites, and the ``method`` that chose them, fit for JSON."""

    method: str
    gates: dict[str, Gate]

    def attach(self, model: nn.Module) -> AttachedGates:
        """Puts the gates into ``model`` as hooks, until `AttachedGates.detach` or the end of a ``with``.

        They act wherever its modules run; the native decoder takes ``gates`` itself. Raises ModelError where
        the model has no module of a gate's name, or one of another width.
        """
        return AttachedGates(model, self)

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """The module of each gate in ``model``; raises ModelError as `attach` does."""
        return {name: _module(model, name, gate) for name, gate in self.gates.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        gates = {
            name: {
                "features": gate.features,
                "sparsity": gate.sparsity,
                "threshold": gate.threshold,
                "importance": None if gate.importance is None else list(gate.importance),
            }
            for name, gate in self.gates.items()
        }
        return {"schema": SCHEMA, "method": self.method, "gates": gates}

    @classmethod
    def from_dict(cls, content: Any) -> Gates:
        """The inverse of `to_dict`; raises CheckpointError where ``content`` is nothing of the kind."""
        try:
            if content["schema"] != SCHEMA:
                raise CheckpointError(f"gates of schema {content['schema']!r}: this version reads {SCHEMA}")
            gates = {}
            for name, gate in content["gates"].items():
                importance, threshold = gate["importance"], gate["threshold"]
                gates[str(name)] = Gate(
                    int(gate["features"]),
                    float(gate["sparsity"]),
                    None if threshold is None else float(threshold),
                    None if importance is None else tuple(float(factor) for factor in importance),
                )
            return cls(str(content["method"]), gates)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"this is no document of gates: {error!r}") from error

    def save(self, folder: Path) -> Path:
        """Writes them into ``folder`` (that of a checkpoint or model) as FILE; returns its path.
        Raises OutputError."""
        file = Path(folder) / FILE
        with atomic_file(file) as out:
            out.write((json.dumps(self.to_dict()) + "\n").encode())
        return file

    @classmethod
    def load(cls, folder: Path) -> Gates:
        """Reads what `save` wrote; raises CheckpointError where it is missing or damaged."""
        file = Path(folder) / FILE
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read {file.name}: {error.strerror}") from error
        except ValueError as error:
            raise CheckpointError(f"{file.name} is damaged: {error}") from error
        return cls.from_dict(content)


class AttachedGates:
    """Gates at work in a model. Usable in a ``with`` statement, which detaches them."""

    def __init__(self, model: nn.Module, gates: Gates) -> None:
        modules = gates.modules(model)
        self._seen = dict.fromkeys(modules, 0)
        self._dropped = dict.fromkeys(modules, 0)
        self._handles = [tap(module, self._see(name, gates.gates[name])) for name, module in modules.items()]

    def _see(self, name: str, gate: Gate) -> Callable[[Tensor], Tensor]:
        importance = gate.importance_tensor()

        def see(x: Tensor) -> Tensor:
            check_width(name, gate, x)
            dropped = gate.drops(scores_of(x, importance))
            self._seen[name] += x.numel()
            self._dropped[name] += int(dropped.sum())
            return x.masked_fill(dropped, 0)

        return see

    def achieved(self) -> dict[str, float]:
        """The share of activations that was dropped so far, by site, of those that have run."""
        return {name: self._dropped[name] / seen for name, seen in self._seen.items() if seen}

    def detach(self) -> None:
        """Takes the gates out of the model again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __enter__(self) -> AttachedGates:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _module(model: nn.Module, name: str, gate: Gate) -> nn.Module:
    try:
        module = model.get_submodule(name)
    except AttributeError as error:
        raise ModelError(f"{type(model).__name__} has no module {name}, which a gate names") from error
    if is_linear(module) and shape_of(module)[1] != gate.features:
        raise ModelError(f"{name} reads {shape_of(module)[1]} activations, and its gate {gate.features}")
    return module
