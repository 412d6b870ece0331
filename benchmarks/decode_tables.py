"""Tables of `decode`'s results: as text for the one who waits, as Markdown for the docs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.decode_protocol import PARTS, SUBJECTS, Contender
from benchmarks.decode_start import medians

Run = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def pairs(model: str) -> Iterator[tuple[Contender, Contender]]:
    """Each rival with each of ours that has as many bits in its layers and in its head."""
    for rival in SUBJECTS[model].contenders:
        for ours in SUBJECTS[model].contenders:
            if ours.ours and not rival.ours and ours.bits == rival.bits:
                yield rival, ours


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast ours is: the median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def compared(theirs: list[float], ours: list[float], tokens: int) -> list[str]:
    """Their tokens a second, ours, the ratio."""
    speeds = [tokens / statistics.median(times) for times in (theirs, ours)]
    return [
        *(f"{speed:,.0f}" if speed >= 100 else f"{speed:.1f}" for speed in speeds),
        f"{ratio(theirs, ours):.2f}x",
    ]


def pair_table(runs: list[Run]) -> Table:
    """All pairs of one model: decoding after its first prompt, every prompt, first token and memory."""
    model, first = runs[0]["model"], runs[0]["prompt"]
    columns = ["rival", "ours", "bits"]
    phases = [("step", runs[0], 1), *(("prompt", run, run["prompt"]) for run in runs)]
    for kind, run, _ in phases:
        what = f"decode after {run['prompt']:,}" if kind == "step" else f"prompt of {run['prompt']:,}"
        columns += [f"{what}: rival", "ours", "ratio"]
    columns += [f"first token after {first:,}, s: rival", "ours", "peak GB: rival", "ours"]
    rows = []
    for rival, ours in pairs(model):
        if not {rival.name, ours.name} <= set(runs[0]["contenders"]):
            continue
        row = [rival.name, ours.name, ours.bits]
        for kind, run, tokens in phases:
            found = [run["contenders"].get(c.name) for c in (rival, ours)]
            row += compared(found[0][kind], found[1][kind], tokens) if all(found) else [""] * 3
        both = [runs[0]["contenders"][c.name] for c in (rival, ours)]
        row += [f"{statistics.median(one['prompt']):.3f}" for one in both]
        row += [f"{one['peak'] / 1e9:.2f}" for one in both]
        rows.append(row)
    return columns, rows


def own_table(run: Run) -> Table:
    """Every contender of one prompt: tokens a second, of reading, memory."""
    rows = []
    for name, one in run["contenders"].items():
        step, prompt = statistics.median(one["step"]), statistics.median(one["prompt"])
        share = statistics.median(
            one["weight_bytes"] / s / r for s, r in zip(one["step"], one["read"], strict=True)
        )
        rows.append(
            [
                name,
                f"{one['weight_bytes'] / 1e6:,.0f}",
                f"{1 / step:,.1f}",
                f"{100 * share:.0f} %",
                f"{run['prompt'] / prompt:,.0f}",
                f"{prompt:.3f}",
                f"{one['peak'] / 1e9:.2f}",
                ", ".join(f"{1e6 * s:,.0f}" for s in one.get("parts", {}).values()),
            ]
        )
    head = ["", "weights, MB", f"decode after {run['prompt']:,}, tokens/s", "of reading", "prompt, tokens/s"]
    return [*head, "first token, s", "peak, GB", f"us a token: {', '.join(PARTS)}"], rows


def start_table(run: Run) -> Table:
    """The parts of every contender's start, milliseconds."""
    found = medians(run)
    rows = []
    for name, parts in found.items():
        words = ", ".join(f"{part} {1e3 * s:,.0f}" for part, s in parts.items() if part != "in all")
        rows.append([name, f"{1e3 * parts['in all']:,.0f}", words])
    return ["", "first token after, ms", "of which"], rows


def of_rows(runs: list[Run]) -> Iterator[Table]:
    """The tables of one model's runs, the shortest prompt first."""
    if runs[0]["model"] == "start":
        yield start_table(runs[0])
        return
    runs = sorted(runs, key=lambda run: int(run["prompt"]))
    yield own_table(runs[0])
    yield pair_table(runs)


def print_run(run: Run) -> None:
    facts = run["machine"]
    reads = [r for one in run["contenders"].values() for r in one.get("read", ())]
    read = f", plain reading {statistics.median(reads) / 1e9:.0f} GB/s" if reads else ""
    print(f"\n{run['model']}: {facts['cpu']}, {facts['isa']}, {run['threads']} threads{read}")
    for head, rows in of_rows([run]):
        if rows:
            print()
            protocol.print_table(head, rows)
    for note in run.get("notes", ()):
        print(f"note: {note}")


def markdown(results: dict[str, Any]) -> str:
    """All tables, model by model, of one instruction set and number of threads after the other."""
    groups: dict[tuple[str, str, int, bool], list[Run]] = {}
    for run in results["runs"].values():
        key = (run["model"], run["machine"]["isa"], run["threads"], bool(run.get("huge_pages")))
        groups.setdefault(key, []).append(run)
    parts = []
    for (model, isa, threads, huge), runs in groups.items():
        name = "Process start to first token, SmolLM2-135M" if model == "start" else model
        parts.append(f"**{name}**, {isa}, {threads} threads" + (", huge pages" if huge else ""))
        for head, rows in of_rows(runs):
            if rows:
                parts.append(protocol.markdown_table(head, rows))
    return "\n\n".join(parts)


def write_tables(results: Path, document: Path) -> None:
    """Puts the tables between the marks in a Markdown file. Raises SystemExit where it has none."""
    tables = markdown(json.loads(results.read_text(encoding="utf-8")))
    protocol.write_between(document, "decode", tables)
