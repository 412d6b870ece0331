"""`gossamer gate`: activations that a finished model may drop at run time."""

from __future__ import annotations

import shlex
import time
from enum import Enum
from typing import Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import guarded
from gossamer.cli.progress import duration, progress


class AllocationName(str, Enum):
    uniform = "uniform"
    greedy = "greedy"


@guarded
def gate(
    model: options.AnyModel,
    out: options.Out,
    method: Annotated[str, typer.Option(help="teal, wina, chess or topk.")] = "teal",
    sparsity: Annotated[float, typer.Option(help="Fraction of activations to drop, 0 to 1.")] = 0.4,
    allocation: Annotated[
        AllocationName,
        typer.Option(help="How layers share it: all the same, or by the error of each block's outputs."),
    ] = AllocationName.uniform,
    text: options.Text = None,
    seqlen: options.Seqlen = 1024,
    windows: options.Windows = 8,
    seed: options.WindowSeed = 0,
    option: options.MethodOption = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Choose which activations of MODEL are dropped at run time, and write both into the new checkpoint OUT.

    Weights keep their values. Layers that drop enough lie input-major (layout columns), so that the native
    decoder reads the weights of what is left alone; such layers read prompts more slowly.
    """
    chosen = options.parse_options(option or ())
    options.use_threads(threads)
    start = time.perf_counter()
    with progress() as report:
        from gossamer.recipes.gate import gate as run

        made = run(
            model,
            out,
            method=method,
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
