"""The docs page of the quality benchmark, made from its results alone."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.llamacpp_files import CALIBRATED
from benchmarks.quality_cells import CELLS, LEVELS, SHRUNK
from gossamer.evaluate import Interval, bootstrap_mean, paired_difference, perplexity_ratio_interval

DENSE = "dense bfloat16"
RATIOS, KLS = (1.02, 1.05, 1.10), (0.05, 0.10, 0.20)  # the bars, fixed beforehand
HEAD = """# Quality at equal bytes, and speed at equal quality

Made by `python -m benchmarks.quality table` from `benchmarks/results/quality.json`. Perplexity is a
multiple of the dense bfloat16 model's, KL is from it (nats a token), top-1 the share of tokens that both
rank first; *novel* is a second text, another kind than the one that ours are calibrated and tuned on;
intervals are of 95 % (bootstrap over windows, paired with the dense model's). Every contender is measured
through the engine that serves it. MB are all weights, the embedding and head among them (int8 in ours;
llama.cpp's and OpenVINO's as they choose). *front*: no contender that is measured has fewer bytes and a
lower KL (B), or more tokens a second and a lower KL (S). Tuned rows saw so many tokens of the calibration
text, counted each time; the dense model that they are held against saw none of them. *longer*: tuned block
by block like *blockwise*, on four times the windows and for twice the epochs (of `nl4` the recipe
`balanced`, of `nl4 by 32`, which has a scale for 32 inputs in place of 64, the recipe `best`). *all*:
embedding and head, too. *nl4 or nl3 in 65 MB*: each layer in one of the two, as such a budget affords.
llama.cpp's and OpenVINO's files are made without calibration text, as their tools do by default; all of
ours but int8 read some. *calibrated*: llama.cpp's with an importance matrix of as many windows of our
calibration text as *longer* read; a file of the same formats as without it takes its tokens a second.
SmolLM2's packaged weights lie on a grid of 4 bits (Q4_1), which flatters 4-bit formats and explains why
Q5_K_M does worse than Q4_K_M; the model *small* has true float weights.
"""


@dataclass
class Row:
    name: str
    ours: bool
    bytes: int
    ratio: float
    kl: float
    top1: float
    novel: float
    novel_kl: float
    spread: tuple[Interval, Interval]  # of ratio and kl
    speed: float | None
    tokens: int
    tasks: float | None

    @property
    def engine(self) -> str:
        return "ours" if self.ours else self.name.split()[0]


def cell_of(name: str) -> str:
    """What a contender is without how far it was tuned."""
    cell, _, level = name.rpartition(", ")
    return cell if level in LEVELS else name


def speeds_of(model: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Speeds by cell, since a layout is timed once, whatever its weights went through: all of one run, that
    which timed the most, of those the last."""
    runs: dict[str, dict[str, dict[str, Any]]] = {}
    for name, one in model.items():
        if "speed" in one:
            runs.setdefault(one["speed"].get("run", ""), {})[cell_of(name)] = one["speed"]
    return max(runs.items(), key=lambda run: (len(run[1]), run[0]), default=("", {}))[1]


def rows_of(model: dict[str, Any], speeds: dict[str, dict[str, Any]]) -> list[Row]:
    """All contenders that were judged, by bytes; ``speeds`` by cell."""
    dense = {text: statistics.mean(found["loss"]) for text, found in model[DENSE]["judged"].items()}
    rows = []
    for name, found in model.items():
        if name == DENSE or "judged" not in found:
            continue
        counts = {text: len(one["loss"]) for text, one in found["judged"].items()}
        if counts != {text: len(one["loss"]) for text, one in model[DENSE]["judged"].items()}:
            print(f"{name} was judged on other windows than the dense model: left out")
            continue
        judged = {
            text: {key: statistics.mean(values) for key, values in one.items()}
            for text, one in found["judged"].items()
        }
        ratios = {text: math.exp(one["loss"] - dense[text]) for text, one in judged.items()}
        timed = speeds.get(cell_of(name))
        plain = name.removesuffix(CALIBRATED)
        if timed is None and model.get(plain, {}).get("weight_bytes") == found["weight_bytes"]:
            timed = speeds.get(plain)  # of the same formats
        rows.append(
            Row(
                name,
                not name.startswith(("llama.cpp", "OpenVINO", "transformers")),
                found["weight_bytes"],
                ratios["wikitext"],
                judged["wikitext"]["kl"],
                judged["wikitext"]["top1"],
                ratios["novel"],
                judged["novel"]["kl"],
                spread_of(found["judged"]["wikitext"], model[DENSE]["judged"]["wikitext"]),
                statistics.median(timed["decode"]) if timed else None,
                found.get("tuned_tokens") or 0,
                mean_accuracy(found),
            )
        )
    return sorted(rows, key=lambda row: row.bytes)


def spread_of(judged: dict[str, list[float]], dense: dict[str, list[float]]) -> tuple[Interval, Interval]:
    """Intervals of the perplexity's ratio to the dense model's, and of KL."""
    return perplexity_ratio_interval(judged["loss"], dense["loss"]), bootstrap_mean(judged["kl"])


def mean_accuracy(found: dict[str, Any]) -> float | None:
    tasks = found.get("tasks")
    return statistics.mean(task["accuracy"] for task in tasks.values()) if tasks else None


def zero_shot(model: dict[str, Any]) -> list[list[str]]:
    """Accuracy task by task, their mean, and its difference to the dense model's, paired item by item."""
    dense = model[DENSE].get("tasks")
    asked = {name: found["tasks"] for name, found in model.items() if "tasks" in found}
    if not dense:
        return []
    table = [["accuracy", *dense, "mean", "beside dense"]]
    for name, tasks in sorted(asked.items(), key=lambda one: (one[0] != DENSE, one[0])):
        theirs, ours = ([float(x) for task in dense for x in of[task]["correct"]] for of in (dense, tasks))
        change = paired_difference(ours, theirs)
        cells = [f"{tasks[task]['accuracy']:.1%}" for task in dense]
        beside = f"{change.estimate:+.1%} [{change.low:+.1%} to {change.high:+.1%}]"
        table.append([name, *cells, f"{statistics.mean(ours):.1%}", "" if tasks is dense else beside])
    return table


def front(row: Row, rows: Iterable[Row]) -> str:
    """On which fronts a row stands."""
    others = [other for other in rows if other is not row]
    smaller = any(
        o.bytes <= row.bytes and o.kl <= row.kl and (o.bytes, o.kl) != (row.bytes, row.kl) for o in others
    )
    found = "" if smaller else "B"
    if row.speed is not None:
        timed = [o for o in others if o.speed is not None]
        faster = any(o.speed >= row.speed and o.kl < row.kl for o in timed if o.speed)
        found += "" if faster else "S"
    return found


def equal_bytes(rows: list[Row]) -> list[list[str]]:
    table = [
        [
            "",
            "MB",
            "perplexity",
            "KL",
            "top-1",
            "novel",
            "novel KL",
            "zero-shot",
            "tokens/s",
            "tuned on",
            "front",
        ]
    ]
    for row in rows:
        table.append(
            [
                f"**{row.name}**" if row.ours else row.name,
                f"{row.bytes / 1e6:.1f}",
                f"{row.ratio:.3f}x [{row.spread[0].low:.3f} to {row.spread[0].high:.3f}]",
                f"{row.kl:.4f} [{row.spread[1].low:.3f} to {row.spread[1].high:.3f}]",
                f"{row.top1:.1%}",
                f"{row.novel:.3f}x",
                f"{row.novel_kl:.4f}",
                "" if row.tasks is None else f"{row.tasks:.1%}",
                "" if row.speed is None else f"{row.speed:.0f}",
                f"{row.tokens:,}" if row.tokens else "",
                front(row, rows),
            ]
        )
    return table


def equal_quality(rows: list[Row], ratio: str, kl: str) -> list[list[str]]:
    """For each bar, every engine's fastest contender that passes it by the fields ``ratio`` and ``kl``."""
    engines = sorted({row.engine for row in rows}, key=lambda name: (name != "ours", name.lower()))
    table = [["bar", *engines]]
    bars = [(f"perplexity within {100 * (r - 1):.0f} %", ratio, r) for r in RATIOS]
    bars += [(f"KL at most {bar:.2f}", kl, bar) for bar in KLS]
    for title, key, bar in bars:
        cells = []
        for engine in engines:
            passing = [r for r in rows if r.engine == engine and getattr(r, key) <= bar and r.speed]
            best = max(passing, key=lambda r: r.speed or 0.0, default=None)
            cells.append(
                "none"
                if best is None
                else f"{best.name}: {best.speed:.0f} tokens/s, {best.bytes / 1e6:.0f} MB"
            )
        table.append([title, *cells])
    return table


def of_model(dense: dict[str, Any]) -> list[str]:
    """What there is to know of the dense model itself."""
    lines = []
    if "training" in dense:
        told = dense["training"]
        size, tokens = told["parameters"] / 1e6, told["tokens"] / 1e6
        lines.append(
            f"A Llama of {size:.1f} M float parameters, trained by `examples/train_small.py` on "
            f"{tokens:.1f} M tokens ({told['epochs']} epochs of {', '.join(told['texts'])}) to a loss of "
            f"{told['log'][-1]['held_out']:.3f} nats a token on held-out text."
        )
    if "tuned_first" in dense:
        tokens, rate = dense["tuned_first"]["tokens"], dense["tuned_first"]["rate"]
        lines.append(
            f"Here the dense model was tuned on {tokens:,} tokens of the calibration text by its task's loss "
            f"(rate {rate:g}) first, and ours and the rivals' files were made of that one (`transformers "
            "bfloat16`). All are still held against the model as it was before."
        )
    return lines


def recovery(rows: list[Row]) -> list[list[str]]:
    """Of each cell that was tuned, perplexity and KL level by level."""
    found = {row.name: row for row in rows if row.ours}
    shown = [level for level in LEVELS if any(f"{cell}, {level}" in found for cell in CELLS)]
    table = [["perplexity, KL", *shown]]
    for cell in CELLS:
        levels = [found.get(f"{cell}, {level}") for level in shown]
        if sum(row is not None for row in levels) > 1:
            table.append([cell, *("" if r is None else f"{r.ratio:.3f}x, {r.kl:.4f}" for r in levels)])
    return table


def made_by(model: dict[str, Any], elsewhere: str) -> str:
    """The command behind one of ours, and how speed was timed, or of which other model it was."""
    words = next(one["made"]["command"] for one in model.values() if "made" in one).split()
    command = " ".join([*words[:2], "MODEL", *words[3:]])
    if elsewhere:
        return (
            f"Ours were made as by `{command}`. Tokens a second are those of the same formats of "
            f"{elsewhere}: they do not hang on what the numbers are."
        )
    timed = next(iter(speeds_of(model).values()), None)
    cpu = (timed or {}).get("cpu")
    if timed is None:
        return f"Ours were made as by `{command}`."
    return (
        f"Ours were made as by `{command}`. Tokens a second: after {timed['depth']} tokens, "
        f"{timed['threads']} threads, {timed['isa']}{f' ({cpu})' if cpu else ''}, the median of "
        f"{len(timed['decode'])} rounds in turn."
    )


def plainly(rows: list[Row]) -> str:
    """Which of ours stand on a front, sparse ones (or with fewer blocks) and dense ones, and which do not."""

    def some(sparse: bool, on: bool) -> str:
        chosen = [r.name for r in rows if r.ours and is_sparse(r) == sparse and bool(front(r, rows)) == on]
        return "; ".join(chosen) or "none"

    return (
        f"On a front: of ours that are sparse, {some(True, True)}; of ours that are dense, "
        f"{some(False, True)}. "
        f"On none: sparse, {some(True, False)}; dense, {some(False, False)}."
    )


def is_sparse(row: Row) -> bool:
    name = cell_of(row.name)
    return name in SHRUNK or not CELLS[name].startswith(("--sparsity 0 ", "--values "))


def markdown(table: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return "\n".join([lines[0], "|" + " --- |" * len(table[0]), *lines[1:]])


def write(results: Path, page: Path) -> None:
    """The page, all models of the results one after the other."""
    found = protocol.read_json(results)
    parts = [HEAD]
    models = found.get("models", {})
    for name, model in models.items():
        speeds = speeds_of(model)
        elsewhere = ""
        if not speeds and "tuned_first" in model[DENSE]:
            base = name.rpartition(", ")[0]
            speeds = speeds_of(models.get(base, {}))
            elsewhere = base if speeds else ""
        rows = rows_of(model, speeds)
        text = model[DENSE]["judged"]["wikitext"]["loss"]
        perplexity = math.exp(statistics.mean(text))
        parts.append(
            f"## {name}\n\nDense perplexity {perplexity:.2f} on WikiText-2 ({len(text)} windows of 2,048).\n"
        )
        tuned, novel = recovery(rows), len(model[DENSE]["judged"]["novel"]["loss"])
        parts += [
            *(line + "\n" for line in of_model(model[DENSE])),
            made_by(model, elsewhere) + "\n",
            markdown(equal_bytes(rows)) + "\n",
            plainly(rows) + "\n",
            "### At equal quality\n",
            "By WikiText-2's test part, the kind of text that ours are calibrated and tuned on:\n",
            markdown(equal_quality(rows, "ratio", "kl")) + "\n",
            f"By the novel ({novel} windows), of a kind that none of them saw:\n",
            markdown(equal_quality(rows, "novel", "novel_kl")) + "\n",
        ]
        if len(tuned) > 1:
            parts += ["### Before and after tuning\n", markdown(tuned) + "\n"]
        if asked := zero_shot(model):
            items = {task["items"] for task in model[DENSE]["tasks"].values()}
            parts += [
                "### Zero-shot\n",
                f"`gossamer eval --tasks {','.join(model[DENSE]['tasks'])}` (lm-evaluation-harness), "
                f"{' or '.join(map(str, sorted(items)))} fixed items a task; 95 % intervals over items, in "
                "pairs with the dense model's answers.\n",
                markdown(asked) + "\n",
            ]
    page.write_text("\n".join(parts))
