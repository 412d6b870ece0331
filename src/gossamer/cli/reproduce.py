"""`gossamer reproduce`: run what papers claim, in miniature, on this machine."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import guarded, resumable
from gossamer.cli.progress import progress
from gossamer.errors import GossamerError, MethodError, OutputError

if TYPE_CHECKING:
    from gossamer.report.reproduce import Texts, Verdict

SMOKE = "SMOKE TEST: on the prose inside Python; set GOSSAMER_DATA, or give --calibration and --text"
CALIBRATION, MEASURED = "text/wikitext2_raw_train_part.txt", "text/wikitext2_raw_test.txt"
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@guarded
def reproduce(
    names: Annotated[list[str] | None, typer.Argument(metavar="METHOD...", show_default=False)] = None,
    every: Annotated[bool, typer.Option("--all", help="Every method that has a claim.")] = False,
    budget: Annotated[
        str | None, typer.Option(help="Begin no claim after so long: 90s, 60m, 2h.", show_default="no limit")
    ] = None,
    listed: Annotated[bool, typer.Option("--list", help="Say what there is to run, and end.")] = False,
    calibration: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to calibrate on.")] = None,
    text: Annotated[str | None, typer.Option(metavar="TEXT", help="Text to measure on.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of 2,048 tokens to measure on.")] = 20,
    seeds: Annotated[
        int, typer.Option(min=1, help="Runs of each contender, each with text and tuning drawn anew.")
    ] = 1,
    work: Annotated[Path, typer.Option(help="Where figures are kept, to go on from.")] = Path(
        "reproduce.work"
    ),
    out: Annotated[Path | None, typer.Option("--out", "-o", help="JSON file to merge verdicts into.")] = None,
    page: Annotated[
        Path | None,
        typer.Option(help="Write the catalogue of methods, with the verdicts of --out and of this run."),
    ] = None,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Forget the figures in the work folder: after a change of code.")
    ] = False,
    threads: options.Threads = None,
    as_json: options.AsJson = False,
) -> None:
    """Run the claims of methods' papers in miniature, with their baselines, and say whether they hold."""
    from gossamer.prune import ALIASES
    from gossamer.report.baselines import with_baselines
    from gossamer.report.reproduce import claimed, run_all, verdicts_in
    from gossamer.report.texts import forget

    claims, names = claimed(), list(dict.fromkeys(ALIASES.get(name, name) for name in names or ()))
    if unknown := [name for name in names if name not in claims]:
        raise MethodError(f"the method {unknown[0]!r} has no claim to run (there are: {', '.join(claims)})")
    if every and names:
        raise MethodError(f"--all runs every claim: leave {names[0]} out, or leave --all out")
    if listed:
        claims = {name: claim for name, claim in claims.items() if name in (names or claims)}
        if as_json:
            show.document({name: claim.to_dict() for name, claim in claims.items()})
        else:
            rows = [
                (name, claim.says, ", ".join(dict.fromkeys(with_baselines(name, claim.experiment).against)))
                for name, claim in claims.items()
            ]
            show.columns("Claims", ("method", "the paper says", "beside"), rows, left=3)
        return
    chosen = list(claims) if every else names
    if not chosen and page is None:
        raise MethodError("name a method, or --all (`gossamer reproduce --list` shows them)")
    options.use_threads(threads)
    texts = _texts(calibration, text, windows)
    for place in (out, page):  # before anything runs
        if place is not None and (place.is_dir() or not place.parent.is_dir()):
            raise OutputError(f"cannot write {place}: name a file in a folder that is there")
    known = {} if out is None else verdicts_in(out)
    if refresh:
        forget(work)
    found, failed = [], dict[str, GossamerError]()
    with resumable(work), progress() as report:
        every_claim = run_all(
            chosen, work, budget=seconds_of(budget), texts=texts, seeds=seeds, progress=report
        )
        for name, came in every_claim:
            if isinstance(came, GossamerError):
                failed[name] = came
                print(f"error: {name}: {came}", file=sys.stderr, flush=True)
                continue
            found.append(came)
            if out is not None:
                _merge(out, came)
            if not as_json:
                _show(came)
    if as_json:
        show.document([verdict.to_dict() for verdict in found])
    if left := chosen[len(found) + len(failed) :]:
        print(f"the budget is used up; not run: {', '.join(left)}", file=sys.stderr)
    if page is not None:
        _write_page(page, known | {verdict.name: verdict.to_dict() for verdict in found})
    if failed:
        told = f"no verdict on {', '.join(failed)}, as said above"
        raise MethodError(told) from next(iter(failed.values()))


def seconds_of(budget: str | None) -> float | None:
    """``90s``, ``60m``, ``2h`` in seconds; raises MethodError."""
    if budget is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget)
    if not found:
        raise MethodError(f"a budget is written 90s, 60m or 2h, not {budget!r}")
    return float(found[1]) * _UNITS[found[2]]


def _texts(calibration: str | None, text: str | None, windows: int) -> Texts:
    """Those given, else WikiText-2 in the folder that GOSSAMER_DATA names, else the prose inside Python."""
    from gossamer.report.reproduce import Texts

    data = os.environ.get("GOSSAMER_DATA")
    if data and (Path(data) / MEASURED).exists():
        calibration = calibration or str(Path(data) / CALIBRATION)
        text = text or str(Path(data) / MEASURED)
    if calibration and text and Path(calibration).resolve() == Path(text).resolve():
        raise MethodError(f"{text} cannot both calibrate and measure: give another --text")
    return Texts(calibration, text, windows)


def _show(verdict: Verdict) -> None:
    from gossamer.report.catalogue_page import measured

    names = [verdict.name, *(name for name in verdict.figures if name != verdict.name)]
    rows = []
    for name in names:
        one = verdict.figures[name]
        kl = "" if one["kl"] is None else f"{one['kl']:.4f}"
        seconds = "" if one["seconds"] is None else f"{one['seconds']:.0f}"
        accuracy = (f"{one['accuracy']:.2%}",) if "accuracy" in one else ()
        rows.append((name, *accuracy, f"{one['perplexity']:.3f}", kl, seconds))
    asked = verdict.claim.experiment
    of = f"{asked.model}, {asked.pattern}, sparsity {asked.sparsity}, {asked.values}"
    notes = [f"the paper: {verdict.claim.says}", f"here: {measured(verdict.to_dict())}"]
    notes += [SMOKE] if verdict.figures[verdict.name]["smoke_test"] else []
    head = ("accuracy",) if "accuracy" in verdict.figures[verdict.name] else ()
    titles = ("", *head, "perplexity", "KL to dense", "seconds")
    show.columns(f"{verdict.name} ({of})", titles, rows, notes)


def _merge(out: Path, verdict: Verdict) -> None:
    from gossamer.matrices.atomic import atomic_file
    from gossamer.report.reproduce import verdicts_in

    claims = {**verdicts_in(out), verdict.name: verdict.to_dict()}
    with atomic_file(out) as file:
        file.write((json.dumps({"claims": claims}, indent=1) + "\n").encode())


def _write_page(page: Path, verdicts: dict[str, Any]) -> None:
    from gossamer.matrices.atomic import atomic_file
    from gossamer.report.catalogue_page import page as page_of

    with atomic_file(page) as file:
        file.write(page_of(verdicts).encode())
