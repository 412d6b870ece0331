"""Tasks that lm-evaluation-harness itself knows, or that a YAML file in its form describes.

They stay the harness's: prompts, examples, data and scores are what it makes of the YAML for every model.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.tasks import TaskManager

from gossamer.errors import EvaluationError
from gossamer.evaluate.task_files import spread
from gossamer.paths import expanded

PREFIX = "harness:"
OUTPUTS = ("multiple_choice", "loglikelihood")


@dataclass(frozen=True)
class HarnessTask:
    """A task of the harness: the ``items`` (places among its ``total``) that are asked."""

    name: str
    task: Any  # lm_eval.api.task.ConfigurableTask
    items: tuple[int, ...]
    total: int

    def source(self) -> dict[str, Any]:
        """Where the items come from, plain values for JSON: dataset, examples before a question, version."""
        config = self.task.config
        return {
            "dataset": [config.dataset_path, config.dataset_name],
            "examples": config.num_fewshot or 0,
            "task_version": self.task.VERSION,
        }


def harness_tasks(names: Sequence[str], items: int | None) -> dict[str, HarnessTask]:
    """The tasks ``names`` (``harness:NAME`` or YAML files) with so many ``items`` each, spread evenly, always
    the same; None: all. Their data is fetched, or read from the hub's cache.

    Raises EvaluationError for names that the harness does not know, groups, tasks whose answers are not right
    or wrong by likelihoods, and data that cannot be had.
    """
    # reading the index of all its tasks takes the harness half a minute
    manager = TaskManager(include_defaults=any(name.startswith(PREFIX) for name in names))
    specs = {name: _spec(manager, name) for name in names}  # all names before any data
    return {name: _load(manager, name, spec, items) for name, spec in specs.items()}


def _spec(manager: TaskManager, name: str) -> str:
    """What the manager knows the task ``name`` as; refused here is what its YAML alone shows."""
    if not name.startswith(PREFIX):
        path = expanded(name)
        if not path.is_file():
            raise EvaluationError(f"there is no task file {path.name}")
        return str(path)
    known = name.removeprefix(PREFIX)
    entry = manager.task_index.get(known)
    if entry is None:
        near = difflib.get_close_matches(known, manager.all_subtasks, n=3)
        hint = f"; did you mean {', '.join(PREFIX + one for one in near)}?" if near else ""
        raise EvaluationError(f"lm-evaluation-harness knows no task {known!r}{hint}")
    if known not in manager.all_subtasks:
        raise EvaluationError(f"{name} is a group of tasks: name those of it that are to be asked")
    _check(name, entry.cfg or {})
    return known


def _load(manager: TaskManager, name: str, spec: str, items: int | None) -> HarnessTask:
    try:
        found = list(manager.load(spec)["tasks"].values())
        if len(found) == 1:
            docs = found[0].eval_docs
    except OSError as error:  # what the hub's library raises offline, and for data that is not there
        raise EvaluationError(f"the data of the task {name} cannot be fetched: {error}") from error
    except Exception as error:  # a YAML and a dataset of others may fail in any way
        raise EvaluationError(f"the harness cannot prepare the task {name}: {error}") from error
    if len(found) != 1:
        raise EvaluationError(f"{name} is a group of tasks: name those of it that are to be asked")
    task, total = found[0], len(docs)
    _check(name, vars(task.config))
    if not total:
        raise EvaluationError(f"the task {name} has no items")
    if task.config.num_fewshot is None:
        task.set_config("num_fewshot", 0)
    label = name if name.startswith(PREFIX) else task.task_name
    return HarnessTask(label, task, spread(total, items), total)


def _check(name: str, config: Mapping[str, Any]) -> None:
    """Raises EvaluationError unless the task's answers are right or wrong by likelihoods."""
    output = config.get("output_type") or "generate_until"
    if config.get("class") is not None:
        raise EvaluationError(f"{name} is a program of the harness, and only tasks that are data are asked")
    if output == "generate_until":
        raise EvaluationError(f"{name} lets the model write its answers, and only likelihoods are asked for")
    if output not in OUTPUTS:
        raise EvaluationError(f"{name} measures {output}: tasks are of {' or '.join(OUTPUTS)}")
    metrics = [metric.get("metric") for metric in config.get("metric_list") or [{"metric": "acc"}]]
    if config.get("process_results") is not None or "acc" not in metrics:
        raise EvaluationError(f"{name} does not score answers as right or wrong (its metric is no plain acc)")
    for needs in ("doc_to_image", "doc_to_audio", "unsafe_code"):
        if config.get(needs):
            raise EvaluationError(f"{name} is no task of text alone ({needs})")
