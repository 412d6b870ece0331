"""`gossamer shrink`: a model with fewer blocks."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.compress import SMOKE
from gossamer.cli.guard import guarded, resumable
from gossamer.cli.progress import duration, progress
from gossamer.outputs import work_of


@guarded
def shrink(
    model: options.DenseModel,
    out: Annotated[Path, typer.Option("--out", "-o", help="The model folder to make; must not exist.")],
    method: Annotated[
        str, typer.Option(help="angular (a run of blocks), influence (single ones) or loss (by perplexity).")
    ] = "angular",
    blocks: Annotated[
        float, typer.Option(help="Blocks to remove: a number, or below 1 a share of them.")
    ] = 0.25,
    calibration: Annotated[list[Path] | None, options.text_option("--calibration", verb="choose")] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens a calibration window.")] = 512,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Calibration windows.", show_default="64; 8 for loss")
    ] = None,
    seed: options.WindowSeed = 0,
    option: options.MethodOption = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Remove whole blocks of MODEL; OUT is a plain model folder, for `compress`, `eval` or transformers.

    Ctrl-C keeps what was measured in OUT.work; the same command goes on from there, with the same result.
    """
    chosen = options.parse_options(option or ())
    options.use_threads(threads)
    start = time.perf_counter()
    with resumable(work_of(out)), progress() as report:
        from gossamer.recipes.describe import weight_bytes
        from gossamer.recipes.shrink import remove_blocks as run

        made = run(
            model,
            out,
            calibration=calibration,
            progress=report,
            method=method,
            blocks=blocks,
            seqlen=seqlen,
            windows=windows,
            seed=seed,
            options=chosen,
        )
    seconds, size = time.perf_counter() - start, weight_bytes(made.path)
    if as_json:
        show.document({"out": str(made.path), "seconds": seconds, "weight_file_bytes": size, **made.record})
        return
    rows = [
        ("blocks", f"{len(made.removed)} of {made.record['blocks']} removed"),
        ("removed", ", ".join(map(str, made.removed))),
        ("weights", show.size(size)),
        ("took", duration(seconds)),
    ]
    following = shlex.join(["gossamer", "eval", str(made.path), "--against", model])
    smoke = [SMOKE] if made.record["calibration"]["smoke_test"] else []
    show.facts(f"{made.path}", rows, [*smoke, f"next: {following}"])
