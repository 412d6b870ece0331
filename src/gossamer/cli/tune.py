"""`gossamer tune`: whole-model fine-tuning of a checkpoint."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from gossamer.cli import options, show
from gossamer.cli.files import checkpoint_rows
from gossamer.cli.guard import guarded, resumable
from gossamer.cli.progress import duration, progress
from gossamer.errors import MethodError
from gossamer.outputs import work_of


@guarded
def tune(
    checkpoint: options.Checkpoint,
    out: options.Out,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model to learn from.",
            show_default="what the checkpoint was made from",
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help="Text file, folder or jsonl to tune on.", show_default=options.BUILT_IN
        ),
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to tune on.", show_default="500,000, or as many as --minutes allow"),
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(help="Minutes to tune for; how far that gets depends on the machine.")
    ] = None,
    loss: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[=WEIGHT],...",
            help="kl, squarehead and task, alone or together; repeatable.",
            show_default="kl",
        ),
    ] = None,
    loss_option: Annotated[
        list[str] | None,
        typer.Option(metavar="LOSS.KEY=VALUE", help="Such as kl.temperature=2; repeatable."),
    ] = None,
    method: Annotated[
        str,
        typer.Option(
            help="What moves: full (all kept weights), lora, scales; or masks: ast, maskllm, jackpot."
        ),
    ] = "full",
    option: options.MethodOption = None,
    values: Annotated[
        str | None,
        typer.Option(
            help="Tune towards other values: bf16, int8, int4, int3, nl4 or nl3.", show_default="as they are"
        ),
    ] = None,
    group: Annotated[
        int | None, typer.Option(help="Inputs that share a scale: 64 or 32.", show_default="as they are")
    ] = None,
    norms: Annotated[bool, typer.Option(help="Tune norms and biases too.")] = True,
    rate: Annotated[
        float | None,
        typer.Option(
            help="Of AdamW, at its highest; else a hundredth of the mean size of each layer's weights, of "
            "floats a thousandth."
        ),
    ] = None,
    scale_rate: Annotated[
        float,
        typer.Option(
            help="Of scales, in parts of the rate of weights; without --rate of norms and biases too."
        ),
    ] = 0.1,
    warmup: Annotated[
        float, typer.Option(help="The share of the run over which the rate rises, in [0, 1).")
    ] = 0.05,
    weight_decay: Annotated[float, typer.Option(help="Of AdamW: of weights, not of scales or norms.")] = 0.0,
    clip: Annotated[float, typer.Option(help="The largest norm of a step's gradients.")] = 1.0,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens a window.")] = 512,
    batch: Annotated[int, typer.Option(min=1, help="Windows a step.")] = 8,
    micro: Annotated[
        int, typer.Option(min=1, help="Windows in memory at once (squarehead: a ratio for each such part).")
    ] = 1,
    held_out: Annotated[
        int, typer.Option(min=1, help="Windows that choose the best state and are never tuned on.")
    ] = 8,
    evaluations: Annotated[
        int, typer.Option(min=1, help="How often, evenly over the run, held-out windows are judged.")
    ] = 10,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1, help="Evaluations without a better held-out loss that end the run.", show_default="none do"
        ),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    bf16: Annotated[
        bool | None,
        typer.Option(
            "--bf16/--no-bf16",
            help="Compute in bfloat16, or in float32.",
            show_default="bfloat16 where this processor multiplies it fast",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of windows, and of which are held out.")] = 0,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Tune what CHECKPOINT keeps until it does as its dense model does, into the new checkpoint OUT.

    Masks and number formats hold at every step. Ctrl-C keeps the last saved state in OUT.work; the same
    command goes on from there.
    """
    losses, loss_options = parse_losses(loss or ("kl",)), parse_loss_options(loss_option or ())
    chosen = options.parse_options(option or ())
    options.use_threads(threads)
    start = time.perf_counter()
    with resumable(work_of(out)), progress() as report:
        from gossamer.bench import peak_bytes
        from gossamer.recipes.describe import describe_checkpoint
        from gossamer.recipes.finetune import finetune

        done = finetune(
            checkpoint,
            out,
            text=text,
            teacher=teacher,
            progress=report,
            method=method,
            options=chosen,
            losses=losses,
            loss_options=loss_options,
            values=values,
            group=group,
            norms=norms,
            tokens=tokens,
            minutes=minutes,
            seqlen=seqlen,
            batch=batch,
            micro=micro,
            rate=rate,
            scale_rate=scale_rate,
            warmup=warmup,
            weight_decay=weight_decay,
            clip=clip,
            bfloat16=bf16,
            held_out=held_out,
            evaluations=evaluations,
            patience=patience,
            seed=seed,
            gradient_checkpointing=gradient_checkpointing,
        )
    found, seconds, peak = describe_checkpoint(done.path), time.perf_counter() - start, peak_bytes()
    outcome = done.outcome
    if as_json:
        show.document(
            {
                "out": str(done.path),
                "seconds": seconds,
                "tuning_seconds": outcome.seconds,
                "tokens": outcome.tokens,
                "learned": done.learned,
                "steps": outcome.step,
                "best_step": outcome.best_step,
                "ended": outcome.ended,
                "before": outcome.before,
                "after": outcome.after,
                "held_out": outcome.held_out,
                "resumed": done.resumed,
                "smoke_test": done.smoke_test,
                "peak_memory_bytes": peak,
                **found.to_dict(),
            }
        )
        return
    answers = f", of which losses count {done.learned:.0%}" if done.learned < 1 else ""
    rows = [
        *(
            (f"held-out {name}", f"{was:.4f} -> {outcome.after[name]:.4f}")
            for name, was in outcome.before.items()
        ),
        (
            "tokens seen",
            f"{outcome.tokens:,} in {outcome.step} steps ({outcome.tokens / outcome.seconds:.0f} a second)"
            + answers,
        ),
        ("best after", f"step {outcome.best_step}; ended by {outcome.ended}"),
        *checkpoint_rows(found),
        ("took", duration(seconds) + (" (resumed)" if done.resumed else "")),
        ("peak memory", show.size(peak)),
    ]
    command = ["gossamer", "eval", str(done.path)]
    model = teacher or done.made.get("model")
    following = shlex.join([*command, "--against", model] if model else command)
    notes = [note for note, holds in ((SMOKE, done.smoke_test), (WORSE, done.worse)) if holds]
    show.facts(f"{done.path}", rows, [*notes, f"next: {following}"])


