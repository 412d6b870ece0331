"""Activation sparsity at run time: perplexity and KL of each method, through the native decoder.

A level is the share of the bytes of all linear layers (in the blocks) that dropped activations skip, the
same for every method: one that leaves some layers dense drops more at the others (CHESS counts the rows of
the up projection that its activated gates make needless, which our decoder reads all the same). *achieved*
is the share of the bytes that met dropped activations alone on the measured text. Thresholds come from the
calibration text, each below the gates before it. KL and top-1 agreement are to the dense model of the same
values, and to the original in bfloat16, all in the native decoder. Nothing is timed. Cells that a result file
holds are not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import protocol
from benchmarks.dynamic.gated import (
    LEVELS,
    METHODS,
    VALUES,
    Layouts,
    add_gate_arguments,
    all_gates,
    key_of,
    log_probabilities,
    packed_model,
    skipped,
)
from gossamer.engine import Decoder, NativeSession

HEAD = ["values", "gates", "achieved", "perplexity", "ratio", "KL, same values", "KL, original", "top-1"]
ORIGINAL = "bfloat16"


def parse() -> argparse.Namespace:
    parser = protocol.parser("dynamic quality", __doc__)
    add_gate_arguments(parser)
    parser.add_argument("--levels", nargs="+", type=float, default=list(LEVELS))
    parser.add_argument(
        "--values", nargs="+", default=list(VALUES), help="bfloat16, int8, int4, or folders of checkpoints"
    )
    parser.add_argument("--eval-windows", type=int, default=1, help="of 2,048 (default 1; figures: 20)")
    parser.add_argument(
        "--dense-tokens", type=int, default=0,
        help="of each window, which are read without gates and not measured (the paper on TEAL: 1024)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_quality.json", metavar="FILE")
    return parser.parse_args()


def of_window(dense: Decoder, decoder: Decoder, ids: Tensor, first: int) -> Tensor:
    """Log-probabilities of the positions from ``first`` on but the last, float32; earlier ones run dense."""
    session = NativeSession(dense)
    if first:
        session.prompt(ids[:first])
    return log_probabilities(session.beside(decoder).logits(ids[first:])[:-1])


class Measured:
    """Sums over the windows of one cell: loss and KL to both references in nats, agreement."""

    def __init__(self) -> None:
        self.sums = {"loss": 0.0, "same": 0.0, "original": 0.0, "top1": 0.0}
        self.tokens = 0

    def add(self, logp: Tensor, ids: Tensor, same: Tensor, original: Tensor) -> None:
        self.tokens += len(logp)
        self.sums["loss"] -= float(logp.gather(1, ids[1:, None]).double().sum())
        self.sums["top1"] += float((logp.argmax(1) == original.argmax(1)).sum())
        for name, want in (("same", same), ("original", original)):
            for some in range(0, len(logp), 256):  # a vocabulary's width of temporary numbers at a time
                rows = slice(some, some + 256)
                self.sums[name] += float((want[rows].exp() * (want[rows] - logp[rows])).sum().double())

    def to_dict(self) -> dict[str, Any]:
        mean = {name: value / self.tokens for name, value in self.sums.items()}
        return {
            "perplexity": round(math.exp(mean["loss"]), 3),
            "kl_same_values": round(mean["same"], 5),
            "kl_original": round(mean["original"], 5),
            "top1_agreement": round(mean["top1"], 4),
            "tokens": self.tokens,
        }


def run(args: argparse.Namespace) -> None:
    tokenizer = protocol.load_tokenizer(args.model)
    windows = protocol.measured_windows(tokenizer, args.data, args.eval_windows)
    gates = {
        key_of(name, allocation, level): found
        for name, allocation, level, found in all_gates(args, args.levels)
    }
    torch.set_num_threads(args.threads)
    facts = {"command": "python -m benchmarks.dynamic quality --model DIR", "machine": protocol.machine()}
    protocol.update_json(args.out, facts)
    originals: list[Tensor] = []
    first = args.dense_tokens
    for values in args.values:
        label = Path(values).name + (f" after {first} dense" if first else "")
        done = protocol.read_json(args.out).get("runs", {})
        wanted = {
            key: found
            for key, found in {"dense": None, **gates}.items()
            if done.get(f"{label} {key}", {}).get("windows") != args.eval_windows
        }
        if not wanted:
            continue
        if not originals:
            original = Layouts(packed_model(args.model, ORIGINAL)).decoder()
            originals = [of_window(original, original, ids, first) for ids in windows]
        layouts = Layouts(packed_model(args.model, values))
        dense = layouts.decoder()
        same = originals if values == ORIGINAL else [of_window(dense, dense, ids, first) for ids in windows]
        for key, found in wanted.items():
            decoder, measured = dense.gated(None if found is None else found.gates), Measured()
            for ids, a, b in zip(windows, same, originals, strict=True):
                measured.add(of_window(dense, decoder, ids, first), ids[first:], a, b)
            cell = {"values": label, "gates": key, "windows": args.eval_windows, **measured.to_dict()}
            cell["achieved"] = 0.0 if found is None else round(skipped(decoder, layouts.modules), 4)
            protocol.update_json(args.out, {"runs": {f"{label} {key}": cell}})
            print(json.dumps(cell), flush=True)


def table(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The runs as a markdown table."""
    rows = [HEAD, ["---"] * len(HEAD)]
    order = {name: at for at, name in enumerate(METHODS)}
    levels = sorted(runs.values(), key=lambda r: (r["values"], r["gates"].split()[-2:], order.get(
        r["gates"].split()[0], -1)))  # fmt: skip
    for r in levels:
        dense = runs.get(f"{r['values']} dense", r)["perplexity"]
        figures = [r["achieved"], r["perplexity"], round(r["perplexity"] / dense, 4)]
        figures += [r["kl_same_values"], r["kl_original"], r["top1_agreement"]]
        rows.append([r["values"], r["gates"], *map(str, figures)])
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main() -> None:
    args = parse()
    protocol.data_folder(args.data)
    protocol.set_threads(args.threads)
    run(args)
    print(table(protocol.read_json(args.out)["runs"]))


if __name__ == "__main__":
    with torch.inference_mode():
        main()
