"""Activations before and while any are dropped: how small they are, what a model bears, what it is worth.

Natural sparsity: the share of the inputs of linear layers that are zero, or within a hundredth of the largest
of their token, by kind of layer (Lazy Neuron). PPL-p %: the largest sparsity at which perplexity rises by at
most p per cent (Sparsing law), thresholds at one share everywhere. Top-k: expected calibration error and
perplexity on text of which a share of the tokens is replaced, with all inputs of linear layers, or those of
down projections alone, cut to the largest of each token. Lazy Neuron reports that top-k makes a model trained
with it more robust and better calibrated; here it is cut afterwards. transformers in bfloat16, nothing timed.
"""

from __future__ import annotations

import argparse
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from benchmarks import protocol
from gossamer.dynamic.activations import calibrate, method, natural_sparsity, ppl_p
from gossamer.evaluate import confidence, corrupted

KINDS = ("q_proj", "o_proj", "gate_proj", "down_proj")  # k, v and up read what q and gate read
CORRUPTED = (0.0, 0.05, 0.1)


def parse() -> argparse.Namespace:
    parser = protocol.parser("dynamic natural", __doc__)
    protocol.add_model_arguments(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--percents", nargs="+", type=float, default=[1.0, 5.0])
    parser.add_argument("--levels", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of 1,024 (default 4)")
    parser.add_argument("--eval-windows", type=int, default=2, help="of 2,048 (default 2)")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_natural.json")
    return parser.parse_args()


def by_kind(shares: dict[str, float]) -> dict[str, dict[str, float]]:
    """Mean, least and most over the blocks of each kind of layer."""
    found = {}
    for kind in KINDS:
        values = [share for name, share in shares.items() if name.endswith(kind)]
        found[kind] = {"mean": statistics.mean(values), "least": min(values), "most": max(values)}
    return found


def main() -> None:
    args = parse()
    protocol.set_threads(args.threads)
    tokenizer, model = protocol.load_tokenizer(args.model), protocol.load_model(args.model, "bfloat16")
    text = protocol.calibration_windows(tokenizer, args.data, args.windows)
    windows = protocol.measured_windows(tokenizer, args.data, args.eval_windows)
    facts: dict[str, Any] = {"machine": protocol.machine(), "eval_windows": args.eval_windows}

    natural = {str(part): by_kind(natural_sparsity(model, text, part)) for part in (0.0, 0.01)}
    protocol.update_json(args.out, {**facts, "natural": natural})
    rows = [
        [kind, *(f"{one[kind]['mean']:.1%} ({one[kind]['least']:.1%} to {one[kind]['most']:.1%})" for one in
                 natural.values())]
        for kind in KINDS
    ]  # fmt: skip
    protocol.print_table(["inputs of", "zero", "within 1 % of the largest"], rows)

    calibrated = calibrate(model, method("teal"), text)
    rows = []
    for percent in args.percents:
        found = ppl_p(model, calibrated, windows, percent, tolerance=0.02)
        protocol.update_json(args.out, {"ppl_p": {f"{percent:g} %": found.__dict__}})
        rows.append([f"PPL-{percent:g} %", f"{found.sparsity:.1%}", f"{found.perplexity:.3f}"])
    protocol.print_table(["", "sparsity", f"perplexity (dense {found.dense_perplexity:.3f})"], rows)

    top = calibrate(model, method("topk"))
    rows = []
    for where in ("", "down_proj"):
        for level in [0.0, *args.levels]:
            sites = {name: level for name in top.sites if name.endswith(where)}
            gated = top.gates(sites).attach(model) if level else nullcontext()
            row = [where or "all linear layers", f"{level:.0%}"]
            with gated:
                for share in CORRUPTED:
                    inputs = corrupted(windows, share, model.config.vocab_size)
                    one = confidence(model, windows, inputs=inputs)
                    key = f"{row[0]}, {row[1]} dropped, {share:.0%} corrupted"
                    protocol.update_json(args.out, {"top_k": {key: one.__dict__}})
                    row += [f"{one.perplexity:.2f}", f"{one.calibration_error:.4f}"]
            rows.append(row)
    head = ["top-k of", "dropped"]
    head += [text for share in CORRUPTED for text in (f"perplexity, {share:.0%} corrupted", "error")]
    protocol.print_table(head, rows)


if __name__ == "__main__":
    main()