WORSE = (
    "worse than CHECKPOINT on the held-out text: the search began at the dense weights, and what it found "
    "does not make up for the updates that kept weights had"
)
SMOKE = "tuned on the prose inside Python (a smoke test): give --text TEXT for real use"


def parse_losses(given: Sequence[str]) -> dict[str, float]:
    """``NAME`` or ``NAME=WEIGHT``, several with commas between, as weights by name; raises MethodError."""
    found: dict[str, float] = {}
    for part in ",".join(given).split(","):
        name, equals, weight = (piece.strip() for piece in part.partition("="))
        try:
            found[name] = float(weight) if equals else 1.0
        except ValueError:
            raise MethodError(f"--loss is written NAME or NAME=WEIGHT, got {part!r}") from None
    return found


def parse_loss_options(given: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``LOSS.KEY=VALUE`` pairs by loss; raises MethodError."""
    found: dict[str, dict[str, Any]] = {}
    for pair in given:
        name, dot, rest = pair.partition(".")
        if not dot:
            raise MethodError(f"--loss-option is written LOSS.KEY=VALUE, got {pair!r}")
        parsed = options.parse_options([rest], option="--loss-option", form="LOSS.KEY=VALUE")
        found.setdefault(name.strip(), {}).update(parsed)
    return found
