"""`gossamer eval`: perplexity, and the distance to the dense model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import guarded
from gossamer.cli.progress import progress

if TYPE_CHECKING:
    from gossamer.evaluate import Interval
    from gossamer.recipes.measure import MeasuredQuality

SMOKE = "SMOKE TEST: measured on the prose inside Python; give --text FILE for a figure that means something"


@guarded
def evaluate(
    model: options.AnyModel,
    against: Annotated[
        str | None, typer.Option("--against", metavar="DENSE", help="The dense model to compare with.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="FILE",
            help="Text file, folder or jsonl to measure on.",
            show_default="prose inside Python, a smoke test",
        ),
    ] = None,
    windows: Annotated[int, typer.Option("--windows", min=0, help="Windows to measure on; 0: all.")] = 20,
    seqlen: Annotated[int, typer.Option("--seqlen", min=2, help="Tokens a window.")] = 2048,
    dtype: options.Dtype = options.DtypeName.auto,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure perplexity, and with --against the KL divergence and top-1 agreement to the dense model."""
    options.use_threads(threads)
    from gossamer.recipes.measure import quality

    with progress() as report:
        measured = quality(
            model,
            against=against,
            text=text,
            windows=windows or None,
            seqlen=seqlen,
            dtype=dtype.value,
            progress=report,
        )
    if as_json:
        show.document(measured.to_dict())
    else:
        show.facts(f"Quality of {measured.model}", _rows(measured), [SMOKE] if measured.smoke else [])


def _rows(measured: MeasuredQuality) -> list[tuple[str, str]]:
    found, intervals = measured.quality, measured.quality.intervals()
    label = f"{measured.text} (smoke test)" if measured.smoke else measured.text
    rows = [
        ("text", f"{label}, {found.tokens:,} tokens in {found.windows} windows of {found.seqlen:,}"),
        ("perplexity", figure(found.perplexity, intervals.get("perplexity"), 3)),
    ]
    if found.reference_perplexity is not None and found.perplexity_ratio is not None:
        rows += [
            (f"perplexity of {measured.against}", f"{found.reference_perplexity:.3f}"),
            ("ratio", figure(found.perplexity_ratio, intervals.get("perplexity_ratio"), 4)),
        ]
    if found.mean_kl is not None and found.top1_agreement is not None:
        rows += [
            ("KL to dense", figure(found.mean_kl, intervals.get("kl"), 4) + " nats a token"),
            ("top-1 agreement", figure(100 * found.top1_agreement, None, 2) + " %" + _range(intervals)),
        ]
    if intervals:
        rows.append(("in brackets", "95 % bootstrap interval over windows"))
    return rows


def figure(value: float, interval: Interval | None, digits: int) -> str:
    """A mean with its interval, where there is one."""
    around = "" if interval is None else f" [{interval.low:.{digits}f} to {interval.high:.{digits}f}]"
    return f"{value:.{digits}f}{around}"


def _range(intervals: dict[str, Interval]) -> str:
    agreement = intervals.get("agreement")
    return "" if agreement is None else f" [{100 * agreement.low:.2f} to {100 * agreement.high:.2f}]"
