"""Quality, speed and plans of models as a user names them: loaded, and measured side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.bench import Plan, Profile, SpeedComparison, compare_speed
from gossamer.bench import plan as _plan
from gossamer.bench import profile as _profile
from gossamer.engine import NativeSession
from gossamer.engine.caches import CacheKind
from gossamer.errors import EvaluationError
from gossamer.evaluate import Quality, compare
from gossamer.models.manifest import is_checkpoint
from gossamer.models.session import SessionFactory, context_length
from gossamer.models.skeleton import skeleton
from gossamer.models.sources import resolve
from gossamer.models.text import Text, evaluation_windows, read_text
from gossamer.paths import expanded
from gossamer.progress import Progress, silent
from gossamer.recipes.load import Engine, LoadedModel, check_context, load

WINDOWS = 20  # of 2,048 tokens: enough to see a difference of a percent or two, in a minute for a small model
SEQLEN = 2048


@dataclass(frozen=True)
class MeasuredQuality:
    """What was measured of ``model``. ``against``: the dense model, if any; ``text``: what both read;
    ``smoke``: it is the prose inside Python, on which a figure is no measurement but a smoke test."""

    model: str
    against: str | None
    text: str
    smoke: bool
    quality: Quality

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        told = {"model": self.model, "against": self.against, "text": self.text, "smoke_test": self.smoke}
        return {**told, **self.quality.to_dict()}


def quality(
    model: str | Path | LoadedModel,
    *,
    against: str | Path | LoadedModel | None = None,
    text: str | Path | Sequence[str] | None = None,
    windows: int | None = WINDOWS,
    seqlen: int | None = None,
    first: int = 0,
    dtype: torch.dtype | str = "auto",
    attention: str | Path | None = None,
    progress: Progress = silent,
) -> MeasuredQuality:
    """Perplexity of ``model``, and its distance to the dense model ``against``.

    ``text``: a file, folder, jsonl or list of strings; None takes the built-in prose that calibration never
    sees. ``windows``: at most so many of ``seqlen`` tokens (None: 2,048, or the model's context where that is
    shorter), from the text's start without overlap; None = all. ``first``: only predictions from this
    position of each window on count. Of what is not loaded yet:
    ``dtype`` of models that are no checkpoints; ``attention``, a policy that ``model`` looks at some of the
    keys by (`load`). Raises a GossamerError for whatever a person can mend.
    """
    read = read_text(text, part="measure")
    if isinstance(model, LoadedModel):
        loaded = model
    else:  # it is the transformers model that is measured
        engine: Engine = "auto" if attention is None else "transformers"
        loaded = load(model, dtype=dtype, engine=engine, attention=attention, progress=progress)
    ids = windows_for(loaded, read, seqlen, windows)
    dense = None
    if against is not None:
        dense = against if isinstance(against, LoadedModel) else load(against, dtype=dtype, progress=progress)
    reference = None if dense is None else dense.model
    if dense is not None and not torch.equal(windows_for(dense, read, ids.shape[1], windows), ids):
        raise EvaluationError(
            f"{dense.title} cuts the text into other tokens than {loaded.title}: they are no versions of one "
            "model"
        )
    measured = compare({loaded.title: loaded.model}, ids, reference=reference, first=first, progress=progress)
    return MeasuredQuality(
        loaded.title, None if dense is None else dense.title, read.label, read.smoke, measured[loaded.title]
    )


def windows_for(loaded: LoadedModel, text: Text, seqlen: int | None, windows: int | None) -> Tensor:
    """Windows of ``text`` in the model's tokens, ``seqlen`` as for `quality`; raises ModelError where they
    are longer than its context."""
    if seqlen is None:
        seqlen = min(SEQLEN, context_length(loaded.model.config) or SEQLEN)
    check_context(loaded.model.config, seqlen, loaded.label)
    return evaluation_windows(text, loaded.tokenizer, seqlen, windows)


def speed(
    *models: str | Path | LoadedModel,
    prompt: int = 512,
    decode: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    dtype: torch.dtype | str = "fast",
    huge_pages: bool = False,
    engine: Engine = "auto",
    cache: CacheKind | Path = "bfloat16",
    attention: str | Path | None = None,
    progress: Progress = silent,
) -> SpeedComparison:
    """Prompt and decode speed of ``models`` side by side, round by round; ratios are to the first.

    Of those not loaded: ``dtype`` of models that are no checkpoints, by default that in which a dense model
    is fastest here; ``huge_pages``, ``engine``, ``cache``, ``attention``: see `load`. Raises a
    GossamerError for whatever a person can mend.
    """
    options: dict[str, Any] = {"dtype": dtype, "huge_pages": huge_pages, "engine": engine, "cache": cache}
    options |= {"attention": attention, "progress": progress}
    loaded = [m if isinstance(m, LoadedModel) else load(m, **options) for m in models]
    found: dict[str, nn.Module] = {}
    sessions: dict[str, SessionFactory] = {}
    engines: dict[str, str] = {}
    for one in loaded:
        name = one.title if one.title not in found else f"{one.title} ({len(found) + 1})"
        found[name], sessions[name], engines[name] = one.model, one.session, one.engine
    measured = compare_speed(
        found,
        prompt=prompt,
        decode=decode,
        repeats=repeats,
        threads=threads,
        sessions=sessions,
        progress=progress,
    )
    return replace(measured, engines=engines)


def profile(
    model: str | Path | LoadedModel,
    *,
    prompt: int = 512,
    decode: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    dtype: torch.dtype | str = "fast",
    huge_pages: bool = False,
    cache: CacheKind | Path = "bfloat16",
    progress: Progress = silent,
) -> Profile:
    """Where a token's time goes in the native decoder, of the prompt and after it; see
    :func:`gossamer.bench.profile`. ``dtype``, ``huge_pages``, ``cache``: see `speed` and `load`.
    Raises a GossamerError for whatever a person can mend, such as a model that the decoder cannot run.
    """
    if not isinstance(model, LoadedModel):
        options: dict[str, Any] = {"dtype": dtype, "huge_pages": huge_pages, "cache": cache}
        model = load(model, engine="native", progress=progress, **options)
    if model.attention is not None:
        raise EvaluationError(f"a profile is of attention to everything, and {model.title} looks at less")
    session = model.session()
    if not isinstance(session, NativeSession):
        raise EvaluationError(
            f"a profile is of the native decoder, but {model.label} runs in another engine ({model.engine})"
        )
    return _profile(
        session.decoder,
        prompt=prompt,
        decode=decode,
        repeats=repeats,
        threads=threads,
        cache=session.cache,
        progress=progress,
    )


def plan(
    model: str | Path | LoadedModel,
    *,
    prompt: int = 512,
    decode: int = 64,
    values: str | None = None,
    pattern: str | None = None,
    sparsity: float | None = None,
    group: int = 64,
    zeros: float | None = None,
    threads: int | None = None,
    refresh: bool = False,
    progress: Progress = silent,
) -> Plan:
    """The layouts that are fastest on this machine for each kind of layer of a checkpoint, or of any other
    model once it has ``values`` in ``pattern`` at ``sparsity`` (of that only shapes are read, not weights).
    See :func:`gossamer.bench.plan`. Raises a GossamerError for whatever a person can mend.
    """
    return _plan(
        _planned(model, progress),
        prompt=prompt,
        decode=decode,
        values=values,
        pattern=pattern,
        sparsity=sparsity,
        group=group,
        zeros=zeros,
        threads=threads,
        refresh=refresh,
        progress=progress,
    )


def _planned(model: str | Path | LoadedModel, progress: Progress) -> nn.Module:
    found: nn.Module
    if isinstance(model, LoadedModel):
        found = model.model
    elif is_checkpoint(expanded(model)):
        found = load(model, engine="transformers", progress=progress).model
    else:
        found = skeleton(resolve(str(model), progress=progress).folder)
    return found
