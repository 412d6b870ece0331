"""The recipes that ship, applied to one model: what each takes beside what was predicted, and what comes out.

Every recipe is applied by `gossamer apply` in a process of its own and stays in `--work`; an interrupted one
goes on, and then tells no time. Perplexity, KL to the dense model and agreement come from `gossamer eval` on
two texts that no recipe reads: WikiText-2's test part, of the kind that is tuned on, and a novel, which is
not.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.compress import told_by_gossamer
from benchmarks.quality import NOVEL
from benchmarks.quality_cells import record_of
from gossamer.bench.machine import cpu_name
from gossamer.recipes.recipe import shipped

ORDER = ("fast", "balanced", "best", "small", "sparse")
TEXTS = {"wikitext": protocol.TEST_TEXT, "novel": NOVEL}
KEPT = ("perplexity", "perplexity_ratio", "kl", "agreement", "windows", "intervals", "reference_perplexity")


def parse() -> argparse.Namespace:
    parser = protocol.parser("recipes", __doc__)
    protocol.add_model_arguments(parser, required=False)
    parser.set_defaults(threads=2)
    parser.add_argument("--recipes", nargs="+", default=list(ORDER), choices=list(shipped()))
    parser.add_argument("--work", type=Path, default=Path("recipes.work"), help="where checkpoints are kept")
    parser.add_argument("--windows", type=int, default=10, help="of 2,048 tokens, of each text (default 10)")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "recipes.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: write the table there")
    return parser.parse_args()


def applied(args: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """What `gossamer apply` told when it made the checkpoint, now or earlier."""
    told = args.work / f"{recipe}.json"
    if not protocol.read_json(told):
        words = ["apply", recipe, args.model, "-o", str(args.work / recipe)]
        words += ["--text", str(args.data / protocol.CALIBRATION_TEXT)]
        found = told_by_gossamer(args.threads, *words, "--threads", str(args.threads))
        told.write_text(json.dumps(found))
    return protocol.read_json(told)


def measured(args: argparse.Namespace, recipe: str) -> dict[str, Any]:
    """Quality on each of the texts."""
    found = {}
    for name, text in TEXTS.items():
        words = ["eval", str(args.work / recipe), "--against", args.model, "--text", str(args.data / text)]
        words += ["--windows", str(args.windows), "--seqlen", str(protocol.EVAL_SEQLEN)]
        told = told_by_gossamer(args.threads, *words, "--threads", str(args.threads))
        found[name] = {key: told[key] for key in KEPT}
    return found


def run(args: argparse.Namespace) -> None:
    args.work.mkdir(parents=True, exist_ok=True)
    for recipe in args.recipes:
        told = applied(args, recipe)
        sha = told["made"]["recipe"]["sha256"]
        known = protocol.read_json(args.out).get("recipes", {}).get(recipe, {})
        if known.get("sha256") == sha and known["wikitext"]["windows"] == args.windows:
            continue
        record = {
            "sha256": sha,
            "predicted": told["predicted"],
            "seconds": None if told["resumed"] else told["stages"],
            "peak_memory_bytes": None if told["resumed"] else told["peak_memory_bytes"],
            **record_of(args.work / recipe),
            **measured(args, recipe),
            "isa": told["made"]["with"]["instruction set"],
            "threads": args.threads,
            "cpu": cpu_name(),
        }
        protocol.update_json(args.out, {"recipes": {recipe: record}, "machine": protocol.machine()})
        print(page({recipe: record}), flush=True)


def page(recipes: dict[str, Any]) -> str:
    """Costs and results in Markdown, the shipped order kept."""
    head = ["recipe", "threads", "minutes (predicted)", "GB of memory (predicted)", "MB", "tuned on"]
    head += ["perplexity", "KL", "top-1", "novel", "novel KL"]
    rows = []
    for name in (name for name in ORDER if name in recipes):
        one = recipes[name]
        seconds = None if one["seconds"] is None else sum(one["seconds"].values())
        predicted = one["predicted"]
        row = [f"`{name}`", str(one["threads"]), _of(seconds, predicted["seconds"], 60)]
        row += [_of(one["peak_memory_bytes"], predicted["bytes"], 1e9)]
        row += [f"{one['weight_bytes'] / 1e6:.1f}", f"{one['tuned_tokens']:,}"]
        for text in TEXTS:
            got = one[text]
            span = got["intervals"]["perplexity_ratio"]
            ratio = f"{got['perplexity_ratio']:.3f}x [{span['low']:.3f} to {span['high']:.3f}]"
            row += [ratio, f"{got['kl']:.4f}"]
            row += [f"{got['agreement']:.1%}"] if text == "wikitext" else []
        rows.append(row)
    return protocol.markdown_table(head, rows)


def _of(measured: float | None, predicted: float, unit: float) -> str:
    shown = "resumed" if measured is None else f"{measured / unit:.1f}"
    return f"{shown} ({predicted / unit:.1f})"


def main() -> None:
    args = parse()
    if args.table:
        protocol.write_between(args.table, "recipes", page(protocol.read_json(args.out).get("recipes", {})))
        return
    args.model, args.data = str(protocol.model_folder(args.model)), protocol.data_folder(args.data)
    protocol.set_threads(args.threads)
    run(args)


if __name__ == "__main__":
    main()
