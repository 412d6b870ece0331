"""The bridge to lm-evaluation-harness: our sessions as its language model, our task files beside its tasks.

The harness asks and scores as for every other model in the literature; the likelihoods are our kernels'.
Gao et al. 2024, The Language Model Evaluation Harness. It is an extra: ``pip install 'gossamer[eval]'``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from gossamer.errors import EvaluationError
from gossamer.evaluate.likelihood import LikelihoodReader
from gossamer.evaluate.task_files import TaskItems
from gossamer.evaluate.task_scores import TaskScore
from gossamer.models.session import SessionFactory
from gossamer.progress import Progress, silent

try:
    import datasets
    import lm_eval.api.task
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate as run_harness

    from gossamer.evaluate.harness_tasks import HarnessTask
except ImportError as missing:
    raise EvaluationError(
        f"lm-evaluation-harness asks zero-shot tasks, and {missing.name or missing} is not installed: "
        "pip install 'gossamer[eval]'"
    ) from missing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXAMPLE_SEED = 1234  # of drawing a task's examples; the harness's own


class SessionLM(TemplateLM):  # type: ignore[misc]
    """A model of the harness over decoding sessions, for tasks of likelihoods (``loglikelihood``,
    ``multiple_choice``); those that let the model write raise EvaluationError.

    ``context_length``: the model's positions. Texts have the special tokens that the tokenizer puts first.
    """

    def __init__(
        self,
        start: SessionFactory,
        tokenizer: PreTrainedTokenizerBase,
        context_length: int | None = None,
        progress: Progress = silent,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._read = LikelihoodReader(start, context_length)
        self._progress = progress

    @property
    def eot_token_id(self) -> int:
        token = self.tokenizer.bos_token_id
        found = self.tokenizer.eos_token_id if token is None else token
        if found is None:
            raise EvaluationError("the tokenizer has no token that begins or ends a text")
        return int(found)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        ids: list[int] = self.tokenizer(string, verbose=False, **options)["input_ids"]
        return ids

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        found = []
        for done, (_texts, context, continuation) in enumerate(requests):
            self._progress("asking", done, len(requests))
            found.append(self._read(context, continuation))
        self._progress("asking", len(requests), len(requests))
        return found

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        raise EvaluationError("perplexity is measured by `gossamer eval --text`, not through the harness")

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        raise EvaluationError("tasks in which the model writes an answer are not measured here")


class _LocalTask(ConfigurableTask):  # type: ignore[misc]
    """Items of a file as a zero-shot task of the harness; nothing is fetched."""

    def __init__(self, task: TaskItems) -> None:
        self._items = task
        config = {
            "task": task.name,
            "output_type": "multiple_choice",
            "test_split": "test",
            "num_fewshot": 0,
            "doc_to_text": lambda row: row["text"],
            "doc_to_choice": lambda row: row["choices"],
            "doc_to_target": lambda row: row["target"],
            "metric_list": [
                {"metric": metric, "aggregation": "mean", "higher_is_better": True}
                for metric in (["acc"] if by_context(task) else ["acc", "acc_norm"])
            ],
        }
        super().__init__(config=config)

    def download(self, *_: Any, **__: Any) -> None:
        """Rows as the harness reads them: where contexts are the choices, the "text" is the right index."""
        rows = []
        for item in self._items.items:
            if by_context(self._items):
                row = {"text": item.gold, "choices": list(item.contexts), "target": item.continuations[0]}
            else:
                row = {"text": item.contexts[0], "choices": list(item.continuations), "target": item.gold}
            rows.append(row)
        self.dataset = {"test": datasets.Dataset.from_list(rows)}


def by_context(task: TaskItems) -> bool:
    """Whether the choices of ``task`` are contexts that end the same way."""
    return len(set(task.items[0].contexts)) > 1


def ask(model: SessionLM, tasks: Sequence[TaskItems | HarnessTask]) -> list[TaskScore]:
    """What ``model`` gets right of each of ``tasks``, as the harness scores it (``acc``, ``acc_norm``)."""
    with quiet():
        asked, places = {}, {}
        for task in tasks:
            if isinstance(task, HarnessTask):
                asked[task.name], places[task.name] = task.task, list(task.items)
                task.task.set_fewshot_seed(EXAMPLE_SEED)  # again: an earlier model's examples were drawn
            else:
                asked[task.name] = _LocalTask(task)
        found = run_harness(lm=model, task_dict=asked, samples=places, bootstrap_iters=0, log_samples=True)
    return [_score(task.name, found["samples"][task.name]) for task in tasks]


def _score(name: str, samples: Sequence[dict[str, Any]]) -> TaskScore:
    rows = sorted(samples, key=lambda row: row["doc_id"])
    norm = tuple(row["acc_norm"] == 1.0 for row in rows) if "acc_norm" in rows[0] else None
    picked = tuple(_picked(row) for row in rows)
    return TaskScore(name, tuple(row["acc"] == 1.0 for row in rows), norm, picked)


def _picked(row: dict[str, Any]) -> int:
    """The likeliest choice's index, the first of equals, as the harness takes it."""
    found = [total for total, _greedy in row["filtered_resps"]]
    if "acc_mutual_info" in row:  # the choices follow once more, without a context
        found = found[: len(found) // 2]
    return max(range(len(found)), key=found.__getitem__)


@contextmanager
def quiet() -> Iterator[None]:
    """The harness's own bars and notes would be drawn over our progress."""
    logger = logging.getLogger("lm_eval")
    level, bars, drawn = logger.level, lm_eval.api.task.tqdm, datasets.is_progress_bar_enabled()
    logger.setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = lambda iterable, **_: iterable
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bars
        if drawn:
            datasets.enable_progress_bars()
