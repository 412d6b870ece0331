"""One-shot compression of one model: perplexity and KL of each configuration, beside what rivals reached.

Each configuration is one `gossamer compress` in a process of its own; its checkpoint is then measured through
the kernels that it decodes with (int8 activations included), beside the dense model in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.compress import told_by_gossamer

# name: (options of `gossamer compress`, the run in results/original.json that it answers)
CONFIGS: dict[str, tuple[str, str | None]] = {
    "sparsegpt_50": ("--sparsity 0.5 --values bf16 --head-values bf16 --windows 128", "sparsegpt_50"),
    "sparsegpt_2_4": ("--pattern 2:4 --values bf16 --head-values bf16 --windows 32", "sparsegpt_2_4"),
    "sparsegpt_70": ("--sparsity 0.7 --values bf16 --head-values bf16 --windows 32", "sparsegpt_70"),
    "wanda_2_4": ("--method wanda --pattern 2:4 --values bf16 --head-values bf16 --windows 32", "wanda_2_4"),
    "int4_g64": ("--sparsity 0 --values int4 --windows 32", None),
    "int4_g32": ("--sparsity 0 --values int4 --group 32 --windows 32", None),
    "int3_g64": ("--sparsity 0 --values int3 --windows 32", None),
    "nl4_g64": ("--sparsity 0 --values nl4 --windows 32", None),
    "nl3_g64": ("--sparsity 0 --values nl3 --windows 32", None),
    "joint_50_int4_w64": ("--sparsity 0.5 --values int4 --windows 64", "joint_50_int4"),
    "joint_50_int4": ("--sparsity 0.5 --values int4 --windows 32", "joint_50_int4"),
    "joint_32_64_int4": ("--pattern 32:64 --values int4 --windows 32", "joint_50_int4"),
    "joint_2_4_int4": ("--pattern 2:4 --values int4 --windows 32", None),
    "tuned_32_64_int4": ("--pattern 32:64 --values int4 --windows 32 --tune blockwise", None),
    "tuned_int3_g64": ("--sparsity 0 --values int3 --windows 32 --tune blockwise", None),
    "tuned_int4_g64": ("--sparsity 0 --values int4 --windows 32 --tune blockwise", None),
    "tuned_2_4": ("--pattern 2:4 --values bf16 --head-values bf16 --windows 32 --tune blockwise", None),
}

# the catalogue: every method in every pattern that it accepts, in bfloat16 with 32 windows
PATTERNS = {
    "50": "--sparsity 0.5",
    "60": "--sparsity 0.6",
    "70": "--sparsity 0.7",
    "32_64": "--pattern 32:64",
    "2_4": "--pattern 2:4",
    "4_8": "--pattern 4:8",
    "16x4_30": "--pattern 16x4 --sparsity 0.3",
}
METHODS = {
    "random": "random",
    "random_search": "random_search",
    "magnitude": "magnitude",
    "wanda": "wanda",
    "ria": "ria",
    "taylor": "taylor",
    "taylor_signed": "taylor --option mean=signed",
    "fisher": "fisher",
    "obs": "obs",
    "admm": "admm",
    "dsnot": "dsnot",  # from Wanda's masks
    "dsnot_magnitude": "dsnot --option start=magnitude",
}
ALLOCATIONS = ("global", "erk", "owl", "sensitivity")  # uniform: the catalogue's own
READ_GRADIENTS = {"fisher", "taylor", "sensitivity"}
PLAIN = "--values bf16 --head-values bf16 --windows 32"
CATALOGUE: dict[str, tuple[str, str | None]] = {
    **{
        f"{method}_{pattern}": (f"--method {name} {options} {PLAIN}", None)
        for method, name in METHODS.items()
        for pattern, options in PATTERNS.items()
        if not (method.startswith("dsnot") and pattern == "16x4_30")
    },
    **{
        f"{method}_{share}_{allocation}": (
            f"--method {method} --sparsity 0.{share} --allocation {allocation} {PLAIN}",
            None,
        )
        for method in ("wanda", "obs", "fisher")
        for share in ("60", "70")
        for allocation in ALLOCATIONS
    },
    **{
        f"admm_{name}_int4": (f"--method admm {options} --values int4 --windows 32", None)
        for name, options in (
            ("50", "--sparsity 0.5"),
            ("32_64", "--pattern 32:64"),
            ("2_4", "--pattern 2:4"),
        )
    },
}

# columns of outlier inputs in bfloat16 beside the integers (LLM.int8()), and the integers alone
OUTLIERS: dict[str, tuple[str, str | None]] = {
    f"{values}_{name}": (f"--sparsity 0 --values {values} --windows 32 {options}", None)
    for values in ("int8", "int4", "nl4")
    for name, options in (
        ("alone", ""),
        ("outliers_6", "--outliers 6"),
        ("outliers_20", "--outliers 20"),
        ("outliers_1pct", "--outlier-share 0.01"),
        ("outliers_5pct", "--outlier-share 0.05"),
    )
}


# equal bytes: a uniform run, and its rival under a budget of the bytes that its weight file took
EQUAL_BYTES: dict[str, tuple[str, str | None]] = {}
BUDGETS: dict[str, str] = {}  # the uniform run whose bytes a configuration may take
for _method in ("wanda", "obs"):
    for _share, _values in (("50", "int4"), ("60", "int4"), ("70", "int4"), ("60", "bf16")):
        _name = f"{_method}_{_share}_{_values}"
        _options = f"--method {_method} --windows 32 --values {_values}"
        EQUAL_BYTES[f"{_name}_uniform"] = (f"{_options} --sparsity 0.{_share}", None)
        EQUAL_BYTES[f"{_name}_budget"] = (f"{_options} --allocation sensitivity", None)
        BUDGETS[f"{_name}_budget"] = f"{_name}_uniform"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.one_shot", description=__doc__)
    protocol.add_model_arguments(parser, required=False)
    parser.add_argument(
        "--configs",
        default="all",
        metavar="A,B",
        help="all, catalogue, equal_bytes, outliers, or some of: "
        + ", ".join((*CONFIGS, *CATALOGUE, *EQUAL_BYTES, *OUTLIERS)),
    )
    parser.add_argument("--missing", action="store_true", help="only those that the results lack")
    parser.add_argument("--eval-windows", type=int, default=protocol.EVAL_WINDOWS)
    parser.add_argument("--measure-only", action="store_true", help="measure what --keep holds already")
    parser.add_argument(
        "--gradients",
        type=Path,
        metavar="DIR",
        help="one gradient pass for all, kept there (else one each)",
    )
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the checkpoints in this folder")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "one_shot.json", metavar="FILE")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing: write the catalogue there"
    )
    return parser.parse_args()


def compress(args: argparse.Namespace, options: str, out: Path) -> dict[str, Any]:
    """One `gossamer compress` in a process of its own: seconds and peak memory."""
    words = ["--calibration", str(Path(args.data) / protocol.CALIBRATION_TEXT), *options.split()]
    words += ["--seqlen", str(protocol.CALIBRATION_SEQLEN), "--threads", str(args.threads)]
    kept: Path | None = args.gradients if set(options.split()) & READ_GRADIENTS else None
    if kept is not None and "mean=signed" in options:
        kept = kept.with_name(f"{kept.name}-signed")
    made = {"options": options}
    if kept is not None:
        words += ["--gradients", str(kept)]
        made["gradients"] = "found" if kept.exists() else "kept"
    start = time.perf_counter()
    told = told_by_gossamer(args.threads, "compress", args.model, "--out", str(out), *words)
    return {
        **made,
        "seconds": round(time.perf_counter() - start, 1),
        # its own word: what wait4 says of a child counts this process's memory too, up to the exec
        "peak_rss_gb": round(told["peak_memory_bytes"] / 1e9, 3),
    }


@lru_cache
def reference(model: str, data: str, count: int) -> tuple[Any, Any]:
    """The measured windows, and the dense model's reader, which reads each of them once. Its weights are in
    bfloat16, multiplied in float32 where the machine has no bfloat16 products: five times as fast there."""
    from gossamer.evaluate.logits import LogitReader
    from gossamer.recipes.load import load

    windows = protocol.measured_windows(protocol.load_tokenizer(model), data, count)
    return windows, LogitReader(load(model, dtype="fast").model, remember=True)


def measure(args: argparse.Namespace, out: Path) -> dict[str, Any]:
    """Bits and quality of a checkpoint, through its own kernels, beside the dense model in bfloat16."""
    from gossamer.evaluate import evaluate, size_of
    from gossamer.models import load_checkpoint

    windows, dense = reference(args.model, args.data, args.eval_windows)
    quality = evaluate(load_checkpoint(out), windows, reference=dense)
    size = size_of(out)
    low, high = (round(end, 3) for end in _ends(quality.intervals()["perplexity_ratio"]))
    return {
        "bits_linears": round(size.linear_bits, 3),
        "bits_all_in": round(size.all_bits, 3),
        "weight_file_bytes": size.weight_file_bytes,
        "perplexity": round(quality.perplexity, 3),
        "dense_perplexity": round(quality.reference_perplexity or 0.0, 3),
        "ratio_interval": [low, high],
        "mean_kl": round(quality.mean_kl or 0.0, 5),
        "top1_agreement": round(quality.top1_agreement or 0.0, 4),
        "tokens": quality.tokens,
    }


def bytes_of(results: Path, name: str) -> int:
    """Bytes of the weight file of a run that the results hold."""
    run = protocol.read_json(results).get("runs", {}).get(name, {})
    if "weight_file_bytes" not in run:
        raise SystemExit(f"{name} is needed first: its bytes are the budget")
    return int(run["weight_file_bytes"])


def catalogue_table(runs: dict[str, Any]) -> str:
    """Methods x patterns in Markdown: perplexity and KL; over all patterns seconds and the peak of memory."""
    head = ["method", "50 %", "60 %", "70 %", "32:64", "2:4", "4:8", "16x4, 30 %", "seconds", "peak GB"]
    rows = []
    for method in METHODS:
        cells = [runs.get(f"{method}_{pattern}") for pattern in PATTERNS]
        if done := [run for run in cells if run]:
            told = [run["seconds"] for run in done if run.get("gradients") != "found"]
            seconds = [one for one in told if one is not None]  # None: the run was paused
            peak = max(run["peak_rss_gb"] for run in done)
            took = f"{min(seconds):.0f} to {max(seconds):.0f}" if seconds else ""
            rows.append([method, *map(_cell, cells), took, f"{peak:.1f}"])
    return protocol.markdown_table(head, rows)


def _cell(run: dict[str, Any] | None) -> str:
    if run is None:
        return ""
    perplexity = run["perplexity"]
    first = f"{perplexity:.1f}" if perplexity < 10_000 else f"{perplexity:.0e}"
    return f"{first} · {run['mean_kl']:.2f}"


def _ends(interval: Any) -> tuple[float, float]:
    return interval.low, interval.high


def main() -> None:
    args = parse()
    if args.table:
        runs = protocol.read_json(args.out).get("runs", {})
        protocol.write_between(args.table, "catalogue", catalogue_table(runs))
        return
    args.model = str(protocol.model_folder(args.model))
    args.data = str(protocol.data_folder(args.data))
    protocol.set_threads(args.threads)
    groups = {"all": CONFIGS, "catalogue": CATALOGUE, "equal_bytes": EQUAL_BYTES, "outliers": OUTLIERS}
    known = {name: config for group in groups.values() for name, config in group.items()}
    names = list(groups.get(args.configs) or args.configs.split(","))
    if unknown := [name for name in names if name not in known]:
        raise SystemExit(f"no such configuration: {', '.join(unknown)}; there are {', '.join(known)}")
    if args.missing:
        done = protocol.read_json(args.out).get("runs", {})
        names = [name for name in names if name not in done]
    original = protocol.read_json(protocol.RESULTS / "original.json").get("runs", {})
    rows = []
    for name in names:
        options, rival = known[name]
        if name in BUDGETS:
            options += f" --budget {bytes_of(args.out, BUDGETS[name])}B"
        folder = args.keep or Path(tempfile.mkdtemp())
        out = folder / name
        try:
            load = round(os.getloadavg()[0], 2)
            kept = protocol.read_json(args.out).get("runs", {}).get(name, {}) if args.measure_only else {}
            made = {"options": options} if args.measure_only else compress(args, options, out)
            measured = {**measure(args, out), "threads": args.threads, "load_average_before": load}
            figures = {**kept, **made, **measured}
        finally:
            if args.keep is None:
                shutil.rmtree(folder)
        found = original.get(rival, {})
        same = args.eval_windows == protocol.EVAL_WINDOWS  # as theirs were measured
        theirs = (found.get("perplexity") or found.get("perplexity_elsewhere")) if same else None
        figures["original_perplexity"] = theirs
        ratio = round(figures["perplexity"] / theirs, 3) if theirs else None
        rows.append([name, figures["bits_linears"], figures["perplexity"], figures["mean_kl"], theirs, ratio,
                     figures.get("seconds"), figures.get("peak_rss_gb")])  # fmt: skip
        protocol.update_json(
            args.out,
            {
                "runs": {name: figures},
                "command": "python -m benchmarks.one_shot --model DIR --threads N",
                "machine": protocol.machine(),
            },
        )
        print(json.dumps({name: figures}), flush=True)
    head = ["configuration", "bits", "perplexity", "KL", "original", "ratio", "seconds", "peak GB"]
    protocol.print_table(head, rows)


if __name__ == "__main__":
    main()
