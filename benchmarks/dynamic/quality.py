"""Activation sparsity at run time: perplexity and KL of each method beside the dense model.

A level is the share of the bytes of all linear layers (in the blocks) that dropped activations skip, the
same for every method: one that leaves some layers dense drops more at the others. *achieved* is what was
skipped on the measured text. Thresholds come from the calibration text, each below the gates before it;
everything runs in PyTorch, in float32, and nothing is timed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import protocol

METHODS = ("teal", "wina", "chess", "topk")
ALLOCATIONS = ("uniform", "greedy")
LEVELS = (0.15, 0.25, 0.4, 0.5, 0.6)
HEAD = ["method", "allocation", "level", "achieved", "perplexity", "ratio", "KL", "top-1"]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.dynamic quality",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    protocol.add_model_arguments(parser)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=ALLOCATIONS)
    parser.add_argument("--levels", nargs="+", type=float, default=list(LEVELS))
    parser.add_argument("--eval-windows", type=int, default=protocol.EVAL_WINDOWS)
    parser.add_argument("--windows", type=int, default=8, help="calibration windows of 1,024 (default 8)")
    parser.add_argument(
        "--greedy-tokens",
        type=int,
        default=512,
        help="of the first calibration window, for the greedy search",
    )
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_quality.json", metavar="FILE")
    return parser.parse_args()


def skipped(sizes: Mapping[str, float], shares: Mapping[str, float], total: float) -> float:
    """The share of ``total`` bytes that is skipped where ``shares`` of the activations of each site are."""
    return sum(share * sizes[name] for name, share in shares.items()) / total


def run(args: argparse.Namespace) -> None:
    from gossamer.dynamic.activations import calibrate, greedy, linear_sites, method, settle
    from gossamer.evaluate import evaluate

    tokenizer = protocol.load_tokenizer(args.model)
    windows = protocol.measured_windows(tokenizer, args.data, args.eval_windows)
    calibration = protocol.calibration_windows(tokenizer, args.data, args.windows)
    model, dense = protocol.load_model(args.model), protocol.load_model(args.model)
    total = sum(site.bytes for site in linear_sites(model).values())
    protocol.update_json(
        args.out,
        {"command": "python -m benchmarks.dynamic quality --model DIR", "machine": protocol.machine()},
    )
    for name in args.methods:
        calibrated = calibrate(model, method(name), calibration)
        sizes = {site: found.bytes for site, found in calibrated.sites.items()}
        for level in args.levels:
            sparsity = level * total / sum(sizes.values())
            for allocation in args.allocations:
                levels: Any = sparsity
                if allocation == "greedy":
                    levels = greedy(model, calibrated, sparsity, calibration[:1, : args.greedy_tokens])
                gates = settle(model, calibrated.gates(levels), calibration)
                with gates.attach(model) as attached:
                    quality = evaluate(model, windows, reference=dense)
                found = {
                    "method": name,
                    "allocation": allocation,
                    "level": level,
                    "achieved": round(skipped(sizes, attached.achieved(), total), 4),
                    "perplexity": round(quality.perplexity, 3),
                    "dense_perplexity": round(quality.reference_perplexity or 0.0, 3),
                    "ratio": round(quality.perplexity_ratio or 0.0, 4),
                    "mean_kl": round(quality.mean_kl or 0.0, 4),
                    "top1_agreement": round(quality.top1_agreement or 0.0, 4),
                    "intervals": {key: interval.to_dict() for key, interval in quality.intervals().items()},
                    "tokens": quality.tokens,
                    "calibration_windows": args.windows,
                }
                key = f"{name}_{allocation}_{round(100 * level)}"
                protocol.update_json(args.out, {"runs": {key: found}})
                print(json.dumps({key: found}), flush=True)


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The runs as a markdown table, levels together."""
    order = sorted(runs.values(), key=lambda r: (r["level"], METHODS.index(r["method"]), r["allocation"]))
    rows = [HEAD, ["---"] * len(HEAD)]
    for r in order:
        figures = [r["achieved"], r["perplexity"], r["ratio"], r["mean_kl"], r["top1_agreement"]]
        rows.append([r["method"], r["allocation"], f"{100 * r['level']:.0f} %", *map(str, figures)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    args = parse()
    if not args.data:
        raise SystemExit("the texts are needed: pass --data DIR or set GOSSAMER_DATA")
    protocol.set_threads(args.threads)
    run(args)
    print(table(protocol.read_json(args.out)["runs"]))


if __name__ == "__main__":
    main()
