"""`gossamer chat`: a conversation in the terminal, or one turn a line from a pipe."""

from __future__ import annotations

import sys
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import check_stop, guarded, interruptible
from gossamer.cli.progress import progress
from gossamer.errors import TextError

if TYPE_CHECKING:
    from gossamer.recipes.chat import Conversation

_HELP = "/reset begins anew, /exit (or Ctrl-D) ends, /help says this, Ctrl-C stops an answer"


@guarded
def chat(
    model: options.AnyModel,
    system: Annotated[
        str | None, typer.Option("--system", help="What the model is told before the conversation.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 1024,
    temperature: options.Temperature = 0.0,
    top_k: options.TopK = 0,
    top_p: options.TopP = 1.0,
    min_p: options.MinP = 0.0,
    repetition_penalty: options.RepetitionPenalty = 1.0,
    seed: options.Seed = 0,
    stop: options.Stop = None,
    dtype: options.Dtype = options.DtypeName.auto,
    threads: options.Threads = None,
    huge_pages: options.HugePages = False,
    engine: options.Engine = options.EngineName.auto,
    cache: options.Cache = "bfloat16",
    attention: options.Attention = None,
) -> None:
    """Chat with a model; /reset begins anew, /exit ends, Ctrl-C stops an answer.

    From a pipe each line is a turn. Tokens a second follow each answer on stderr.
    """
    options.use_threads(threads)
    from gossamer.models.sampling import Sampling
    from gossamer.recipes.chat import Conversation
    from gossamer.recipes.load import load

    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
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
    conversation = Conversation(
        loaded, system=system, max_new_tokens=max_new_tokens, sampling=sampling, stop=stop or ()
    )
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  (input() then has a history and can be edited)
        print(f"[{loaded.label}, by {loaded.engine}: {_HELP}]", file=sys.stderr)
    while (line := _line(terminal)) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            conversation.reset()
        elif line == "/help":
            print(f"\n[{_HELP}]", file=sys.stderr)
        elif line:
            try:
                _answer(conversation, line)
            except TextError as error:
                if not terminal:
                    raise
                print(f"[{error}; {_HELP}]", file=sys.stderr)


def _line(terminal: bool) -> str | None:
    """What a person or a pipe says next, without spaces around it; None at the end."""
    line: str | None = "/help"  # what Ctrl-C means in a terminal
    if not terminal:
        line = sys.stdin.readline()
        return line.strip() if line else None
    with interruptible():
        try:
            line = input("> ").strip()
        except EOFError:
            print()
            line = None
    return line


def _answer(conversation: Conversation, text: str) -> None:
    from gossamer.recipes.answer import Timing

    timing = Timing()
    with interruptible(), closing(conversation.ask(text, timing=timing)) as pieces:
        for piece in pieces:
            check_stop()
            print(piece, end="", flush=True)
    print(flush=True)
    print(f"[{show.pace(timing)}]", file=sys.stderr, flush=True)
