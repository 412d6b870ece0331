"""`gossamer bench`: prompt and decode speed, rivals side by side; or one model's plan, or its profile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import guarded
from gossamer.cli.progress import progress
from gossamer.errors import EvaluationError

if TYPE_CHECKING:
    from gossamer.bench import Machine, SpeedComparison

BUSY = 0.1  # cores that other processes keep busy: above it they disturb the figures


@guarded
def bench(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(
            metavar="MODEL...", help=f"Gossamer checkpoints, or {options.SOURCE}; ratios are to the first."
        ),
    ],
    prompt: Annotated[int, typer.Option("--prompt", min=1, help="Tokens of the prompt.")] = 512,
    decode: Annotated[int, typer.Option("--decode", min=1, help="Tokens written after it.")] = 64,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Rounds; medians are reported.")] = 3,
    plan: Annotated[
        bool,
        typer.Option(
            "--plan", help="Instead: time the layouts of each layer of one model, dense included, and choose."
        ),
    ] = False,
    values: Annotated[
        str | None,
        typer.Option("--values", help="With --plan, of a model that is no checkpoint: what it would hold."),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option("--pattern", help="With --values: such as 32:64.", show_default="dense")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="With --values: of a pattern without its own.")
    ] = None,
    zeros: Annotated[
        float | None,
        typer.Option("--zeros", help="With --plan: the share of activations that are zero, such as 0.7."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="With --plan: measure anew what this machine's cache holds.")
    ] = False,
    profile: Annotated[
        bool,
        typer.Option(
            "--profile", help="Instead: where a token's time goes in the native decoder, part by part."
        ),
    ] = False,
    dtype: options.Dtype = options.DtypeName.fast,
    threads: options.Threads = None,
    huge_pages: options.HugePages = False,
    engine: options.Engine = options.EngineName.auto,
    cache: options.Cache = "bfloat16",
    attention: options.Attention = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure tokens a second, prompt and decode, of one or several models in turn."""
    if plan and profile:
        raise EvaluationError("--plan and --profile are two things: ask for one")
    if (plan or profile) and len(models) != 1:
        raise EvaluationError(
            f"--{'plan' if plan else 'profile'} is of one model, got {len(models)}: name one"
        )
    if plan or profile:
        options.unused("of measuring a model: leave out with --plan and --profile", attention=attention)
    if plan:
        options.unused(
            "of measuring a model: leave out with --plan",
            **options.given(context, "dtype", "engine", "cache", "repeats", "huge_pages"),
        )
        chosen = {"values": values, "pattern": pattern, "sparsity": sparsity, "zeros": zeros}
        _plan(models[0], as_json, prompt=prompt, decode=decode, threads=threads, refresh=refresh, **chosen)
        return
    options.unused(
        "of --plan: add it",
        values=values,
        pattern=pattern,
        sparsity=sparsity,
        zeros=zeros,
        refresh=refresh or None,
    )
    settings: dict[str, Any] = {"prompt": prompt, "decode": decode, "repeats": repeats, "threads": threads}
    settings |= {"dtype": dtype.value, "huge_pages": huge_pages, "cache": cache}
    if profile:
        if engine is options.EngineName.transformers:
            raise EvaluationError("--profile is of the native decoder: leave --engine transformers out")
        _profile(models[0], as_json, **settings)
        return
    from gossamer.recipes.measure import speed

    with progress() as report:
        found = speed(*models, engine=engine.value, attention=attention, progress=report, **settings)
    if as_json:
        show.document(found.to_dict())
        return
    header = (
        "model",
        f"prompt {prompt} tok/s",
        "ratio",
        f"decode {decode} tok/s",
        "ratio",
        "read a token",
        "GB/s",
        "weights come from",
    )
    show.columns(
        f"Speed (medians of {repeats} interleaved rounds, ratios to the first)",
        header,
        [_row(found, name) for name in found.speeds],
        [
            *(f"{name} runs in {engine}" for name, engine in found.engines.items()),
            *(
                f"{name} leaves out weights whose activations it drops: it reads less than is told"
                for name, engine in found.engines.items()
                if "gated by" in engine
            ),
            *machine_notes(found.machine, found.other_work),
        ],
    )


def _plan(model: str, as_json: bool, **settings: Any) -> None:
    from gossamer.cli.plan import print_plan
    from gossamer.recipes.measure import plan

    with progress() as report:
        found = plan(model, progress=report, **settings)
    if as_json:
        show.document({"model": model, **found.to_dict()})
    else:
        print_plan(found, machine_notes(found.machine, found.other_work))


def _profile(model: str, as_json: bool, **settings: Any) -> None:
    from gossamer.cli.profile import print_profile
    from gossamer.recipes.measure import profile

    with progress() as report:
        found = profile(model, progress=report, **settings)
    if as_json:
        show.document({"model": model, **found.to_dict()})
    else:
        print_profile(found, machine_notes(found.machine, found.other_work))


def _row(found: SpeedComparison, name: str) -> tuple[str, ...]:
    one = found.speeds[name]
    return (
        name,
        f"{one.prompt_tokens_per_second:,.0f}",
        f"{found.ratio(name, 'prompt'):.2f}x",
        f"{one.decode_tokens_per_second:,.1f}",
        f"{found.ratio(name):.2f}x",
        show.size(one.decode_bytes),
        f"{one.decode_gb_per_second:.1f}",
        found.machine.weights_from(found.working_set(name)),
    )


def machine_notes(machine: Machine, other_work: float | None) -> list[str]:
    """What the figures were measured on, and what else ran meanwhile."""
    cache = "unknown" if machine.cache_bytes is None else show.size(machine.cache_bytes)
    notes = [
        f"{machine.cpu}, cores {machine.cores}, threads {machine.threads}, kernels {machine.isa}, "
        f"last-level cache {cache}, torch {machine.torch}",
    ]
    if machine.read_gb_per_second is not None:
        notes.append(f"memory reads at {machine.read_gb_per_second:.1f} GB/s with these threads")
    if other_work is not None:
        load = (
            "" if machine.load is None else f" (load average before, with our own work: {machine.load:.2f})"
        )
        warning = ". NOT QUIET: the figures may be too low" if other_work > BUSY else ""
        notes.append(f"other processes kept {other_work:.2f} cores busy meanwhile{load}{warning}")
    return notes
