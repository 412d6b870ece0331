"""`gossamer compress`: the main job."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.files import checkpoint_rows
from gossamer.cli.guard import guarded, resumable
from gossamer.cli.progress import duration, progress
from gossamer.outputs import work_of

_VALUES = "float32, bf16, int8, int4, int3, nl4 or nl3"


@guarded
def compress(
    model: options.DenseModel,
    out: options.Out,
    method: Annotated[str, typer.Option(help="Pruning method; `gossamer methods` lists them.")] = "obs",
    sparsity: Annotated[
        float | None,
        typer.Option(
            help="Fraction of prunable weights to remove, 0 to 1; 0: quantize only.",
            show_default="what the pattern says",
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="N:M keeps N of every M inputs (2:4, 32:64); or RxC blocks (16x4), unstructured[:GROUP], "
            "channel:in, channel:out.",
            show_default="32:64, or unstructured where --sparsity or --budget is given",
        ),
    ] = None,
    allocation: Annotated[
        str, typer.Option(help="How layers share the sparsity: uniform, global, er, erk, owl, sensitivity.")
    ] = "uniform",
    allocation_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="An option of the allocation, such as owl's spread=0.15; repeatable.",
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="In place of a sparsity, with --allocation sensitivity: 60MB of weights on disk, all in, "
            "3.5bits a weight of the linears, or 2.5ms a token in the linears, as timed here.",
            show_default="none",
        ),
    ] = None,
    values: Annotated[
        str,
        typer.Option(
            help=f"Kept weights as {_VALUES}; several, such as nl4,nl3: dense layers, each in the one that "
            "--budget affords."
        ),
    ] = "int4",
    head_values: Annotated[
        str,
        typer.Option(
            help=f"Embeddings and head (never pruned) as {_VALUES}. With text, a head of fewer than 8 bits "
            "is rounded by what it reads."
        ),
    ] = "int8",
    group: Annotated[int, typer.Option(help="Inputs that share a scale: 64 or 32.")] = 64,
    outliers: Annotated[
        float | None,
        typer.Option(
            help="Keep the columns of inputs with activations of this size or more in bf16, beside the "
            "integers (LLM.int8(): 6.0).",
            show_default="none",
        ),
    ] = None,
    outlier_share: Annotated[
        float | None,
        typer.Option(
            help="At most so many of a layer's inputs, the largest (0.01); without --outliers just these.",
            show_default="all",
        ),
    ] = None,
    calibration: options.Calibration = None,
    gradients: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the gradients that fisher, taylor or the allocation sensitivity read, for other runs "
            "on the same model and text (8 bytes a weight).",
            show_default="not kept",
        ),
    ] = None,
    seqlen: options.Seqlen = 1024,
    windows: options.Windows = 128,
    seed: options.WindowSeed = 0,
    option: options.MethodOption = None,
    tune: Annotated[
        str | None,
        typer.Option(
            help="Win quality back by a tuning method: blockwise (each block to its dense outputs; takes "
            "several times as long).",
            show_default="none",
        ),
    ] = None,
    tune_option: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="An option of the tuning method, such as epochs=8; repeatable."
        ),
    ] = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Prune and quantize MODEL into the new checkpoint OUT.

    Ctrl-C keeps finished blocks in OUT.work; the same command goes on from there, with the same result.
    """
    chosen = options.parse_options(option or ())
    allocation_options = options.parse_options(allocation_option or (), option="--allocation-option")
    tune_options = options.parse_options(tune_option or (), option="--tune-option")
    options.use_threads(threads)
    start = time.perf_counter()
    with resumable(work_of(out)), progress() as report:
        from gossamer.bench import peak_bytes
        from gossamer.models.sources import resolve
        from gossamer.recipes.compress import compress as run
        from gossamer.recipes.describe import describe_checkpoint, source_bytes

        made = run(
            model,
            out,
            calibration=calibration,
            gradients=gradients,
            progress=report,
            method=method,
            sparsity=sparsity,
            pattern=pattern,
            allocation=allocation,
            allocation_options=allocation_options,
            budget=budget,
            values=values,
            head_values=head_values,
            group=group,
            outliers=outliers,
            outlier_share=outlier_share,
            seqlen=seqlen,
            windows=windows,
            seed=seed,
            options=chosen,
            tune=tune,
            tune_options=tune_options,
        )
        before = source_bytes(resolve(model).folder)
    found, seconds, peak = describe_checkpoint(made.path), time.perf_counter() - start, peak_bytes()
    if as_json:
        show.document(
            {
                "out": str(made.path),
                "seconds": seconds,
                "resumed": made.resumed,
                "peak_memory_bytes": peak,
                "weight_file_bytes_before": before,
                **found.to_dict(),
            }
        )
        return
    smaller = before / found.weight_file_bytes
    rows = [
        (
            "weights before",
            f"{show.size(before)}, now {show.size(found.weight_file_bytes)}: {smaller:.2f}x smaller",
        ),
        *checkpoint_rows(found),
        ("took", duration(seconds) + (" (resumed)" if made.resumed else "")),
        ("peak memory", show.size(peak)),
    ]
    following = shlex.join(["gossamer", "eval", str(made.path), "--against", model])
    calibrated = found.made.get("calibration") or {}
    notes = [SMOKE] if calibrated.get("smoke_test") else []
    if calibration is not None and not calibrated:
        notes.append(f"{method} reads no text: --calibration had no effect")
    if gradients is not None and not made.gradients:
        notes.append("nothing here reads gradients: --gradients had no effect")
    show.facts(f"{made.path}", rows, [*notes, f"next: {following}"])


SMOKE = "calibrated on the prose inside Python (a smoke test): give --calibration TEXT for real use"
