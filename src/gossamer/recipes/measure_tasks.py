"""Zero-shot tasks of models as a user names them: loaded, asked the same questions, compared item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gossamer.errors import EvaluationError
from gossamer.evaluate.task_files import ITEMS, TaskItems, check_tasks, read_task
from gossamer.evaluate.task_scores import Flips, TaskScore, flips
from gossamer.models.session import context_length
from gossamer.progress import Progress, silent
from gossamer.recipes.load import Engine, LoadedModel, load

if TYPE_CHECKING:
    from gossamer.evaluate.harness_tasks import HarnessTask


@dataclass(frozen=True)
class MeasuredTasks:
    """``scores`` of ``model`` on ``tasks``, and those of the model ``against`` (if any) on the same items.
    ``harness``: the version of lm-evaluation-harness that asked; ``engines``: what answered, one for each."""

    model: str
    against: str | None
    tasks: tuple[TaskItems | HarnessTask, ...]
    scores: tuple[TaskScore, ...]
    reference: tuple[TaskScore, ...] | None
    harness: str
    engines: tuple[str, ...]

    @property
    def accuracy(self) -> float:
        """The mean of the tasks' accuracies, each task counted once."""
        return _mean(self.scores)

    @property
    def reference_accuracy(self) -> float | None:
        return None if self.reference is None else _mean(self.reference)

    def flips(self) -> tuple[Flips, ...] | None:
        """Of each task, from the model ``against`` to this one; None without one."""
        if self.reference is None:
            return None
        pairs = zip(self.scores, self.reference, strict=True)
        return tuple(flips(now.correct, before.correct) for now, before in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        flipped, tasks = self.flips(), {}
        for index, (task, score) in enumerate(zip(self.tasks, self.scores, strict=True)):
            tasks[task.name] = {**score.to_dict(), "of": task.total, **task.source()}
            if self.reference is not None and flipped is not None:
                tasks[task.name]["against"] = self.reference[index].to_dict()
                tasks[task.name]["flips"] = flipped[index].to_dict()
        return {
            "model": self.model,
            "against": self.against,
            "accuracy": self.accuracy,
            "against_accuracy": self.reference_accuracy,
            "lm_eval": self.harness,
            "engines": list(self.engines),
            "tasks": tasks,
        }


def measure_tasks(
    model: str | Path | LoadedModel,
    tasks: Sequence[str],
    *,
    items: int | None = ITEMS,
    against: str | Path | LoadedModel | None = None,
    dtype: torch.dtype | str = "auto",
    engine: Engine = "auto",
    progress: Progress = silent,
) -> MeasuredTasks:
    """Asks ``model`` the ``tasks`` (names or .jsonl files: see `read_task`; ``harness:NAME`` or YAML files:
    see `harness_tasks`), and the model ``against`` the same: both in the native decoder where it knows them.

    ``items``: questions a task, None = all; ``dtype``, ``engine``: see `load` (``"auto"``: as said). Raises
    a GossamerError for whatever a person can mend, such as lm-evaluation-harness missing, before any model is
    loaded.
    """
    chosen = _chosen(tasks, items)
    if against is not None and any(len(task.items) < 2 for task in chosen):
        raise EvaluationError("a comparison needs two items of each task or more")
    from importlib.metadata import version

    from gossamer.evaluate import harness

    engines: list[str] = []

    def asked(one: str | Path | LoadedModel) -> tuple[str, tuple[TaskScore, ...]]:
        options: dict[str, Any] = {"dtype": dtype, "engine": engine, "progress": progress}
        loaded = one if isinstance(one, LoadedModel) else load(one, pack_plain=True, **options)
        engines.append(loaded.engine)
        positions = context_length(loaded.model.config)
        asking = harness.SessionLM(loaded.session, loaded.tokenizer, positions, progress)
        return loaded.title, tuple(harness.ask(asking, chosen))

    label, scores = asked(model)
    other, reference = (None, None) if against is None else asked(against)
    return MeasuredTasks(label, other, chosen, scores, reference, version("lm_eval"), tuple(engines))


def _chosen(names: Sequence[str], items: int | None) -> tuple[TaskItems | HarnessTask, ...]:
    """What is asked of the tasks ``names``, in their order; local files are looked at first."""
    ours = [name for name in names if not _of_harness(name)]
    if ours or not names:
        check_tasks(ours)
    if items is not None and items < 1:
        raise EvaluationError(f"a task needs at least one item, got {items}")
    found: dict[str, TaskItems | HarnessTask] = {name: read_task(name, items) for name in ours}
    if theirs := [name for name in names if name not in found]:
        from gossamer.evaluate import harness
        from gossamer.evaluate.harness_tasks import harness_tasks

        with harness.quiet():
            found |= harness_tasks(theirs, items)
    chosen = tuple(found[name] for name in names)
    labels = [task.name for task in chosen]
    for label in labels:
        if labels.count(label) > 1:
            raise EvaluationError(f"the task {label} is named twice")
    return chosen


def _of_harness(name: str) -> bool:
    return name.startswith("harness:") or name.endswith((".yaml", ".yml"))


def _mean(scores: Sequence[TaskScore]) -> float:
    return sum(score.accuracy for score in scores) / len(scores)
