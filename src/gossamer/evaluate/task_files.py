"""Zero-shot tasks on disk: questions with choices, one JSON object a line; the fixed few that are asked."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.errors import EvaluationError
from gossamer.paths import expanded

ITEMS = 200
ANSWER = "\nAnswer:"
# what stands between a question and its choice, as lm-evaluation-harness's own tasks of these names ask
TASKS = {"arc_easy": ANSWER, "piqa": ANSWER, "openbook_qa": "", "winogrande": "", "boolq": ANSWER}


@dataclass(frozen=True)
class Item:
    """One question. ``contexts`` and ``continuations``: one of each for every choice, either the same context
    with several continuations or several contexts with the same; ``gold``: the index of the right choice."""

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


@dataclass(frozen=True)
class TaskItems:
    """The ``items`` of a task that are asked, of ``total`` in its file, and the file's sha256."""

    name: str
    items: tuple[Item, ...]
    total: int
    sha256: str

    def source(self) -> dict[str, Any]:
        """Where the items come from, plain values for JSON."""
        return {"file_sha256": self.sha256}


def read_task(name: str, items: int | None = ITEMS) -> TaskItems:
    """The task ``name`` (one of TASKS, in the folder ``$GOSSAMER_DATA/llm_tasks``) or the ``.jsonl`` file
    of that path, gzipped or not.

    Lines are ``{"query", "choices", "gold"}``, or ``{"context_options", "continuation", "gold"}`` where
    the choices are contexts. ``items``: so many, spread evenly over the file, always the same; None: all.
    Raises EvaluationError for unknown names, missing and damaged files.
    """
    if items is not None and items < 1:
        raise EvaluationError(f"a task needs at least one item, got {items}")
    path = _find(name)
    data = _read(path)
    rows = [(number, line) for number, line in enumerate(data.split(b"\n"), 1) if line.strip()]
    if not rows:
        raise EvaluationError(f"{path.name} holds no items")
    total = len(rows)
    label = _label(path)
    ends_with = TASKS.get(name, "")
    chosen = [_item(*rows[index], path.name, ends_with) for index in spread(total, items)]
    if len({len(set(item.contexts)) > 1 for item in chosen}) > 1:
        raise EvaluationError(f"{path.name} mixes choices of continuations with choices of contexts")
    return TaskItems(label, tuple(chosen), total, _sha256(data))


def spread(total: int, items: int | None) -> tuple[int, ...]:
    """So many places of ``total``, evenly apart and always the same; None, or more than there are: all."""
    count = total if items is None else min(items, total)
    return tuple(index * total // count for index in range(count))


def check_tasks(names: Sequence[str]) -> None:
    """Raises EvaluationError where one of ``names`` is no task, its file is missing, or two are one."""
    if not names:
        raise EvaluationError(f"name at least one task of {', '.join(TASKS)}, or a .jsonl file")
    labels = [_label(_find(name)) for name in names]
    for label in labels:
        if labels.count(label) > 1:
            raise EvaluationError(f"the task {label} is named twice")


def _label(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".jsonl")


def _find(name: str) -> Path:
    if name.endswith((".jsonl", ".jsonl.gz")):
        path = expanded(name)
        if not path.is_file():
            raise EvaluationError(f"there is no task file {path.name}")
        return path
    if name not in TASKS:
        raise EvaluationError(
            f"unknown task {name!r} (there are: {', '.join(TASKS)}; or give a .jsonl file of your own, or "
            f"harness:{name} for a task of lm-evaluation-harness's own)"
        )
    data = os.environ.get("GOSSAMER_DATA")
    if not data:
        raise EvaluationError(
            f"the task {name} lies in $GOSSAMER_DATA/llm_tasks/{name}.jsonl, and GOSSAMER_DATA is not set"
        )
    for suffix in (".jsonl", ".jsonl.gz"):
        path = Path(data, "llm_tasks", name + suffix)
        if path.is_file():
            return path
    raise EvaluationError(f"the task {name} has no file llm_tasks/{name}.jsonl(.gz) in GOSSAMER_DATA")


def _read(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if path.name.endswith(".gz") else data
    except (OSError, EOFError, zlib.error) as error:
        raise EvaluationError(f"cannot read the task file {path.name}: {error}") from error


def _item(number: int, line: bytes, file: str, ends_with: str) -> Item:
    where = f"line {number} of {file}"
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where} is no JSON: {error}") from error
    row = row if isinstance(row, dict) else {}
    query, choices = row.get("query"), row.get("choices")
    options, continuation, gold = row.get("context_options"), row.get("continuation"), row.get("gold")
    if _text(query) and _texts(choices):
        contexts, ends = (query.rstrip() + ends_with,) * len(choices), tuple(choices)
    elif _text(continuation) and _texts(options):
        contexts, ends = tuple(options), (continuation,) * len(options)
    else:
        raise EvaluationError(
            f"{where} is no question: it needs query and two or more choices, or continuation and two or "
            "more context_options, all of them text"
        )
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(ends):
        raise EvaluationError(
            f"{where}: gold must be the index of one of its {len(ends)} choices, not {gold!r}"
        )
    return Item(contexts, ends, gold)


def _text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _texts(value: Any) -> bool:
    return isinstance(value, list) and len(value) > 1 and all(map(_text, value))


def _sha256(data: bytes) -> str:
    import hashlib

    return hashlib.sha256(data).hexdigest()
