"""A miniature experiment: compress, tune where that is the matter, measure, keep the figures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from gossamer.claim import Experiment
from gossamer.dynamic.attention import POLICIES, attach
from gossamer.dynamic.cache import CACHES
from gossamer.dynamic.cache.through import Through
from gossamer.evaluate import evaluate
from gossamer.evaluate.logits import LogitReader
from gossamer.models.text import TextSource, calibration_windows, read_text
from gossamer.outputs import work_of
from gossamer.progress import Progress, silent
from gossamer.recipes.compress import compress
from gossamer.recipes.finetune import finetune
from gossamer.recipes.finetune_settings import FinetuneSettings
from gossamer.recipes.gate import gate
from gossamer.recipes.load import LoadedModel, load
from gossamer.recipes.measure import windows_for
from gossamer.recipes.shrink import ShrinkSettings, remove_blocks
from gossamer.report.code import code_of
from gossamer.report.texts import Texts, kept, label, subject, tuned_on


def figures(
    name: str, experiment: Experiment, texts: Texts, work: Path, progress: Progress = silent
) -> dict[str, Any]:
    """Perplexity, its windows, KL to the dense model, and seconds of one contender (None where it was made
    in several goes).

    They are kept in the folder ``work`` by all that they depend on, and read from there the next time; an
    interrupted compression or tuning goes on. Raises a GossamerError for whatever a person can mend.
    """
    asked = _asked(name, experiment, texts)

    def measure() -> dict[str, Any]:
        return _measured(name, experiment, texts, work, work / label(asked), progress)

    return kept(name, asked, work, progress, measure)


def _measured(
    name: str, experiment: Experiment, texts: Texts, work: Path, out: Path, progress: Progress
) -> dict[str, Any]:
    """The figures of a contender whose files are, or will be, ``out``."""
    if name in experiment.tuned or name in experiment.gated:
        figures(experiment.start, experiment, texts, work, progress)
    dense, reference = _dense(experiment.model)
    start = time.perf_counter()
    if name == "dense":
        measured: LoadedModel = dense
        seconds: float | None = 0.0
    elif name in experiment.attending or name in experiment.caching:
        measured = _at_run_time(name, experiment, texts.calibration)
        seconds = time.perf_counter() - start
    else:
        whole = not out.exists() and not work_of(out).exists()
        if not out.exists():
            _make(name, experiment, texts, work, out, progress)
        seconds = time.perf_counter() - start if whole else None
        measured = load(out, dtype="fast", engine="transformers", progress=progress)
    read = read_text(texts.measured, part="measure")
    length, count = texts.windows_of(experiment.length)
    windows = windows_for(dense, read, length, count)
    found = evaluate(measured.model, windows, reference=reference, first=experiment.first, progress=progress)
    return {
        "perplexity": found.perplexity,
        "kl": found.mean_kl,
        "nll": list(found.nll),
        "window_kl": None if found.kl is None else list(found.kl),
        "windows": [found.windows, found.seqlen],
        "text": read.label,
        "smoke_test": read.smoke or (name != "dense" and texts.calibration is None),
        "seconds": None if seconds is None else round(seconds, 1),
    }


def _make(name: str, experiment: Experiment, texts: Texts, work: Path, out: Path, progress: Progress) -> None:
    """The contender's files."""
    begun = work / label(_asked(experiment.start, experiment, texts))
    if name in experiment.shrunk:
        settings = experiment.seeded(experiment.shrunk[name])
        remove_blocks(experiment.model, out, calibration=texts.calibration, progress=progress, **settings)
    elif name in experiment.gated:
        settings = experiment.seeded(experiment.gated[name])
        gate(begun, out, text=texts.calibration, progress=progress, **settings)
    elif (tuning := experiment.tuning_of(name)) is not None:
        text = tuned_on(name, experiment, texts, work, progress)
        finetune(begun, out, text=text, teacher=experiment.model, progress=progress, **tuning)
    else:
        model, settings = _shrunk(experiment, texts, work, progress), experiment.settings(name)
        compress(model, out, calibration=texts.calibration, progress=progress, **{"method": name, **settings})


