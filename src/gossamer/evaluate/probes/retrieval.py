"""Retrieval: one of many facts that stand in the context, asked for by its key; by length and depth."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from gossamer.errors import EvaluationError
from gossamer.evaluate.probes.probe import PROBES, ProbeScore, Subject, TextReader
from gossamer.evaluate.probes.words import FIRST, LAST
from gossamer.progress import Progress

ITEMS = 200
CHOICES = 4
REPEATED = 3  # facts that stand again before the question: without them a small model writes none exactly


@PROBES.register(
    "retrieval", cite="Jaiswal et al. 2024, LLM-KICK, in-context retrieval; with facts made on the spot"
)
@dataclass(frozen=True)
class Retrieval:
    """Items are made from ``seed``, none of a file: ``facts`` in a context, ``depths`` of the one that is
    asked for (0: the first). *choice*: the right value is likelier than three others that stand in the
    context; *exact*: greedy writing gives it, digit by digit."""

    name: ClassVar[str]
    facts: tuple[int, ...] = (8, 32, 128)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    seed: int = 0

    def __post_init__(self) -> None:
        most = len(FIRST) * len(LAST)
        lengths = bool(self.facts) and min(self.facts) >= CHOICES and max(self.facts) <= most
        if not lengths or not self.depths or not all(0 <= depth <= 1 for depth in self.depths):
            raise EvaluationError(
                f"retrieval takes {CHOICES} to {most} facts at depths in [0, 1], one or more of each, got "
                f"{self.facts} and {self.depths}"
            )

    def check(self) -> None:
        """Nothing is needed."""

    def ask(self, subject: Subject, items: int | None, progress: Progress) -> ProbeScore:
        read, count = TextReader(subject), items or ITEMS
        choice, exact, answers, lengths, depths = [], [], [], [], []
        for number in range(count):
            progress("probe retrieval", number, count)
            facts = self.facts[number % len(self.facts)]
            depth = self.depths[number // len(self.facts) % len(self.depths)]
            context, values, gold = self.item(facts, depth, number)
            if not read.fits(f"{context} {values[gold]}"):
                continue
            found = [read(context, f" {value}") for value in values]
            picked = max(range(len(found)), key=lambda index: found[index][0])
            choice.append(picked == gold)
            exact.append(found[gold][1])
            answers.append(values[picked])
            lengths.append(f"{facts} facts")
            depths.append(f"depth {depth:g}")
        progress("probe retrieval", count, count)
        measures = {"choice": tuple(choice), "exact": tuple(exact)}
        groups = {"facts": tuple(lengths), "depth": tuple(depths)}
        return ProbeScore(measures, tuple(answers), groups, count - len(answers))

    def item(self, facts: int, depth: float, number: int) -> tuple[str, list[str], int]:
        """A context that ends before the value asked for, the choices, and the index of the right one."""
        chance = random.Random(f"retrieval {self.seed} {facts} {depth} {number}")
        people = chance.sample([f"{first} {last}" for first in FIRST for last in LAST], facts)
        codes = list(map(str, chance.sample(range(1000, 10_000), facts)))
        asked = round(depth * (facts - 1))
        values = [codes[asked], *chance.sample(codes[:asked] + codes[asked + 1 :], CHOICES - 1)]
        chance.shuffle(values)
        lines = [f"The code of {person} is {code}." for person, code in zip(people, codes, strict=True)]
        repeated = chance.sample(lines[:asked] + lines[asked + 1 :], REPEATED)
        context = "\n".join([*lines, "", *repeated, f"The code of {people[asked]} is"])
        return context, values, values.index(codes[asked])
