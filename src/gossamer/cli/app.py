"""The `gossamer` command: its sub-commands, and nothing that is slow to import."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated

import typer

from gossamer.cli import (
    apply,
    bench,
    chat,
    compress,
    essential,
    evaluate,
    files,
    gate,
    listing,
    quickstart,
    reproduce,
    run,
    sample,
    shrink,
    tune,
)
from gossamer.cli.guard import INTERRUPTED, TERMINATED, stoppable
from gossamer.version import VERSION

app = typer.Typer(
    name="gossamer",
    help="Make neural networks sparse, and run them faster because they are sparse.",
    epilog="Start with `gossamer quickstart`. `gossamer COMMAND --help` explains each command.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("compress")(compress.compress)
app.command("shrink")(shrink.shrink)
app.command("apply")(apply.apply)
app.command("tune")(tune.tune)
app.command("gate")(gate.gate)
app.command("sample")(sample.sample)
app.command("eval")(evaluate.evaluate)
app.command("essential")(essential.essential)
app.command("bench")(bench.bench)
app.command("run")(run.run)
app.command("chat")(chat.chat)
app.command("info")(files.info)
app.command("verify")(files.verify)
app.command("export")(files.export)
app.command("methods")(listing.methods)
app.command("reproduce")(reproduce.reproduce)
app.command("isa")(listing.isa)
app.command("quickstart")(quickstart.quickstart)


def _version(asked: bool) -> None:
    if asked:
        print(f"gossamer {VERSION}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before any command."""


def main() -> None:
    """The entry point; ends the process with the exit codes of `gossamer.cli.guard`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever called
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  (for as long as the process)
    if isinstance(sys.stdin, TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is told in a sentence
    # warnings of libraries about themselves would drown what the user asked for
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        with stoppable():
            app()
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            # threads that still compute would be torn down by the interpreter's end, and abort
            for stream in (sys.stdout, sys.stderr):
                with suppress(OSError):
                    stream.flush()
            os._exit(end.code)
        raise
