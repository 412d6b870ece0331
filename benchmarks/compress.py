"""Compresses one model with Gossamer and with llm-compressor in turn, on equal threads and windows.

Ours is the whole `gossamer compress` command (loading, tokenising, packing and writing included); the seconds
of llm-compressor are those of its `oneshot` alone, which flatters it. Peak memory is of the whole process.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import protocol

GOSSAMER = "from gossamer.cli.app import main; main()"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compress", description=__doc__)
    protocol.add_model_arguments(parser)
    parser.add_argument(
        "--rival-python", metavar="PATH", help="python of the environment that has llmcompressor"
    )
    parser.add_argument("--rival-dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--method", choices=["sparsegpt", "wanda"], default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", metavar="N:M", help="such as 2:4 (default: unstructured)")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of 1,024 (default 128)")
    parser.add_argument("--eval-windows", type=int, default=protocol.EVAL_WINDOWS, help="0 skips perplexity")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "compress.json", metavar="FILE")
    return parser.parse_args()


def ours(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One `gossamer compress` in a process of its own, and the perplexity of what it wrote."""
    out = work / "ours"
    command = [sys.executable, "-c", GOSSAMER, "compress", args.model, "--out", str(out), "--json"]
    command += ["--method", args.method, "--values", "bf16", "--head-values", "bf16"]
    command += ["--pattern", args.pattern] if args.pattern else ["--sparsity", str(args.sparsity)]
    command += ["--calibration", str(Path(args.data) / protocol.CALIBRATION_TEXT)]
    command += ["--seqlen", str(protocol.CALIBRATION_SEQLEN), "--windows", str(args.windows)]
    command += ["--threads", str(args.threads)]
    start = time.perf_counter()
    with (work / "ours.json").open("w") as stdout:
        code = subprocess.run(command, stdout=stdout, env=limited(args.threads), check=False).returncode
    seconds = time.perf_counter() - start
    if code != 0:
        raise SystemExit(f"gossamer compress ended with {code}")
    told = json.loads((work / "ours.json").read_text())
    figures: dict[str, Any] = {
        "seconds": round(seconds, 1),
        "peak_rss_gb": round(told["peak_memory_bytes"] / 1e9, 2),
        "zeros": told.get("sparsity"),
        "perplexity": None,
    }
    if args.eval_windows:
        import gossamer

        tokenizer = protocol.load_tokenizer(args.model)
        windows = protocol.measured_windows(tokenizer, args.data, args.eval_windows)
        figures["perplexity"] = round(protocol.perplexity(gossamer.load(out).model, windows), 4)
    return figures


def theirs(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One run of `benchmarks.rival_llmcompressor` in its own environment."""
    out = work / "theirs.json"
    command = [args.rival_python, "-m", "benchmarks.rival_llmcompressor", "--model", args.model]
    command += ["--data", args.data, "--threads", str(args.threads), "--method", args.method]
    command += ["--sparsity", str(args.sparsity), "--pattern", args.pattern or "0:0"]
    command += ["--windows", str(args.windows), "--eval-windows", str(args.eval_windows)]
    command += ["--dtype", args.rival_dtype, "--out", str(out)]
    root = Path(__file__).parent.parent
    subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL, env=limited(args.threads))
    (figures,) = json.loads(out.read_text())["runs"].values()
    return {key: figures[key] for key in ("seconds", "peak_rss_gb", "zeros", "perplexity")}


def told_by_gossamer(threads: int, *words: str, **env: str) -> Any:
    """What the command ``gossamer words --json`` says, in a process of its own that keeps to ``threads``."""
    command = [sys.executable, "-c", GOSSAMER, *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=limited(threads) | env, check=False)
    if done.returncode:
        raise SystemExit(f"gossamer {' '.join(words)} failed")
    return json.loads(done.stdout)


def limited(threads: int) -> dict[str, str]:
    """The environment for a child that keeps to `threads` threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}


def main() -> None:
    args = parse()
    args.model, args.data = str(Path(args.model).resolve()), str(protocol.data_folder(args.data))
    protocol.set_threads(args.threads)
    load = round(os.getloadavg()[0], 2)
    with tempfile.TemporaryDirectory() as folder:
        runs = {"gossamer": ours(args, Path(folder))}
        if args.rival_python:
            runs["llm-compressor"] = theirs(args, Path(folder))
    rows = [[name, *figures.values()] for name, figures in runs.items()]
    ratio = None
    if len(runs) == 2:
        ratio = round(runs["llm-compressor"]["seconds"] / runs["gossamer"]["seconds"], 3)
        rows.append(["llm-compressor / gossamer", f"{ratio}x", "", "", ""])
    name = f"{args.method}_{args.pattern or args.sparsity}_w{args.windows}_t{args.threads}"
    settings = {
        "rival_dtype": args.rival_dtype,
        "eval_windows": args.eval_windows,
        "load_average_before": load,
    }
    protocol.update_json(
        args.out,
        {
            "runs": {name: {**runs, "ratio": ratio, **settings}},
            "command": "python -m benchmarks.compress --model DIR --rival-python PATH --threads N",
            "machine": protocol.machine(),
        },
    )
    protocol.print_table(["tool", *next(iter(runs.values()))], rows)


if __name__ == "__main__":
    main()