def _at_run_time(name: str, experiment: Experiment, calibration: TextSource) -> LoadedModel:
    """The dense model under a policy of attention, or with a cache."""
    found = load(experiment.model, dtype="fast", engine="transformers")
    settings = dict(experiment.attending.get(name) or experiment.caching[name])
    method = settings.pop("method", name)
    windows = calibration_windows(
        read_text(calibration), found.tokenizer, experiment.seqlen, experiment.windows, experiment.seed
    )
    if name in experiment.attending:
        attach(found.model, POLICIES[method].calibrated(found.model, windows, **settings))
        return found
    cache = CACHES[method].calibrated(found.model, windows, **settings)
    return replace(found, model=Through(found.model, cache, experiment.first))


@lru_cache(maxsize=1)
def _dense(model: str) -> tuple[LoadedModel, LogitReader]:
    """The dense model, and what reads its logits, for all contenders that are held against it."""
    dense = load(model, dtype="fast", engine="transformers")
    return dense, LogitReader(dense.model, "the dense model", remember=True)


def _shrunk(experiment: Experiment, texts: Texts, work: Path, progress: Progress) -> str | Path:
    """The model that contenders are made of."""
    if not experiment.blocks:
        return experiment.model
    seqlen = min(experiment.seqlen, 512)
    drawn = experiment.seeded({})
    asked = {"method": "shrunk", **subject(experiment.model), "blocks": experiment.blocks, "seqlen": seqlen}
    asked["code"] = code_of([ShrinkSettings().method])
    out = work / label({**asked, **drawn, "texts": texts.named})
    if not out.exists():
        remove_blocks(
            experiment.model,
            out,
            calibration=texts.calibration,
            blocks=experiment.blocks,
            seqlen=seqlen,
            progress=progress,
            **drawn,
        )
    return out


def _asked(name: str, experiment: Experiment, texts: Texts) -> dict[str, Any]:
    """All that the figures of a contender depend on."""
    kinds = ("shrunk", "gated", "attending", "caching")
    found = {kind: getattr(experiment, kind).get(name) for kind in kinds}
    others = {kind: made and experiment.seeded(made) for kind, made in found.items()}
    plain = name == "dense" or others["shrunk"] or others["attending"] or others["caching"]
    settings = None if plain else experiment.settings(name)
    asked = {"method": name, **subject(experiment.model), "settings": settings}
    tuning = experiment.tuning_of(name)
    tuned: dict[str, Any] = {} if tuning is None else {"tuning": tuning}
    if tuned or others["gated"]:
        tuned["start"] = _asked(experiment.start, experiment, texts)
    tuned |= {kind: made for kind, made in others.items() if made}
    if name in experiment.sampled:
        tuned["sampled"] = experiment.sampled[name]
    if name in experiment.rewritten:
        tuned["rewritten"] = [experiment.rewritten[name], experiment.answers]
    if experiment.blocks and name != "dense":
        tuned["blocks"] = experiment.blocks
    if others["attending"] or others["caching"]:
        tuned["calibrated"] = [experiment.windows, experiment.seqlen]
    if experiment.length is not None:
        tuned["measured"] = [experiment.length, experiment.first]
    return {**asked, "texts": texts.named, "code": code_of(_named(name, experiment)), **tuned}


def _named(name: str, experiment: Experiment) -> Iterator[str]:
    """Names of all methods that make a contender, what it is tuned from apart."""
    yield name
    if experiment.blocks and name != "dense":
        yield ShrinkSettings().method
    tuning = experiment.tuning_of(name)
    if tuning is not None:
        settings = FinetuneSettings(**tuning)
        yield from (settings.method, *settings.losses)
        if name in experiment.sampled:
            yield "continuations"
        if experiment.rewritten.get(name):
            yield "rewrites"
        return
    for kind in ("compressed", "shrunk", "gated", "attending", "caching"):
        made = getattr(experiment, kind).get(name, {})
        yield from (made[key] for key in ("method", "tune", "allocation") if key in made)
