"""`gossamer essential`: how far a model is pruned in one shot, without data, before its quality drops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.evaluate import SMOKE
from gossamer.cli.guard import guarded
from gossamer.cli.progress import progress

if TYPE_CHECKING:
    from gossamer.recipes.essential import EssentialSparsity


@guarded
def essential(
    model: options.DenseModel,
    method: Annotated[str, typer.Option(help="A method without data: magnitude or random.")] = "magnitude",
    pattern: Annotated[
        str,
        typer.Option(
            help="unstructured:model: all layers compete; within each weight unstructured:tensor, 16x4, ..."
        ),
    ] = "unstructured:model",
    grid: Annotated[
        str, typer.Option(metavar="SPARSITIES", help="At least five.")
    ] = "0,0.1,0.2,0.3,0.4,0.5,0.6,0.7",
    nm: Annotated[
        str | None,
        typer.Option(
            "--nm",
            metavar="PATTERNS",
            help="N:M patterns to measure beside it: 3:4,2:4,1:4.",
            show_default="none",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Text file, folder or jsonl to measure on.", show_default=options.BUILT_IN
        ),
    ] = None,
    windows: Annotated[int, typer.Option(min=0, help="Windows to measure on; 0: all.")] = 20,
    seqlen: Annotated[
        int | None,
        typer.Option(min=2, help="Tokens a window.", show_default="2048, or the model's context if shorter"),
    ] = None,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure perplexity over one-shot sparsities of MODEL, and where it begins to rise fast."""
    options.use_threads(threads)
    sparsities = [options.number(part, "--grid") for part in grid.split(",")]
    with progress() as report:
        from gossamer.recipes.essential import essential_sparsity

        found = essential_sparsity(
            model,
            method=method,
            pattern=pattern,
            grid=sparsities,
            nm=[part.strip() for part in nm.split(",")] if nm else (),
            text=text,
            windows=windows or None,
            seqlen=seqlen,
            progress=report,
        )
    if as_json:
        show.document(found.to_dict())
        return
    rows = [("pruned", f"by {found.method}, {found.pattern}"), ("text", found.text)]
    curve = [(f"{sparsity:g}", perplexity) for sparsity, perplexity in found.curve]
    rows += [(f"perplexity at {at}", f"{figure:.3f}") for at, figure in (*curve, *found.nm.items())]
    notes = [_told(found), *([SMOKE] if found.smoke_test else [])]
    show.facts(f"Essential sparsity of {found.model}", rows, notes)


def _told(found: EssentialSparsity) -> str:
    if found.drop is None:
        return "no drop point: the logarithm of perplexity nowhere begins to rise twice as fast"
    before, after = found.drop.slope_before, found.drop.slope_after
    return (
        f"drop point: {found.drop.sparsity:g}, from which the logarithm of perplexity rises by {after:.2f} "
        f"per unit of sparsity, not {before:.2f}"
    )
