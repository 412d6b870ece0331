"""Probes of models as a user names them: loaded, asked the same items, compared item by item."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from gossamer.errors import EvaluationError
from gossamer.evaluate.probes import PROBES, Change, Probe, ProbeScore, changed
from gossamer.evaluate.task_files import ITEMS
from gossamer.progress import Progress, silent
from gossamer.recipes.load import Engine, LoadedModel, load

T = TypeVar("T")


@dataclass(frozen=True)
class MeasuredProbes:
    """``scores`` of ``model`` by probe, and those of the model ``against`` (if any) on the same items;
    ``skipped``: probes that could not be asked, and why; ``engines``: what answered, one for each model."""

    model: str
    against: str | None
    scores: dict[str, ProbeScore]
    reference: dict[str, ProbeScore] | None
    skipped: dict[str, str]
    engines: tuple[str, ...]

    def changes(self) -> dict[str, Change] | None:
        """By probe, from the model ``against`` to this one; None without one."""
        if self.reference is None:
            return None
        return {name: changed(score, self.reference[name]) for name, score in self.scores.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        probes, changes = {name: score.to_dict() for name, score in self.scores.items()}, self.changes()
        if self.reference is not None and changes is not None:
            for name, one in probes.items():
                one["against"] = self.reference[name].to_dict()
                one["change"] = changes[name].to_dict()
        told = {"model": self.model, "against": self.against, "engines": list(self.engines)}
        return {**told, "probes": probes, "skipped": self.skipped}


def measure_probes(
    model: str | Path | LoadedModel,
    probes: Sequence[str | Probe] | None = None,
    *,
    items: int | None = ITEMS,
    against: str | Path | LoadedModel | None = None,
    dtype: torch.dtype | str = "auto",
    engine: Engine = "auto",
    progress: Progress = silent,
) -> MeasuredProbes:
    """Asks ``model`` the ``probes`` (names in `gossamer.evaluate.probes.PROBES`, or probes), and
    the model ``against`` the same: both in the native decoder where it knows them.

    ``probes``: None takes all, and skips with a reason what cannot be asked here; ``items``: of each probe,
    None = all of a file, or a probe's own number; ``dtype``, ``engine``: see `load` (``"auto"``: as said).
    Raises a GossamerError for whatever a person can mend, as far as it can before any model is loaded.
    """
    wanted = list(PROBES) if probes is None else list(probes)
    if not wanted:
        raise EvaluationError(f"name at least one probe of {', '.join(PROBES)}")
    least = 1 if against is None else 2
    if items is not None and items < least:
        raise EvaluationError(f"a probe takes at least {least} items here, got {items}")
    asked = [PROBES[probe]() if isinstance(probe, str) else probe for probe in wanted]
    if len({probe.name for probe in asked}) < len(asked):
        raise EvaluationError("a probe is named twice")
    skipped: dict[str, str] = {}
    engines: list[str] = []

    def each(work: Callable[[Probe], T]) -> dict[str, T]:
        """What ``work`` gives for each probe; one that was not named may say why it cannot be asked."""
        found = {}
        for probe in asked:
            if probe.name in skipped:
                continue
            try:
                found[probe.name] = work(probe)
            except EvaluationError as error:
                if probes is not None:
                    raise
                skipped[probe.name] = str(error)
        return found

    def scores(one: str | Path | LoadedModel) -> tuple[str, dict[str, ProbeScore]]:
        options: dict[str, Any] = {"dtype": dtype, "engine": engine, "progress": progress}
        loaded = one if isinstance(one, LoadedModel) else load(one, pack_plain=True, **options)
        engines.append(loaded.engine)
        return loaded.title, each(lambda probe: probe.ask(loaded, items, progress))

    each(lambda probe: probe.check())
    label, answered = scores(model)
    if against is None:
        return MeasuredProbes(label, None, answered, None, skipped, tuple(engines))
    other, reference = scores(against)
    answered = {name: score for name, score in answered.items() if name in reference}
    return MeasuredProbes(label, other, answered, reference, skipped, tuple(engines))
