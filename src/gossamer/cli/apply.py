"""`gossamer apply`: a recipe from a file, checked as a whole, predicted, and run stage by stage."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli import options, show
from gossamer.cli.compress import SMOKE
from gossamer.cli.files import checkpoint_rows
from gossamer.cli.guard import guarded, resumable
from gossamer.cli.progress import duration, progress
from gossamer.errors import RecipeError
from gossamer.outputs import work_of

if TYPE_CHECKING:
    from gossamer.recipes.predict import Prediction

ABOUT = "times within about a factor of two, on a machine that does nothing else; memory within a half"


@guarded
def apply(
    recipe: Annotated[
        str | None,
        typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a recipe that ships."),
    ] = None,
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help=f"Where the recipe names none, or another: {options.SOURCE}."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The checkpoint folder to make; must not exist.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        options.text_option(
            "--text", verb="calibrate and tune", default=f"the recipe's; else {options.BUILT_IN}"
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Change a setting, such as compress.values=int3; repeatable."
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, predict time and memory, and stop.")
    ] = False,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="Start although the machine has less memory than is predicted.")
    ] = False,
    list_them: Annotated[bool, typer.Option("--list", help="Show the recipes that ship.")] = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Apply RECIPE to MODEL: stages such as shrink, compress and tune, one after the other.

    All of it is checked before it starts. Ctrl-C keeps finished stages in OUT.work; the same command goes on
    from there, with the same result.
    """
    if list_them:
        _list(as_json)
        return
    if recipe is None or out is None:
        raise RecipeError("name a recipe and -o OUT, or see those that ship with --list")
    options.use_threads(threads)
    from gossamer.recipes.predict import predict
    from gossamer.recipes.prepare import prepare
    from gossamer.recipes.recipe import parse_changes, read_recipe
    from gossamer.recipes.room import check_memory

    chosen = read_recipe(recipe, parse_changes(changes or []))
    with progress() as report:
        prepared = prepare(chosen, out, model=model, text=text, progress=report)
        predicted = predict(prepared)
    if not anyway:
        check_memory(predicted.bytes)
    _say(predicted, to_stderr=as_json or not dry_run, title=f"{chosen.name}: {chosen.sha256[:12]}")
    if dry_run:
        if as_json:
            show.document({"recipe": prepared.record, "predicted": predicted.to_dict()})
        return
    from gossamer.bench import peak_bytes, reset_peak
    from gossamer.recipes.apply import apply_recipe
    from gossamer.recipes.describe import describe_checkpoint

    reset_peak()  # predicting read through more memory than a small model takes
    with resumable(work_of(out)), progress() as report:
        made = apply_recipe(prepared, progress=report)
    found, peak = describe_checkpoint(made.path), peak_bytes()
    if as_json:
        told: dict[str, Any] = {
            "out": str(made.path),
            "stages": made.seconds,
            "predicted": predicted.to_dict(),
            "resumed": made.resumed,
            "peak_memory_bytes": peak,
        }
        show.document({**told, **found.to_dict()})
        return
    rows = [
        *checkpoint_rows(found),
        *((f"{stage} took", _took(stage, seconds, predicted)) for stage, seconds in made.seconds.items()),
        ("peak memory", f"{show.size(peak)} (predicted {show.size(predicted.bytes)})"),
    ]
    smoke = [SMOKE] if prepared.read.smoke else []
    following = shlex.join(["gossamer", "eval", str(made.path), "--against", prepared.model])
    show.facts(f"{made.path}", rows, [*smoke, f"next: {following}"])


def _list(as_json: bool) -> None:
    from gossamer.recipes.recipe import shipped

    found = shipped()
    if as_json:
        told = [
            {"name": r.name, "about": r.about, "sha256": r.sha256, "steps": r.steps} for r in found.values()
        ]
        show.document(told)
        return
    show.columns(
        "Recipes",
        ("recipe", "stages", "what it does"),
        [(name, ", ".join(recipe.stages), recipe.about) for name, recipe in found.items()],
        left=3,
    )


def _say(predicted: Prediction, *, to_stderr: bool, title: str) -> None:
    """Before anything starts: on stdout where that is all there will be, else beside the progress."""
    lines = [
        f"{stage.stage}: about {duration(stage.seconds)}, {show.size(stage.bytes)} of memory"
        for stage in predicted.stages
    ]
    total = f"all: about {duration(predicted.seconds)}, {show.size(predicted.bytes)} of memory ({ABOUT})"
    for line in (f"recipe {title}", *lines, total):
        typer.echo(line, err=to_stderr)


def _took(stage: str, seconds: float, predicted: Prediction) -> str:
    expected = next(one.seconds for one in predicted.stages if one.stage == stage)
    return f"{duration(seconds)} (predicted {duration(expected)})"
