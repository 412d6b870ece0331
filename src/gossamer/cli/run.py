"""`gossamer run`: streams a completion."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import check_stop, guarded
from gossamer.cli.progress import progress

if TYPE_CHECKING:
    from gossamer.models.generate import Token


@guarded
def run(
    model: options.AnyModel,
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to answer or continue.", show_default="read from stdin"),
    ] = None,
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    logprobs: Annotated[
        int | None,
        typer.Option("--logprobs", help="With --json: tokens, with this many likeliest ones in their place."),
    ] = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the text as it is, without the model's chat form.")
    ] = False,
    dtype: options.Dtype = options.DtypeName.auto,
    threads: options.Threads = None,
    huge_pages: options.HugePages = False,
    engine: options.Engine = options.EngineName.auto,
    cache: options.Cache = "bfloat16",
    attention: options.Attention = None,
    as_json: options.AsJson = False,
) -> None:
    """Answer a prompt, streamed as it is made; tokens a second are printed at the end."""
    if logprobs is not None and not as_json:
        raise typer.BadParameter("log-probabilities are part of the JSON document: give --json too")
    if prompt is None:
        prompt = sys.stdin.read()
    options.use_threads(threads)
    from gossamer.recipes.load import load

    with progress() as report:
        loaded = load(
            model,
            dtype=dtype.value,
            huge_pages=huge_pages,
            engine=engine.value,
            cache=cache,
            attention=attention,
            pack_plain=True,
            progress=report,
        )
    stream = loaded.stream(
        prompt,
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=stop or (),
        logprobs=logprobs,
        chat=not raw,
    )
    pieces, timing = [], stream.timing
    for piece in stream:
        check_stop()
        pieces.append(piece)
        if not as_json:
            print(piece, end="", flush=True)
    if as_json:
        show.document(
            {
                "model": loaded.label,
                "engine": loaded.engine,
                "prompt": prompt,
                "completion": "".join(pieces),
                "finish": stream.finish,
                "tokens": None if logprobs is None else _tokens(stream.tokens, loaded.tokenizer.decode),
                "prompt_tokens": timing.prompt_tokens,
                "prompt_seconds": timing.prompt_seconds,
                "decode_steps": timing.steps,
                "decode_seconds": timing.decode_seconds,
                "decode_tokens_per_second": timing.decode_speed,
            }
        )
        return
    print(flush=True)
    print(f"[{loaded.label}, by {loaded.engine}: {show.pace(timing)}]", file=sys.stderr)


def _tokens(tokens: Sequence[Token], decode: Callable[[int], str]) -> list[dict[str, object]]:
    def told(token: int, logprob: float | None) -> dict[str, object]:
        return {"id": token, "text": decode(token), "logprob": logprob}

    return [{**told(token.id, token.logprob), "top": [told(*one) for one in token.top]} for token in tokens]
