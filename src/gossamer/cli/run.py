"""`gossamer run`: streams a completion."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import check_stop, guarded
from gossamer.cli.progress import progress


@guarded
def run(
    model: options.AnyModel,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to answer or continue.", show_default="read from stdin"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens at most.")] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0: always the likeliest token.")
    ] = 0.0,
    top_p: Annotated[
        float, typer.Option("--top-p", help="Draw from the likeliest tokens of this total probability.")
    ] = 1.0,
    seed: Annotated[int, typer.Option("--seed", help="Of drawing, at temperatures above 0.")] = 0,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the model's chat form.")
    ] = False,
    dtype: options.Dtype = options.DtypeName.auto,
    threads: options.Threads = None,
    huge_pages: options.HugePages = False,
    as_json: options.AsJson = False,
) -> None:
    """Answer a prompt, streamed as it is made; tokens a second are printed at the end."""
    if prompt is None:
        prompt = sys.stdin.read()
    options.use_threads(threads)
    from gossamer.recipes.load import Timing, load

    with progress() as report:
        loaded = load(model, dtype=dtype.value, huge_pages=huge_pages, progress=report)
    timing, pieces = Timing(), []
    for piece in loaded.stream(
        prompt, max_new_tokens, temperature=temperature, top_p=top_p, seed=seed, chat=not raw, timing=timing
    ):
        check_stop()
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        show.document(
            {
                "model": loaded.label,
                "prompt": prompt,
                "completion": "".join(pieces),
                "prompt_tokens": timing.prompt_tokens,
                "prompt_seconds": timing.prompt_seconds,
                "decode_steps": timing.steps,
                "decode_seconds": timing.decode_seconds,
                "decode_tokens_per_second": timing.decode_speed,
            }
        )
        return
    print(flush=True)
    speed = timing.decode_speed
    told = "" if speed is None else f"; then {speed:.1f} tokens/s"
    first = f"{timing.prompt_tokens} prompt tokens in {timing.prompt_seconds:.2f} s{told}"
    print(f"[{loaded.label}: {first}]", file=sys.stderr)
