"""`gossamer quickstart`: a small model made sparse, measured beside its dense self, and asked something."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.bench import machine_notes
from gossamer.cli.evaluate import SMOKE
from gossamer.cli.guard import guarded, resumable
from gossamer.cli.progress import progress

if TYPE_CHECKING:
    from gossamer.recipes.quickstart import Quickstart

QUESTION = "In two sentences: why is a spider's web strong?"
TOKENS = 96  # of the answer, at most


@guarded
def quickstart(
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for everything; steps that are done there are skipped."),
    ] = Path("gossamer-quickstart"),
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            help=f"{options.SOURCE[0].upper()}{options.SOURCE[1:]}.",
            show_default="SmolLM2-135M-Instruct",
        ),
    ] = None,
    windows: Annotated[
        int, typer.Option("--windows", min=1, help="Calibration windows of 1,024 tokens.")
    ] = 32,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text to calibrate on (first 70 %) and measure on (the rest).",
            show_default="prose inside Python, a smoke test",
        ),
    ] = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Make a small model nl4 (4 bits) and sparse int4, compare both with dense, and ask the best something.

    Takes a few minutes. Ctrl-C is safe: the same command goes on where it stopped.
    """
    options.use_threads(threads)
    with resumable(out), progress() as report:
        from gossamer.recipes.quickstart import quickstart as run

        found = run(out, model=model, windows=windows, text=text, progress=report)
        loaded = found.load()
    if as_json:
        show.document({**found.to_dict(), "question": QUESTION, "answer": loaded.generate(QUESTION, TOKENS)})
        return
    _print(found)
    print(f"\n{QUESTION}\n")
    for piece in loaded.stream(QUESTION, TOKENS):
        print(piece, end="", flush=True)
    print(flush=True)


def _print(found: Quickstart) -> None:
    from gossamer.bench import Machine

    header = (
        "",
        "size",
        "bits, linears only",
        "bits, all in",
        "head",
        "perplexity",
        "KL to dense",
        "top-1 agreement",
        f"prompt {found.prompt} tok/s",
        f"decode {found.decode} tok/s",
    )
    rows = [
        (
            ("> " if one.name == found.chosen else "  ") + one.name,
            show.size(one.weight_bytes),
            f"{one.linear_bits:.2f}",
            f"{one.all_bits:.2f}",
            one.head,
            f"{one.perplexity:.2f}",
            f"{one.kl:.4f}",
            f"{100 * one.agreement:.1f} %",
            f"{one.prompt_speed:,.0f}",
            f"{one.decode_speed:,.1f}",
        )
        for one in found.contenders
    ]
    engines: dict[str, list[str]] = {}
    for one in found.contenders:
        engines.setdefault(one.engine.partition(":")[0], []).append(one.name)
    notes = [
        f"Quality: on {found.windows} windows of {found.seqlen:,} tokens of {found.text} (few, to be done in "
        f"minutes), after calibration on {found.calibration_windows}.",
        *([SMOKE] if found.smoke else []),
        *([f"Note: {found.note}"] if found.note else []),
        "Timed in: " + "; ".join(f"{engine}: {', '.join(names)}" for engine, names in engines.items()) + ".",
        *machine_notes(Machine(**found.machine), found.other_work),
        f"\nBy these figures: {found.chosen}. {found.why[0].upper()}{found.why[1:]}.",
    ]
    show.columns(f"{found.model}, three ways", header, rows, notes)
