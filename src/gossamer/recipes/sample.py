"""Text that a model writes itself, for others to be tuned on: sampled record by record into a jsonl file.

Work in progress lies in ``OUT.work``; the same call goes on where it stopped, with the same result.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, field_serializer, field_validator

from gossamer.calibrate import WorkFolder
from gossamer.errors import TextError
from gossamer.matrices.atomic import atomic_file, check_free, output_error
from gossamer.matrices.checksums import checksums_of
from gossamer.models.manifest import is_checkpoint
from gossamer.models.sampling import Sampling
from gossamer.models.session import context_length
from gossamer.models.sources import resolve
from gossamer.models.text import Exchange, Text, TextSource, read_text, tokenize
from gossamer.outputs import work_of
from gossamer.paths import expanded
from gossamer.progress import Progress, silent
from gossamer.recipes.fingerprint import files_of, made_with, sha256_of, surroundings
from gossamer.recipes.load import LoadedModel, load
from gossamer.recipes.settings import checked
from gossamer.tune.self_data import REWRITE, Continuations, Prompts, Rewrites, samples

MOST_SILENT = 100  # answers in a row without a token, after which sampling gives up
_LOG = "samples.jsonl"


class SampleSettings(BaseModel):
    """How much is sampled, and how: until ``tokens`` are drawn in all, at most ``max_new_tokens`` for each
    prompt of ``prompt_tokens`` (cut from a text), ``together`` of them at once; the rest is `Sampling`. The
    default draws from the model's own distribution, nothing left out.

    ``rewrite``: a jsonl file of objects with a ``prompt`` and a ``response``, whose answers are said in the
    model's own words in place of prompts cut from a text (records tell its name alone); ``dtype``: what a
    plain model computes in (as of `load`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    rewrite: Path | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16", "fast"] = "auto"
    tokens: int = Field(default=100_000, ge=1)
    prompt_tokens: int = Field(default=32, ge=1)
    max_new_tokens: int = Field(default=224, ge=1)
    together: int = Field(default=8, ge=1)
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = Field(default=0, ge=0)

    @field_validator("dtype", mode="before")
    @classmethod
    def _named(cls, dtype: Any) -> Any:
        return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype

    @field_serializer("rewrite")
    def _without_folder(self, rewrite: Path | None) -> str | None:
        return None if rewrite is None else rewrite.name

    def sampling(self) -> Sampling:
        """Raises SamplingError for a value out of its range."""
        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, seed=self.seed)


@dataclass(frozen=True)
class SampledText:
    """The finished file ``path``: ``records`` documents for which ``tokens`` were drawn in ``seconds`` (all
    runs together, but for loading and for what an interruption lost); ``own``: of a rewritten instruction
    set, the records whose answer is the model's (else None). ``made`` is what lies beside it as JSON."""

    path: Path
    records: int
    tokens: int
    seconds: float
    own: int | None
    made: dict[str, Any]
    resumed: bool
    smoke_test: bool


def sample(
    model: str | Path,
    out: str | Path,
    *,
    text: TextSource = None,
    progress: Progress = silent,
    **settings: Any,
) -> SampledText:
    """Lets ``model`` (anything that `load` takes) write a text into the new jsonl file ``out``, a line a
    document, and how it was made into ``out`` with ``.made.json`` behind.

    It continues prompts cut from ``text`` (as `compress` takes it), or says in its own words the answers of
    an instruction set (``rewrite``). The native decoder runs it where it can. ``settings`` are those of
    :class:`SampleSettings`. The same call gives the same bytes on the same machine. Raises a GossamerError
    for whatever a person can mend; an interrupted run leaves ``OUT.work``, and the same call resumes it.
    """
    chosen = checked(SampleSettings, settings)
    sampling, out = chosen.sampling(), Path(out)
    if text is not None and chosen.rewrite is not None:
        raise TextError("prompts are cut from a text, or come from an instruction set: give one of them")
    check_free(out)
    if not work_of(out).exists():  # an interrupted run may have written it
        check_free(_made_beside(out))
    if out.suffix != ".jsonl":
        raise TextError(f"what is written is jsonl: call it {out.name}.jsonl, else it is read as prose later")
    source = read_text(text) if chosen.rewrite is None else read_instructions(chosen.rewrite)
    loaded = load(model, dtype=chosen.dtype, pack_plain=True, progress=progress)
    prompts: Prompts
    if chosen.rewrite is not None:
        prompts, told = Rewrites(exchanges(source), loaded.tokenizer), source.sha256
        check_prompts(prompts, loaded.model.config, chosen.tokens)
    else:
        ids = tokenize(source, loaded.tokenizer)
        prompts = Continuations(ids, loaded.tokenizer, chosen.prompt_tokens, chosen.seed)
        told = sha256_of(ids)
    work = WorkFolder(work_of(out), _fingerprint(model, loaded, chosen, told))
    log = _Log(work.path / _LOG)
    total, number, own = chosen.tokens, len(log.records), isinstance(prompts, Rewrites)
    silent_ones = 0
    with work:
        progress("sampling", log.tokens, total)
        answers = samples(
            prompts,
            number,
            loaded.model,
            loaded.session,
            loaded.tokenizer,
            sampling,
            chosen.max_new_tokens,
            chosen.together,
        )
        start = time.perf_counter()
        while log.tokens < total:
            done = next(answers)
            seconds, start = time.perf_counter() - start, time.perf_counter()
            log.append({**done.record, "tokens": done.tokens, "seconds": seconds})
            progress("sampling", min(log.tokens, total), total)
            number += 1
            silent_ones = 0 if done.tokens else silent_ones + 1
            if silent_ones == MOST_SILENT:
                raise TextError(
                    f"{loaded.label} has nothing to say: it ended {MOST_SILENT} answers in a row before the "
                    "first token"
                )
    progress("sampling", total, total)
    data = _lines(log.records)
    kept = sum(bool(record["own"]) for record in log.records) if own else None
    made = {
        "job": "sample",
        "model": loaded.label,
        "engine": loaded.engine,
        "text": source.label,
        "text_sha256": source.sha256,
        "smoke_test": source.smoke,
        "records": number,
        "own": 1.0 if kept is None else round(kept / number, 4),
        "tokens": log.tokens,
        "sha256": hashlib.sha256(data).hexdigest(),
        "seconds": round(log.seconds, 3),
        "settings": chosen.model_dump(),
        "with": made_with(),
    }
    _write(out, data, made)
    work.remove()
    return SampledText(
        out, number, log.tokens, log.seconds, kept, made, work.resumed, bool(made["smoke_test"])
    )


