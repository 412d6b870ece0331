"""`gossamer sample`: text that a model writes, for its pruned copy to be tuned on."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import guarded, resumable
from gossamer.cli.progress import duration, progress
from gossamer.outputs import work_of


@guarded
def sample(
    model: options.AnyModel,
    out: Annotated[Path, typer.Option("--out", "-o", help="The jsonl file to make; must not exist.")],
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="Text file, folder or jsonl that prompts are cut from.",
            show_default="prose inside Python, a smoke test",
        ),
    ] = None,
    rewrite: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Instead: a jsonl of prompt and response, to be answered in its own words."
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to draw in all.")] = 100_000,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a prompt cut from TEXT.")] = 32,
    max_new_tokens: options.MaxNewTokens = 224,
    together: Annotated[
        int, typer.Option(min=1, help="Documents written side by side: in the native decoder faster.")
    ] = 8,
    temperature: options.Temperature = 1.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the places of prompts, and of drawing.")] = 0,
    dtype: options.Dtype = options.DtypeName.auto,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Let MODEL, the dense one, write the text that its pruned copy is tuned on (self-data distillation).

    OUT holds a document a line; other commands read it as their --text. OUT.made.json says what it took.
    """
    options.use_threads(threads)
    start = time.perf_counter()
    with progress() as report, resumable(work_of(out)):
        from gossamer.recipes.sample import sample as run

        made = run(
            model,
            out,
            text=text,
            rewrite=rewrite,
            dtype=dtype.value,
            progress=report,
            tokens=tokens,
            prompt_tokens=prompt_tokens,
            max_new_tokens=max_new_tokens,
            together=together,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
        )
    if as_json:
        show.document({**asdict(made), "path": str(made.path)})
        return
    own = [] if made.own is None else [("in its own words", f"{made.own} of {made.records}")]
    rows = [
        ("documents", f"{made.records:,}"),
        *own,
        ("tokens drawn", f"{made.tokens:,}"),
        (
            "sampling",
            f"{duration(made.seconds)}, {made.tokens / max(made.seconds, 1e-9):,.0f} tokens a second",
        ),
        ("took", duration(time.perf_counter() - start)),
    ]
    notes = ["prompts came from the prose inside Python (a smoke test): give --text TEXT for real use"]
    show.facts(f"{made.path}", rows, notes if made.smoke_test else [])
