"""Applies a recipe: its stages one after the other, each resumable, the recipe kept in what comes out."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gossamer.calibrate import WorkFolder
from gossamer.matrices.atomic import atomic_file, check_free, output_error, sync_folder
from gossamer.matrices.values import value_type
from gossamer.models.export import export_dense
from gossamer.models.manifest import MANIFEST, read_manifest, render_manifest
from gossamer.outputs import work_of
from gossamer.progress import Progress, silent
from gossamer.recipes.compress import compress
from gossamer.recipes.finetune import finetune
from gossamer.recipes.fingerprint import files_of, surroundings
from gossamer.recipes.prepare import Prepared, needs_text
from gossamer.recipes.sample import read_made, sample
from gossamer.recipes.shrink import remove_blocks

SAMPLES = "samples.jsonl"


@dataclass(frozen=True)
class Applied:
    """The finished checkpoint; how it was made (as in its gossamer.json, ``recipe`` among it, and
    ``sampled``, of a text that was tuned on and is not kept); seconds of each stage that ran now, and whether
    earlier work was found."""

    path: Path
    made: dict[str, Any]
    seconds: dict[str, float]
    resumed: bool


def apply_recipe(prepared: Prepared, *, progress: Progress = silent) -> Applied:
    """Runs the stages of a recipe that `prepare` has checked, and gives the last one's checkpoint its name.

    Work in progress lies in ``OUT.work``; after an interruption the same call goes on where it stopped, with
    the same result to the bit (for budgets in minutes: with as good a one). Raises ResumeError where that
    folder holds work of another recipe, model, text or machine, and what the stages raise.
    """
    work = WorkFolder(work_of(prepared.out), _fingerprint(prepared))
    seconds, last, told = {}, Path(prepared.model), {"recipe": prepared.record}
    with work:
        for stage in prepared.recipe.stages:
            folder = work.path / stage_folder(prepared, stage)
            if not folder.exists():
                start = time.perf_counter()
                _run(prepared, stage, last, folder, progress)
                seconds[stage] = time.perf_counter() - start
            if stage == "sample":
                told["sampled"] = read_made(folder)
                continue
            if stage == "quantize":  # what it began with is not kept
                before = read_manifest(last).made
                told |= {key: before[key] for key in ("model", "pattern", "tuned") if key in before}
            last = folder
        made = _sign(last, told)
        _rename(last, prepared.out)
    work.remove()
    return Applied(prepared.out, made, seconds, work.resumed)


def stage_folder(prepared: Prepared, stage: str) -> str:
    """The name of what a stage makes, by which the next one's record calls its model or text."""
    if stage != "shrink":
        return SAMPLES if stage == "sample" else stage
    return re.sub(r"[^\w.-]", "-", prepared.source.label) + "-shorter"


def _run(prepared: Prepared, stage: str, before: Path, out: Path, progress: Progress) -> None:
    """One stage, by the function that a person would call."""
    recipe, text = prepared.recipe, prepared.text
    source = prepared.model if before == Path(prepared.model) else before
    settings = dict(getattr(recipe, stage).compress() if stage == "quantize" else getattr(recipe, stage))
    if stage == "shrink":
        remove_blocks(source, out, calibration=text, progress=progress, **settings)
    elif stage == "compress":
        compress(source, out, calibration=text, progress=progress, **settings)
    elif stage == "quantize":
        plain = out.with_name("plain")
        if not plain.exists():
            dtype = "bfloat16" if value_type(recipe.compress.values).name == "bfloat16" else "float32"
            export_dense(before, plain, dtype, progress=progress)
        compress(plain, out, calibration=text, progress=progress, **settings)
    elif stage == "sample":
        text = text if prepared.instructions is None else None
        sample(prepared.model, out, text=text, progress=progress, **settings)
    else:
        text = text if recipe.sample is None else out.with_name(SAMPLES)
        finetune(before, out, text=text, teacher=prepared.model, progress=progress, **settings)


def _fingerprint(prepared: Prepared) -> dict[str, Any]:
    """All that the result depends on; each stage's own work says the same of itself."""
    return {
        "recipe": prepared.record,
        "model": files_of(prepared.source.folder),
        "text": prepared.read.sha256 if needs_text(prepared.recipe) else None,
        "instructions": None if prepared.instructions is None else prepared.instructions.sha256,
        **surroundings(),
    }


def _sign(folder: Path, told: dict[str, Any]) -> dict[str, Any]:
    """Puts ``told`` into a checkpoint's gossamer.json; what that then says of how it was made."""
    manifest = read_manifest(folder)
    made = {**manifest.made, **told}
    data = render_manifest(manifest.model_copy(update={"made": made}))
    with atomic_file(folder / MANIFEST, needed=len(data)) as file:
        file.write(data)
    return made


def _rename(folder: Path, out: Path) -> None:
    check_free(out)
    try:
        if out.exists():
            out.rmdir()
        os.rename(folder, out)
        sync_folder(out.parent)
    except OSError as error:
        raise output_error(error, out, None) from error
