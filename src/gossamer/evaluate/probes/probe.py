"""What every probe is and gives: questions asked of one model, and each answer kept item by item."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from gossamer.errors import EvaluationError
from gossamer.evaluate.likelihood import LikelihoodReader
from gossamer.evaluate.task_scores import Flips, flips, wilson
from gossamer.models.session import DecodingSession, context_length
from gossamer.progress import Progress
from gossamer.registry import Registry

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase


class Subject(Protocol):
    """The model that is asked, as it is loaded: it reads in sessions of its own engine, and writes."""

    @property
    def model(self) -> nn.Module: ...
    @property
    def tokenizer(self) -> PreTrainedTokenizerBase: ...
    def session(self) -> DecodingSession: ...
    def generate_each(
        self, prompts: Iterable[str], max_new_tokens: int, *, stop: str, chat: bool
    ) -> Iterator[str]: ...


class Probe(Protocol):
    """One thing that a model can do. The same probe asks the same items of every model."""

    name: ClassVar[str]

    def check(self) -> None:
        """Raises EvaluationError where something that the probe needs is missing on this machine."""

    def ask(self, subject: Subject, items: int | None, progress: Progress) -> ProbeScore:
        """What the model answers to so many ``items`` (None: all that there are, or a probe's own number).
        Raises EvaluationError where the model cannot be asked."""


PROBES: Registry[Probe] = Registry(
    "probe",
    {
        "json": "gossamer.evaluate.probes.structured",
        "knowledge": "gossamer.evaluate.probes.knowledge",
        "retrieval": "gossamer.evaluate.probes.retrieval",
    },
)


@dataclass(frozen=True)
class ProbeScore:
    """Answers to a probe, item by item. ``measures``: by name, right or not, the strictest last; ``answers``:
    what was answered, equal where two answers are the same; ``groups``: by name, the label of each item;
    ``left_out``: items longer than the model's context. Raises EvaluationError where those are all."""

    measures: dict[str, tuple[bool, ...]]
    answers: tuple[str, ...]
    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    left_out: int = 0

    def __post_init__(self) -> None:
        if not self.answers:
            raise EvaluationError("all items of the probe are longer than the model's context")

    @property
    def items(self) -> int:
        return len(self.answers)

    def by(self, group: str, measure: str) -> dict[str, tuple[bool, ...]]:
        """The answers of each label of ``group``, by ``measure``."""
        labels, right = self.groups[group], self.measures[measure]
        found: dict[str, list[bool]] = {label: [] for label in labels}
        for label, one in zip(labels, right, strict=True):
            found[label].append(one)
        return {label: tuple(ones) for label, ones in found.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: shares with their 95 % Wilson intervals, groups, and every answer."""
        measures = {
            name: {**_share(right), "right": [int(x) for x in right]} for name, right in self.measures.items()
        }
        groups = {
            group: {
                label: {"items": labels.count(label)}
                | {measure: _share(self.by(group, measure)[label]) for measure in self.measures}
                for label in dict.fromkeys(labels)
            }
            for group, labels in self.groups.items()
        }
        return {
            "items": self.items,
            "measures": measures,
            "groups": groups,
            "answers": list(self.answers),
            "left_out": self.left_out,
        }


@dataclass(frozen=True)
class Change:
    """From one model's answers to another's: ``flips`` by measure, and ``agreement``, the share of items that
    both answer alike, right or wrong."""

    flips: dict[str, Flips]
    agreement: tuple[bool, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        told = {name: one.to_dict() for name, one in self.flips.items()}
        return {"flips": told, "agreement": _share(self.agreement)}


def changed(now: ProbeScore, before: ProbeScore) -> Change:
    """What changed between two models on the same items. Raises EvaluationError where the items differ, as
    those of models whose contexts are of other lengths may."""
    if now.groups != before.groups or now.items != before.items:
        raise EvaluationError("the two models were not asked the same items: their contexts differ in length")
    told = {name: flips(right, before.measures[name]) for name, right in now.measures.items()}
    alike = tuple(one == other for one, other in zip(now.answers, before.answers, strict=True))
    return Change(told, alike)


class TextReader:
    """Log-likelihoods of texts through a model's sessions; tokens are cut as lm-evaluation-harness cuts them:
    a context's own ones first, then what the whole has after so many."""

    def __init__(self, subject: Subject) -> None:
        self._tokenizer = subject.tokenizer
        self._positions = context_length(subject.model.config)
        self._read = LikelihoodReader(subject.session, self._positions)

    def fits(self, text: str) -> bool:
        """Whether the model's context holds all of ``text``."""
        return self._positions is None or len(self._ids(text)) <= self._positions

    def __call__(self, context: str, continuation: str) -> tuple[float, bool]:
        """log p(continuation | context) in nats, and whether greedy writing would give it."""
        start = self._ids(context)
        return self._read(start, self._ids(context + continuation)[len(start) :])

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self._tokenizer(text, verbose=False)["input_ids"]
        return found


def _share(right: Sequence[bool]) -> dict[str, Any]:
    return {"share": sum(right) / len(right), "interval": list(wilson(sum(right), len(right)))}