def read_instructions(path: Path) -> Text:
    """The pairs of ``prompt`` and ``response`` of a jsonl file; raises TextError naming the line."""
    path = expanded(path)
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise TextError(f"cannot read the instruction set {path.name}: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            prompt, response = record["prompt"], record["response"]
        except (ValueError, TypeError, KeyError) as error:
            raise TextError(f"line {number} of {path.name} has no prompt and response: {error!r}") from error
        if not isinstance(prompt, str) or not isinstance(response, str) or not prompt.strip():
            raise TextError(
                f"line {number} of {path.name}: prompt and response are text, the prompt not empty"
            )
        pairs.append(Exchange(prompt, response))
    if not pairs:
        raise TextError(f"the instruction set {path.name} is empty")
    return Text(tuple(pairs), path.name)


def exchanges(text: Text) -> list[Exchange]:
    """The documents of ``text`` that are instructions with an answer."""
    return [document for document in text.documents if isinstance(document, Exchange)]


def check_prompts(prompts: Rewrites, config: Any, most: int) -> None:
    """Raises TextError where one of the first ``most`` prompts is longer than the context of a model."""
    limit = context_length(config)
    if limit is None:
        return
    for index, pair in enumerate(prompts.pairs[:most]):
        # a character is at most four tokens; half of the context is room enough for the chat form
        if 4 * len(REWRITE + pair.prompt + pair.response) <= limit // 2:
            continue
        if (tokens := len(prompts.prompt(index))) > limit:
            raise TextError(
                f"instruction {index + 1} and its answer are a prompt of {tokens:,} tokens, but the model "
                f"knows only {limit:,} positions: leave it out"
            )


def read_made(samples: Path) -> dict[str, Any]:
    """How the text ``samples`` that `sample` wrote was made, but for the seconds: the same for the same text.
    Raises TextError where it is not said beside it, or of another text."""
    beside = _made_beside(samples)
    try:
        made: dict[str, Any] = json.loads(beside.read_text())
        made.pop("seconds")
        same = made["sha256"] == checksums_of(samples).sha256
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TextError(f"{beside.name} does not say how {samples.name} was made: {error!r}") from error
    if not same:
        raise TextError(f"{samples.name} is not the text that {beside.name} tells of")
    return made


class _Log:
    """Records as they come, a line each, only ever appended to; a line that a kill cut off is dropped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self.tokens, self.seconds, whole = 0, 0.0, 0
        for line in path.read_bytes().splitlines(keepends=True) if path.exists() else ():
            if not line.endswith(b"\n"):
                break
            whole += len(line)
            self._count(json.loads(line))
        if path.exists():
            os.truncate(path, whole)

    def append(self, record: dict[str, Any]) -> None:
        try:
            with open(self.path, "ab") as file:
                file.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise output_error(error, self.path, None) from error
        self._count(record)

    def _count(self, record: dict[str, Any]) -> None:
        self.records.append(record)
        self.tokens += record["tokens"]
        self.seconds += record["seconds"]


def _made_beside(out: Path) -> Path:
    return out.with_name(out.name + ".made.json")


def _lines(records: list[dict[str, Any]]) -> bytes:
    told = ({key: value for key, value in record.items() if key != "seconds"} for record in records)
    return b"".join(json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in told)


def _write(out: Path, data: bytes, made: dict[str, Any]) -> None:
    with atomic_file(_made_beside(out)) as file:
        file.write(json.dumps(made, indent=2).encode() + b"\n")
    with atomic_file(out) as file:
        file.write(data)


def _fingerprint(
    model: str | Path, loaded: LoadedModel, settings: SampleSettings, prompts: str
) -> dict[str, Any]:
    """All that the result depends on, so that resumed work is never mixed with other work."""
    path = expanded(model)
    files = files_of(path if is_checkpoint(path) else resolve(str(model)).folder)
    return {
        "settings": settings.model_dump(exclude={"together"}),  # which changes nothing but the speed
        "model": [loaded.label, files],
        "prompts": prompts,
        "engine": loaded.engine,
        **surroundings(),
    }
