"""The texts of a miniature experiment: those given, and those that contenders are tuned on."""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from gossamer import kernels
from gossamer.calibrate import fast_dtype
from gossamer.claim import Experiment
from gossamer.matrices.atomic import atomic_file
from gossamer.matrices.checksums import checksums_of
from gossamer.models.sources import resolve
from gossamer.models.text import TextSource, read_text
from gossamer.progress import Progress
from gossamer.recipes.sample import sample
from gossamer.report.code import code_of
from gossamer.version import VERSION

ASKED, ANSWERED = 30, 60  # words of an instruction, and of what follows it in the text
ANSWER_TOKENS = 192  # of an answer in own words, at most: half of them end before
PLACES = 100  # that are tried for a response
INSTRUCTION = "Go on with this text, in its manner:\n\n"


@dataclass(frozen=True)
class Texts:
    """What contenders are calibrated and measured on (None: the prose inside Python, a smoke test), and on
    how many windows of ``seqlen`` tokens they are measured."""

    calibration: TextSource = None
    measured: TextSource = None
    windows: int = 20
    seqlen: int = 2048

    def windows_of(self, length: int | None) -> tuple[int, int]:
        """Tokens of a window, and how many there are: about as many tokens of another ``length``."""
        if length is None:
            return self.seqlen, self.windows
        return length, max(1, self.windows * self.seqlen // length)

    @cached_property
    def named(self) -> dict[str, Any]:
        """Texts by what they say."""
        found = asdict(self)
        return found | {key: source and digest(source) for key, source in found.items() if key in _SOURCES}


_SOURCES = ("calibration", "measured")


def digest(source: TextSource) -> str:
    """What tells a text from others."""
    return read_text(source).sha256


def subject(model: str) -> dict[str, Any]:
    """What figures of ``model`` depend on whatever is made of it: its weights, what they are multiplied in on
    this machine, and the release."""
    machine = {"in": str(fast_dtype()), "isa": kernels.isa()}
    return {"model": model, "weights": _weights(model), "version": VERSION, **machine}


@lru_cache
def _weights(model: str) -> str:
    found = hashlib.sha256()
    for path in sorted(resolve(model).folder.glob("*.safetensors")):
        found.update(checksums_of(path).sha256.encode())
    return found.hexdigest()


def label(asked: dict[str, Any]) -> str:
    """What the files of a contender, or of a text, are called that depends on all of ``asked``."""
    key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]
    return f"{asked['method']}-{key}"


def kept(
    name: str, asked: dict[str, Any], work: Path, progress: Progress, measure: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The figures of a contender that depends on all of ``asked``, from the folder ``work``; where it has
    none they are measured and kept there."""
    file = work / f"{label(asked)}.json"
    if file.exists():
        progress(f"{name}: figures as kept in {work.name}", 1, 1)
        return dict(json.loads(file.read_text(encoding="utf-8")))
    text = json.dumps({"asked": asked, **measure()}, indent=1)
    with atomic_file(file) as beside:
        beside.write(text.encode())
    return dict(json.loads(text))


def forget(work: Path) -> None:
    """Removes what the folder ``work`` holds under names that `label` gives, and leaves all else."""
    for path in work.glob("*"):
        if re.fullmatch(r"\w+-[0-9a-f]{16}(\.\w+)*", path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def tuned_on(name: str, experiment: Experiment, texts: Texts, work: Path, progress: Progress) -> TextSource:
    """What a contender is tuned on: the calibration text, what the dense model makes of its beginnings, or
    instructions cut from it with answers, made once in the folder ``work``."""
    drawn = experiment.seeded({})
    asked: dict[str, Any] = {"method": "sampled", **subject(experiment.model), **drawn}
    if name in experiment.sampled:
        asked["tokens"] = tokens = experiment.sampled[name]
        asked["code"] = code_of(["continuations"])
        out = work / f"{label({**asked, 'texts': texts.named})}.jsonl"
        if not out.exists():
            sample(experiment.model, out, text=texts.calibration, tokens=tokens, progress=progress, **drawn)
        return out
    if name not in experiment.rewritten:
        return texts.calibration
    sizes = [experiment.answers, ASKED, ANSWERED, ANSWER_TOKENS, PLACES]
    asked |= {"method": "answered", "own": experiment.rewritten[name], "sizes": sizes}
    asked["code"] = code_of(["rewrites"])
    out = work / f"{label({**asked, 'texts': texts.named})}.jsonl"
    if not out.exists():
        pairs = instructions(texts.calibration, experiment.answers, experiment.seed)
        if experiment.rewritten[name]:
            asking = out.with_suffix(".pairs")
            _write(asking, pairs)
            tokens = experiment.answers * ANSWER_TOKENS
            options = {"tokens": tokens, "max_new_tokens": ANSWER_TOKENS, **drawn}
            sample(experiment.model, out, rewrite=asking, progress=progress, **options)
        else:
            _write(out, pairs)
    return out


def instructions(source: TextSource, count: int, seed: int) -> list[dict[str, str]]:
    """Pairs of ``prompt`` and ``response`` from random places of a text: go on with some of its words.

    Responses hold no digits, where the text has such places: of `Rewrites` an answer in other words must come
    to the same number, which is the result of a calculation, but of prose no more than its last date."""
    words = read_text(source).joined.split()
    draw, length = random.Random(seed), ASKED + ANSWERED
    pairs = []
    for _ in range(count):
        for _ in range(PLACES):
            begin = draw.randint(0, max(0, len(words) - length))
            piece = words[begin : begin + length]
            asked, answer = " ".join(piece[:ASKED]), " ".join(piece[ASKED:])
            if not any(map(str.isdigit, answer)):
                break
        pairs.append({"prompt": INSTRUCTION + asked, "response": answer})
    return pairs


def _write(path: Path, records: list[dict[str, str]]) -> None:
    with atomic_file(path) as out:
        out.write("".join(json.dumps(record) + "\n" for record in records).encode())
