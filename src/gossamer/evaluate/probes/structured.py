"""Structured output: a text's facts written as JSON, after examples. Does compression break JSON?"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.evaluate.probes.probe import PROBES, ProbeScore, Subject, TextReader
from gossamer.evaluate.probes.words import CITIES, FIRST, LAST, THINGS
from gossamer.progress import Progress

ITEMS = 200
TOKENS = 96  # of an answer at most; right ones take about 40
Record = dict[str, Any]


@PROBES.register(
    "json", cite="none; the question of LLM-KICK (Jaiswal et al. 2024), put to structured output"
)
@dataclass(frozen=True)
class Structured:
    """Items are made from ``seed``: ``examples`` texts with their JSON, of the same kind of record as the
    one that is asked for or, every second time, of the other kinds. The model writes greedily, a line."""

    name: ClassVar[str]
    examples: int = 3
    seed: int = 0

    def check(self) -> None:
        """Nothing is needed."""

    def ask(self, subject: Subject, items: int | None, progress: Progress) -> ProbeScore:
        read, count = TextReader(subject), items or ITEMS
        found: dict[str, list[bool]] = {"valid JSON": [], "keys and types": [], "values": []}
        every = [self.item(number) for number in range(count)]
        asked = [item for item in every if read.fits(f"{item[0]} {json.dumps(item[1])}")]
        prompts = [prompt for prompt, _, _ in asked]
        said = subject.generate_each(prompts, TOKENS, stop="\n", chat=False)
        answers: list[str] = []
        labels: list[str] = []
        for (_, expected, label), written in zip(asked, said, strict=True):
            progress("probe json", len(answers), count)
            record = parsed(written)
            found["valid JSON"].append(record is not None)
            alike = shape(record) == shape(expected)
            found["keys and types"].append(alike)
            found["values"].append(alike and record == expected)
            answers.append(written.strip() if record is None else same_text(record))
            labels.append(label)
        progress("probe json", count, count)
        measures = {name: tuple(right) for name, right in found.items()}
        return ProbeScore(measures, tuple(answers), {"examples": tuple(labels)}, count - len(answers))

    def item(self, number: int) -> tuple[str, Record, str]:
        """The prompt of item ``number``, the record that is asked for, and whose kind its examples are of."""
        chance = random.Random(f"json {self.seed} {number}")
        asked = KINDS[number // 2 % len(KINDS)]
        others = [kind for kind in KINDS if kind is not asked]
        same = number % 2 == 0
        shown = [asked if same else others[i % len(others)] for i in range(self.examples)]
        told = [kind(chance) for kind in (*shown, asked)]
        parts = [_turn(text, record) + f" {json.dumps(record)}\n\n" for text, record in told[:-1]]
        text, record = told[-1]
        return "".join(parts) + _turn(text, record), record, "same kind" if same else "other kinds"


def _turn(text: str, record: Record) -> str:
    return f"Text: {text}\nKeys: {', '.join(record)}\nJSON:"


def _person(chance: random.Random) -> tuple[str, Record]:
    name, age, city = chance.choice(FIRST), chance.randrange(18, 90), chance.choice(CITIES)
    likes = chance.sample(THINGS, 2)
    text = f"{name} is {age} years old, lives in {city} and likes {likes[0]}s and {likes[1]}s."
    return text, {"name": name, "age": age, "city": city, "likes": [f"{one}s" for one in likes]}


def _order(chance: random.Random) -> tuple[str, Record]:
    name, count, item = chance.choice(LAST), chance.randrange(2, 20), chance.choice(THINGS)
    price, paid = chance.randrange(4, 400) / 4, chance.random() < 0.5
    text = f"{name} ordered {count} {item}s for {price:.2f} dollars and has {'' if paid else 'not '}paid."
    return text, {"customer": name, "item": f"{item}s", "count": count, "price": price, "paid": paid}


def _trip(chance: random.Random) -> tuple[str, Record]:
    start, end = chance.sample(CITIES, 2)
    hour, minute, hours = chance.randrange(10, 24), chance.randrange(10, 60), chance.randrange(2, 12)
    text = f"The train from {start} to {end} leaves at {hour}:{minute} and takes {hours} hours."
    return text, {"from": start, "to": end, "departure": f"{hour}:{minute}", "hours": hours}


def _book(chance: random.Random) -> tuple[str, Record]:
    first, last, thing = chance.choice(FIRST), chance.choice(LAST), chance.choice(THINGS)
    title, year = f"The {thing} of {chance.choice(CITIES)}", chance.randrange(1950, 2020)
    text = f'"{title}" was written by {first} {last} in {year}.'
    return text, {"title": title, "author": {"first": first, "last": last}, "year": year}


KINDS: tuple[Callable[[random.Random], tuple[str, Record]], ...] = (_person, _order, _trip, _book)


def same_text(record: Record) -> str:
    """JSON that is equal where two records are: keys in order, and 5.0 written as 5."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [plain(inner) for inner in value]
        return int(value) if isinstance(value, float) and value.is_integer() else value

    return json.dumps(plain(record), sort_keys=True)


def parsed(text: str) -> Record | None:
    """The JSON object that ``text`` is, strictly (no NaN, no key twice), or None."""
    try:
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_never)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _once(pairs: list[tuple[str, Any]]) -> Record:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice")
    return found


def _never(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")


def shape(value: Any) -> Any:
    """Keys and types of a JSON value: equal for values that differ in texts, numbers and lengths alone."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    if isinstance(value, list):
        kinds = [shape(inner) for inner in value]
        return ["list", *(kind for index, kind in enumerate(kinds) if kind not in kinds[:index])]
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    return "number" if isinstance(value, (int, float)) else "text"
