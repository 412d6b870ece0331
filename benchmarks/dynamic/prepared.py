"""WINA's preparation: perplexity and KL of TEAL and WINA on the model as it is and on the rotated one.

transformers with gates as hooks, float32 weights, every linear layer in the blocks gated at one share of its
inputs, thresholds settled on the calibration text. *products*: multiplications of weights of the blocks that
are left beside the dense model's, the rotations, which no gate skips, counted. Nothing is timed. The papers
keep the largest of each token (``--selection top_k``).
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path

from benchmarks import protocol
from gossamer.dynamic.activations import calibrate, linear_sites, method, orthogonal_columns, settle
from gossamer.evaluate import compare

HEAD = ["", "dropped", "products", "perplexity", "KL"]


def parse() -> argparse.Namespace:
    parser = protocol.parser("dynamic prepared", __doc__)
    protocol.add_model_arguments(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--levels", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.65])
    parser.add_argument("--selection", default="threshold", choices=("threshold", "top_k"))
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of 1,024 (default 4)")
    parser.add_argument("--eval-windows", type=int, default=4, help="of 2,048 (default 4; figures: 20)")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_prepared.json")
    return parser.parse_args()


def main() -> None:
    args = parse()
    protocol.set_threads(args.threads)
    tokenizer, model = protocol.load_tokenizer(args.model), protocol.load_model(args.model)
    text = protocol.calibration_windows(tokenizer, args.data, args.windows)
    windows = protocol.measured_windows(tokenizer, args.data, args.eval_windows)
    dense, rotated = copy.deepcopy(model), orthogonal_columns(model)
    weights = sum(site.module.weight.numel() for site in linear_sites(model).values())
    rotations = 2 * model.config.num_hidden_layers * model.config.hidden_size**2 / weights
    contenders = {
        "TEAL": (model, method("teal", selection=args.selection), 0.0),
        "WINA": (model, method("wina", selection=args.selection), 0.0),
        "TEAL, rotated": (rotated, method("teal", selection=args.selection), rotations),
        "WINA, rotated": (rotated, method("wina", selection=args.selection, prepared=True), rotations),
    }
    rows = []
    for name, (one, how, extra) in contenders.items():
        calibrated = calibrate(one, how, text)
        sizes = {site.name: site.module.weight.numel() for site in calibrated.sites.values()}
        for level in args.levels:
            with settle(one, calibrated.gates(level), text).attach(one) as attached:
                found = compare({"gated": one}, windows, reference=dense)["gated"]
                dropped = sum(share * sizes[name] for name, share in attached.achieved().items()) / weights
            cell = {"dropped": round(dropped, 4), "products": round(1 - dropped + extra, 4)}
            cell |= {"perplexity": round(found.perplexity, 3), "kl": round(found.mean_kl or 0.0, 5)}
            cell["intervals"] = {key: interval.to_dict() for key, interval in found.intervals().items()}
            key = f"{name}, {args.selection} {100 * level:.0f} %"
            protocol.update_json(args.out, {"machine": protocol.machine(), "runs": {key: cell}})
            rows.append([key, *(cell[column] for column in ("dropped", "products", "perplexity", "kl"))])
            print(json.dumps({key: cell}), flush=True)
    protocol.print_table(HEAD, rows)


if __name__ == "__main__":
    main()
