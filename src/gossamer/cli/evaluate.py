"""`gossamer eval`: perplexity, the distance to the dense model, and zero-shot tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import guarded
from gossamer.cli.progress import progress
from gossamer.errors import EvaluationError

if TYPE_CHECKING:
    from gossamer.evaluate import Interval
    from gossamer.recipes.measure import MeasuredQuality
    from gossamer.recipes.measure_tasks import MeasuredTasks

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
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Zero-shot tasks: arc_easy,piqa,openbook_qa,winogrande,boolq; .jsonl files; or those of "
            "lm-evaluation-harness: harness:NAME, or .yaml files.",
        ),
    ] = None,
    items: Annotated[int, typer.Option("--items", min=0, help="Questions a task; 0: all.")] = 200,
    dtype: options.Dtype = options.DtypeName.auto,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure perplexity, and with --against the KL divergence and top-1 agreement to the dense model; with
    --tasks accuracy instead, and the answers that flipped."""
    options.use_threads(threads)
    if tasks is not None:
        if text is not None:
            raise EvaluationError("--text and --tasks are measured one at a time")
        _tasks(model, against, tasks.split(","), items or None, dtype.value, as_json)
        return
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


def _tasks(
    model: str, against: str | None, names: list[str], items: int | None, dtype: str, as_json: bool
) -> None:
    from gossamer.recipes.measure_tasks import measure_tasks

    with progress() as report:
        measured = measure_tasks(
            model,
            [name.strip() for name in names],
            items=items,
            against=against,
            dtype=dtype,
            progress=report,
        )
    if as_json:
        show.document(measured.to_dict())
        return
    header = ["task", "items", "accuracy %", "95 %", "per character %", "95 %"]
    if measured.reference is not None:
        header += [f"{measured.against} %", "right -> wrong", "wrong -> right", "difference, points"]
    notes = ["95 %: Wilson interval" + (", of differences paired bootstrap" if against else "")]
    show.columns(f"Zero-shot tasks, {measured.model}", header, _task_rows(measured), notes)


def _task_rows(measured: MeasuredTasks) -> list[list[str]]:
    from gossamer.evaluate.task_scores import wilson

    def accuracy(right: tuple[bool, ...] | None) -> list[str]:
        if right is None:
            return ["", ""]
        low, high = wilson(sum(right), len(right))
        return [f"{100 * sum(right) / len(right):.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]

    rows, flipped = [], measured.flips()
    for index, (task, score) in enumerate(zip(measured.tasks, measured.scores, strict=True)):
        row = [score.name, f"{score.items} of {task.total:,}"]
        row += accuracy(score.correct) + accuracy(score.correct_norm)
        if measured.reference is not None and flipped is not None:
            change = flipped[index].difference.map(lambda share: 100 * share)
            row.append(f"{100 * measured.reference[index].accuracy:.1f}")
            row += [str(flipped[index].lost), str(flipped[index].gained), figure(change.estimate, change, 1)]
        rows.append(row)
    mean = ["mean", "", f"{100 * measured.accuracy:.1f}", "", "", ""]
    if measured.reference_accuracy is not None:
        mean += [f"{100 * measured.reference_accuracy:.1f}", "", "", ""]
    return [*rows, mean]


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
    if found.calibration_error is not None:
        beside = found.reference_calibration_error
        of = "" if beside is None else f" ({measured.against}: {beside:.4f})"
        rows.append(("calibration error", f"{found.calibration_error:.4f}{of}"))
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
