"""What perplexity hides: probes of a dense model and of checkpoints made from it, beside their perplexity.

Every model answers the same items of every probe (knowledge, retrieval, json) through the engine that it is
served by; the dense one in `--dtype`, in the native decoder as the checkpoints are. A cell is a model and a
probe, and is measured once: cells that lie in the JSON file are not asked again (`--again` does), so that a
run that was stopped goes on. The table is made of the answers in the file: shares of right ones, and what
flipped from the dense model's, with the paired interval of the difference.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path
from typing import Any

import gossamer as gs
from benchmarks import protocol
from gossamer.bench.machine import cpu_name
from gossamer.errors import EvaluationError
from gossamer.evaluate.probes import PROBES
from gossamer.evaluate.task_scores import flips
from gossamer.kernels import isa

DENSE = "dense"


def parse() -> argparse.Namespace:
    parser = protocol.parser("probes", __doc__)
    protocol.add_model_arguments(parser, required=False)
    parser.set_defaults(threads=2)
    parser.add_argument(
        "checkpoints", nargs="*", metavar="[NAME=]CHECKPOINT", help="made from the dense model"
    )
    parser.add_argument("--probes", nargs="+", default=list(PROBES), help="(default: all)")
    parser.add_argument("--items", type=int, default=200, help="of each probe (default 200)")
    parser.add_argument("--dtype", default="bfloat16", help="of the dense model")
    parser.add_argument("--windows", type=int, default=protocol.EVAL_WINDOWS, help="of perplexity; 0: none")
    parser.add_argument("--again", action="store_true", help="measure cells anew that are there")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "probes.json")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: write the table there")
    return parser.parse_args()


def contenders(args: argparse.Namespace) -> dict[str, str]:
    """Names and places of the models, the dense one first."""
    found = {DENSE: args.model}
    for given in args.checkpoints:
        name, equals, path = given.partition("=")
        path = path if equals else given
        name = name if equals else Path(given).name
        if name in found:
            raise SystemExit(f"two contenders are called {name}: write NAME=CHECKPOINT")
        if not (Path(path) / "gossamer.json").is_file():
            raise SystemExit(f"{path} is no checkpoint")  # now, not when its turn has come
        found[name] = path
    return found


def run(args: argparse.Namespace) -> None:
    if args.items < 2:
        raise SystemExit("--items takes 2 or more")
    if args.windows:
        protocol.data_folder(args.data)
    common = {"isa": isa(), "threads": args.threads, "dtype": args.dtype, "cpu": cpu_name()}
    for name, path in contenders(args).items():
        manifest = Path(path) / "gossamer.json"
        made = hashlib.sha256(manifest.read_bytes()).hexdigest()[:16] if manifest.exists() else None
        setting = {**common, "checkpoint": made}
        parts = [*args.probes, *(["perplexity"] if args.windows else [])]
        cells = protocol.read_json(args.out).get("cells", {})
        known = {part: cells.get(f"{name}, {part}") for part in parts}
        left = [part for part in parts if args.again or not _there(known[part], setting, args, part)]
        if not left:
            continue
        loaded = gs.load(path, dtype=args.dtype, engine="native")
        for part in left:
            begun = time.perf_counter()
            try:
                told = perplexity(args, loaded) if part == "perplexity" else probed(args, loaded, part)
            except EvaluationError as error:
                print(f"{name}, {part}: skipped: {error}", flush=True)
                continue
            cell = {"model": name, "part": part, "setting": setting, **told}
            cell["seconds"] = time.perf_counter() - begun
            protocol.update_json(args.out, {"cells": {f"{name}, {part}": cell}})
            print(f"{name}, {part}: {cell['seconds']:.0f} s", flush=True)


def _there(cell: dict[str, Any] | None, setting: dict[str, Any], args: argparse.Namespace, part: str) -> bool:
    """Whether ``cell`` was measured in this ``setting``, on as many items or windows as are asked for."""
    if cell is None or cell.get("setting") != setting:
        return False
    return bool(cell["asked"] == (args.windows if part == "perplexity" else args.items))


def probed(args: argparse.Namespace, loaded: Any, probe: str) -> dict[str, Any]:
    found = gs.measure_probes(loaded, [probe], items=args.items)
    return {"asked": args.items, **found.to_dict()["probes"][probe]}


def perplexity(args: argparse.Namespace, loaded: Any) -> dict[str, Any]:
    text = protocol.data_folder(args.data) / protocol.TEST_TEXT
    found = gs.quality(loaded, text=text, windows=args.windows, seqlen=protocol.EVAL_SEQLEN)
    return {"asked": args.windows, "perplexity": found.quality.perplexity}


def table(cells: dict[str, Any]) -> None:
    models = list(dict.fromkeys(cell["model"] for cell in cells.values()))
    rows = []
    for model in models:
        found = cells.get(f"{model}, perplexity")
        label = "" if found is None else f"{found['perplexity']:.2f}"
        for cell in (one for one in cells.values() if one["model"] == model and one["part"] != "perplexity"):
            before = cells.get(f"{DENSE}, {cell['part']}")
            for measure, right in cell["measures"].items():
                low, high = right["interval"]
                share = f"{100 * right['share']:.1f} [{100 * low:.1f} to {100 * high:.1f}]"
                compared = [] if model == DENSE or before is None else against(cell, before, measure)
                rows.append([model, label, cell["part"], measure, cell["items"], share, *compared])
    width = max((len(row) for row in rows), default=0)
    head = [
        "",
        "perplexity",
        "probe",
        "",
        "items",
        "right %",
        "right->wrong",
        "wrong->right",
        "points",
        "same %",
    ]
    protocol.print_table(head, [row + [""] * (len(head) - len(row)) for row in rows if width])


def page(cells: dict[str, Any]) -> str:
    """Shares of right answers in Markdown, and paired differences to the dense model's with intervals."""
    dense = [cell for cell in cells.values() if cell["model"] == DENSE and cell["part"] != "perplexity"]
    asked = [(cell["part"], measure) for cell in dense for measure in cell["measures"]]
    rows = []
    for model in dict.fromkeys(cell["model"] for cell in cells.values()):
        found = cells.get(f"{model}, perplexity")
        row = [model, "" if found is None else f"{found['perplexity']:.1f}"]
        for part, measure in asked:
            cell, before = cells.get(f"{model}, {part}"), cells[f"{DENSE}, {part}"]
            if cell is None:
                row.append("")
                continue
            share = f"{100 * cell['measures'][measure]['share']:.1f}"
            row.append(share if model == DENSE else f"{share} ({against(cell, before, measure)[2]})")
        rows.append(row)
    return protocol.markdown_table(["", "perplexity", *(f"{p}: {m}" for p, m in asked)], rows)


def against(cell: dict[str, Any], before: dict[str, Any], measure: str) -> list[str]:
    """Flips from the dense model's answers, the difference with its interval, and equal answers."""
    now, then = (one["measures"][measure]["right"] for one in (cell, before))
    if len(now) != len(then):
        return ["other items"]
    told = flips([bool(x) for x in now], [bool(x) for x in then])
    points = told.difference.map(lambda share: 100 * share)
    same = sum(a == b for a, b in zip(cell["answers"], before["answers"], strict=True)) / len(now)
    interval = f"{points.estimate:+.1f} [{points.low:.1f} to {points.high:.1f}]"
    return [str(told.lost), str(told.gained), interval, f"{100 * same:.0f}"]


def main() -> None:
    args = parse()
    if args.table:
        protocol.write_between(args.table, "probes", page(protocol.read_json(args.out).get("cells", {})))
        return
    args.model = str(protocol.model_folder(args.model))
    protocol.set_threads(args.threads)
    run(args)
    table(json.loads(args.out.read_text()).get("cells", {}))


if __name__ == "__main__":
    main()
