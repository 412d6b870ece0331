"""Zero-shot tasks of models as a user names them: loaded, asked the same questions, compared item by item."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gossamer.errors import EvaluationError
from gossamer.evaluate.task_files import ITEMS, TaskItems, check_tasks, read_task
from gossamer.evaluate.task_scores import Flips, TaskScore, flips
from gossamer.progress import Progress, silent
from gossamer.recipes.load import Engine, LoadedModel, load


@dataclass(frozen=True)
class MeasuredTasks:
    """``scores`` of ``model`` on ``tasks``, and those of the model ``against`` (if any) on the same items.
    ``harness``: the version of lm-evaluation-harness that asked."""

    model: str
    against: str | None
    tasks: tuple[TaskItems, ...]
    scores: tuple[TaskScore, ...]
    reference: tuple[TaskScore, ...] | None
    harness: str

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
            tasks[task.name] = {**score.to_dict(), "of": task.total, "file_sha256": task.sha256}
            if self.reference is not None and flipped is not None:
                tasks[task.name]["against"] = self.reference[index].to_dict()
                tasks[task.name]["flips"] = flipped[index].to_dict()
        return {
            "model": self.model,
            "against": self.against,
            "accuracy": self.accuracy,
            "against_accuracy": self.reference_accuracy,
            "lm_eval": self.harness,
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
    """Asks ``model`` the zero-shot ``tasks`` (names, or .jsonl files; see `read_task`), through the engine
    that it answers in, and the model ``against`` the same.

    ``items``: questions a task, None = all; ``dtype``, ``engine``: see `load`. Raises a GossamerError for
    whatever a person can mend, such as lm-evaluation-harness missing, before any model is loaded.
    """
    check_tasks(tasks)
    chosen = tuple(read_task(name, items) for name in tasks)
    if against is not None and any(len(task.items) < 2 for task in chosen):
        raise EvaluationError("a comparison needs two items of each task or more")
    from importlib.metadata import version

    from gossamer.evaluate import harness

    def asked(one: str | Path | LoadedModel) -> tuple[str, tuple[TaskScore, ...]]:
        loaded = (
            one if isinstance(one, LoadedModel) else load(one, dtype=dtype, engine=engine, progress=progress)
        )
        positions = getattr(loaded.model.config, "max_position_embeddings", None)
        asking = harness.SessionLM(loaded.session, loaded.tokenizer, positions, progress)
        return loaded.label, tuple(harness.ask(asking, chosen))

    label, scores = asked(model)
    other, reference = (None, None) if against is None else asked(against)
    return MeasuredTasks(label, other, chosen, scores, reference, version("lm_eval"))


def _mean(scores: Sequence[TaskScore]) -> float:
    return sum(score.accuracy for score in scores) / len(scores)
