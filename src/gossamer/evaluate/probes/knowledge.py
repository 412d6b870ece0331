"""Knowledge: questions of elementary science whose answers stand in no prompt, only in the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer.errors import EvaluationError
from gossamer.evaluate.probes.probe import PROBES, ProbeScore, Subject
from gossamer.evaluate.task_files import check_tasks, read_task
from gossamer.models.session import context_length
from gossamer.progress import Progress


@PROBES.register(
    "knowledge", cite="Mihaylov et al. 2018, Can a Suit of Armor Conduct Electricity? (OpenBookQA)"
)
@dataclass(frozen=True)
class Knowledge:
    """OpenBookQA without its book: four choices, of which the likeliest is the answer; asked and scored by
    lm-evaluation-harness, as ``--tasks openbook_qa`` is."""

    name: ClassVar[str]
    task: str = "openbook_qa"

    def check(self) -> None:
        check_tasks([self.task])
        from gossamer.evaluate import harness  # noqa: F401 - says what to install where it is missing

    def ask(self, subject: Subject, items: int | None, progress: Progress) -> ProbeScore:
        from gossamer.evaluate import harness

        positions = context_length(subject.model.config)
        asking = harness.SessionLM(subject.session, subject.tokenizer, positions, progress)
        (score,) = harness.ask(asking, [read_task(self.task, items)])
        if score.correct_norm is None:
            raise EvaluationError(f"the task {self.task} has no choices that are continuations")
        measures = {"choice": score.correct, "choice per character": score.correct_norm}
        return ProbeScore(measures, tuple(map(str, score.picked)))
