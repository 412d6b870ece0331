"""`gossamer eval`: perplexity, the distance to the dense model, zero-shot tasks, and probes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import guarded
from gossamer.cli.progress import progress
from gossamer.errors import EvaluationError

if TYPE_CHECKING:
    from gossamer.evaluate import Interval
    from gossamer.evaluate.task_scores import Flips
    from gossamer.recipes.measure import MeasuredQuality
    from gossamer.recipes.measure_probes import MeasuredProbes
    from gossamer.recipes.measure_tasks import MeasuredTasks

WINDOWS, ITEMS = 20, 200
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
    windows: Annotated[
        int | None,
        typer.Option("--windows", min=0, help="Windows to measure on; 0: all.", show_default=str(WINDOWS)),
    ] = None,
    seqlen: Annotated[
        int | None,
        typer.Option(
            "--seqlen", min=2, help="Tokens a window.", show_default="2048, or the model's context if shorter"
        ),
    ] = None,
    first: Annotated[
        int | None,
        typer.Option(
            "--first",
            min=0,
            help="Only predictions from this position of a window on count.",
            show_default="0",
        ),
    ] = None,
    attention: options.Attention = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks",
            metavar="NAMES",
            help="Zero-shot tasks: arc_easy,piqa,openbook_qa,winogrande,boolq; .jsonl files; or those of "
            "lm-evaluation-harness: harness:NAME, or .yaml files.",
        ),
    ] = None,
    probes: Annotated[
        str | None,
        typer.Option(
            "--probes",
            metavar="NAMES",
            help="Probes of what perplexity hides: knowledge,retrieval,json; or all.",
        ),
    ] = None,
    items: Annotated[
        int | None,
        typer.Option(
            "--items",
            min=0,
            help="Questions a task or probe; 0: all (of made ones, 200).",
            show_default=str(ITEMS),
        ),
    ] = None,
    dtype: options.Dtype = options.DtypeName.auto,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Measure perplexity, and with --against the KL divergence and top-1 agreement to the dense model; with
    --tasks or --probes right answers instead, and those that flipped."""
    options.use_threads(threads)
    given = [
        name for name, value in (("text", text), ("tasks", tasks), ("probes", probes)) if value is not None
    ]
    if len(given) > 1:
        raise EvaluationError(" and ".join(f"--{name}" for name in given) + " are measured one at a time")
    if tasks is not None or probes is not None:
        options.unused(
            "of measuring a text: leave out with --tasks and --probes",
            windows=windows,
            seqlen=seqlen,
            first=first,
            attention=attention,
        )
        count = ITEMS if items is None else items or None
        if tasks is not None:
            _tasks(model, against, _names(tasks), count, dtype.value, as_json)
        elif probes is not None:
            named = None if probes.strip() == "all" else _names(probes)
            _probes(model, against, named, count, dtype.value, as_json)
        return
    options.unused("of --tasks and --probes: leave out without them", items=items)
    from gossamer.recipes.measure import quality

    with progress() as report:
        measured = quality(
            model,
            against=against,
            text=text,
            windows=WINDOWS if windows is None else windows or None,
            seqlen=seqlen,
            first=first or 0,
            attention=attention,
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
        measured = measure_tasks(model, names, items=items, against=against, dtype=dtype, progress=report)
    if as_json:
        show.document(measured.to_dict())
        return
    header = ["task", "items", "accuracy %", "95 %", "per character %", "95 %"]
    if measured.reference is not None:
        header += [f"{measured.against} %", "right -> wrong", "wrong -> right", "difference, points"]
    notes = _notes(measured)
    show.columns(f"Zero-shot tasks, {measured.model}", header, _task_rows(measured), notes)


def _notes(measured: MeasuredTasks | MeasuredProbes) -> list[str]:
    """What the intervals are, and what answered."""
    paired = "" if measured.reference is None else ", of differences for pairs (Agresti and Min)"
    models = [measured.model, measured.against] if measured.against else [measured.model]
    answered = [f"{name}: {engine}" for name, engine in zip(models, measured.engines, strict=True)]
    return [f"95 %: Wilson interval{paired}", "answered in " + "; ".join(answered)]


def _names(listed: str) -> list[str]:
    return [name.strip() for name in listed.split(",")]


def accuracy(right: tuple[bool, ...] | None) -> list[str]:
    """The share of right answers in per cent and its interval, as two cells."""
    from gossamer.evaluate.task_scores import wilson

    if right is None:
        return ["", ""]
    low, high = wilson(sum(right), len(right))
    return [f"{100 * sum(right) / len(right):.1f}", f"{100 * low:.1f} to {100 * high:.1f}"]


def _changed(before: tuple[bool, ...], flips: Flips) -> list[str]:
    """What another model got right of the same items, and what became of it, as four cells."""
    change = flips.difference.map(lambda share: 100 * share)
    told = [accuracy(before)[0], str(flips.lost), str(flips.gained)]
    return [*told, figure(change.estimate, change, 1)]


def _task_rows(measured: MeasuredTasks) -> list[list[str]]:
    rows, flipped = [], measured.flips()
    for index, (task, score) in enumerate(zip(measured.tasks, measured.scores, strict=True)):
        row = [score.name, f"{score.items} of {task.total:,}"]
        row += accuracy(score.correct) + accuracy(score.correct_norm)
        if measured.reference is not None and flipped is not None:
            row += _changed(measured.reference[index].correct, flipped[index])
        rows.append(row)
    mean = ["mean", "", f"{100 * measured.accuracy:.1f}", "", "", ""]
    if measured.reference_accuracy is not None:
        mean += [f"{100 * measured.reference_accuracy:.1f}", "", "", ""]
    return [*rows, mean]


def _probes(
    model: str, against: str | None, names: list[str] | None, items: int | None, dtype: str, as_json: bool
) -> None:
    from gossamer.recipes.measure_probes import measure_probes

    with progress() as report:
        measured = measure_probes(model, names, items=items, against=against, dtype=dtype, progress=report)
    if as_json:
        show.document(measured.to_dict())
        return
    header = ["probe", "", "items", "right %", "95 %"]
    if measured.reference is not None:
        header += [f"{measured.against} %", "right -> wrong", "wrong -> right", "difference, points"]
    notes = _notes(measured)
    notes += [
        f"{name}: {score.left_out} items were longer than the model's context, and are left out"
        for name, score in measured.scores.items()
        if score.left_out
    ]
    notes += [f"{name} was skipped: {reason}" for name, reason in measured.skipped.items()]
    show.columns(f"Probes, {measured.model}", header, _probe_rows(measured), notes, left=2)


def _probe_rows(measured: MeasuredProbes) -> list[list[str]]:
    """A line for each measure, for the first one's groups, and for answers that stayed the same."""
    rows, changes = [], measured.changes()
    for name, score in measured.scores.items():
        before = None if measured.reference is None else measured.reference[name]
        for measure, right in score.measures.items():
            row = [name, measure, str(score.items), *accuracy(right)]
            if before is not None and changes is not None:
                row += _changed(before.measures[measure], changes[name].flips[measure])
            rows.append(row)
        first = next(iter(score.measures))
        for group in score.groups:
            for label, right in score.by(group, first).items():
                row = ["", f"  {first}, {label}", str(len(right)), *accuracy(right)]
                if before is not None:
                    row += [accuracy(before.by(group, first)[label])[0], "", "", ""]
                rows.append(row)
        if changes is not None:
            alike = changes[name].agreement
            rows.append(["", "  same answers", str(len(alike)), *accuracy(alike), "", "", "", ""])
    return rows


def _rows(measured: MeasuredQuality) -> list[tuple[str, str]]:
    found, intervals = measured.quality, measured.quality.intervals()
    label = f"{measured.text} (smoke test)" if measured.smoke else measured.text
    behind = f", from position {found.first:,} on" if found.first else ""
    of = f"{found.tokens:,} tokens in {found.windows} windows of {found.seqlen:,}{behind}"
    rows = [
        ("text", f"{label}, {of}"),
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
