"""`gossamer gate`: activations that a finished model may drop at run time."""

from __future__ import annotations

import shlex
import time
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.compress import parse_options
from gossamer.cli.guard import guarded
from gossamer.cli.progress import duration, progress


class AllocationName(str, Enum):
    uniform = "uniform"
    greedy = "greedy"


@guarded
def gate(
    model: options.AnyModel,
    out: Annotated[Path, typer.Option("--out", "-o", help="The checkpoint folder to make; must not exist.")],
    method: Annotated[str, typer.Option(help="teal, wina, chess or topk.")] = "teal",
    sparsity: Annotated[float, typer.Option(help="Fraction of activations to drop, 0 to 1.")] = 0.4,
    allocation: Annotated[
        AllocationName,
        typer.Option(help="How layers share it: all the same, or by the error of each block's outputs."),
    ] = AllocationName.uniform,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text file, folder or jsonl to calibrate on.",
            show_default="prose inside Python, a smoke test",
        ),
    ] = None,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens a calibration window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the places that windows are cut from.")] = 0,
    option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An option of the method, such as selection=top_k; repeatable."
        ),
    ] = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Choose which activations of MODEL are dropped at run time, and write both into the new checkpoint OUT.

    Weights keep their values. Layers that drop enough lie input-major (layout columns), so that the native
    decoder reads the weights of what is left alone; such layers read prompts more slowly.
    """
    chosen = parse_options(option or ())
    options.use_threads(threads)
    start = time.perf_counter()
    with progress() as report:
        from gossamer.recipes.gate import gate as run

        made = run(
            model,
            out,
            method_name=method,
            sparsity=sparsity,
            allocation=allocation.value,
            text=text,
            seqlen=seqlen,
            windows=windows,
            seed=seed,
            options=chosen,
            progress=report,
        )
    seconds = time.perf_counter() - start
    if as_json:
        show.document({**made.to_dict(), "seconds": seconds})
        return
    rows = [
        ("gates", f"{len(made.gates.gates)} of {made.gates.method}, {made.dropped:.0%} dropped"),
        ("weights in columns", f"{len(made.columns)} of {made.weights}"),
        ("took", duration(seconds)),
    ]
    notes = ["calibrated on the prose inside Python (a smoke test): give --text TEXT for real use"]
    following = shlex.join(["gossamer", "eval", str(made.path), "--against", model])
    show.facts(f"{made.path}", rows, [*(notes if made.smoke_test else []), f"next: {following}"])
