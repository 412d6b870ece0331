"""Grids for kept weights: where a mask has pruned what is near zero, do levels without a zero pay?

Layers of a few blocks are pruned and rounded by the OBS sweep on statistics of the dense model, once with
each grid, at equal bits: integers (int3, int4), and tables of levels in their place. `a`: sign and 2 or 3
bits, |w| = (k + a) s. Printed beside the layers' output error: perplexity and KL of the model with these
blocks replaced (weights in bfloat16, no rounding of activations), on a text that was not calibrated on.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import protocol
from gossamer.matrices.values import NL3, NL4


def offset(bits: int, twice_a: int) -> tuple[int, ...]:
    """Levels ±(k + a), times two where a is no integer."""
    step = 1 if twice_a % 2 == 0 else 2
    first = twice_a // 2 if step == 1 else twice_a
    half = [first + step * k for k in range(2 ** (bits - 1))]
    return tuple(-x for x in reversed(half)) + tuple(half)


INT3, INT4 = tuple(range(-4, 4)), tuple(range(-8, 8))
SPARSE = {
    "int3": INT3,
    "3 bits, a = 0.5": offset(3, 1),
    "3 bits, a = 1": offset(3, 2),
    "3 bits, a = 1.5": offset(3, 3),
    "3 bits, a = 2": offset(3, 4),
    "gap, steps growing": (-30, -19, -12, -6, 5, 11, 17, 23),
    "nl3": NL3,
    "int4": INT4,
    "4 bits, a = 1": offset(4, 2),
    "4 bits, a = 2": offset(4, 4),
    "nl4": NL4,
}
DENSE = {"int3": INT3, "3 bits, a = 0.5": offset(3, 1), "nl3": NL3, "int4": INT4, "nl4": NL4}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.grids", description=__doc__)
    protocol.add_model_arguments(parser)
    parser.add_argument("--blocks", default="1,10,20", metavar="I,J", help="blocks that are compressed")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 1,024")
    parser.add_argument("--eval-windows", type=int, default=4, help="0: layer errors alone")
    parser.add_argument("--kinds", default="sparse,dense", help="32:64 masks, none, or both")
    parser.add_argument("--grids", default="all", metavar="A;B", help="all, or some by name")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "grids.json", metavar="FILE")
    return parser.parse_args()


def layers_of(args: argparse.Namespace, blocks: list[int]) -> list[Any]:
    """Weights of the blocks and the Gram matrices of their inputs in the dense model."""
    from gossamer.calibrate import Gram, WorkFolder, walk
    from gossamer.models.skeleton import WeightFiles, skeleton
    from gossamer.prune.method import Layer

    windows = protocol.calibration_windows(protocol.load_tokenizer(args.model), args.data, args.windows)
    files, model = WeightFiles(Path(args.model)), skeleton(Path(args.model))
    folder, found = Path(tempfile.mkdtemp()), []
    try:
        for visit in walk(model, files, (Gram,), WorkFolder(folder / "work", {}), windows=windows):
            if visit.index in blocks:
                found += [Layer(name, visit.weight(name), visit.statistics[name]) for name in visit.layers]
            if visit.index == max(blocks):
                break
    finally:
        shutil.rmtree(folder)
    return found


def compress(layer: Any, levels: tuple[int, ...], sparse: bool) -> Any:
    """The layer swept with this grid."""
    from gossamer.matrices.values import ValueType
    from gossamer.prune.obs import OBS
    from gossamer.sparse import NM

    bits = round(math.log2(len(levels)))
    plain = levels == tuple(range(-len(levels) // 2, len(levels) // 2))
    grid = ValueType(f"{bits} bits", bits, True, () if plain else levels)
    return OBS().prune(layer, NM(32, 64), 0.5 if sparse else 0.0, grid, 64)


def main() -> None:
    args = parse()
    protocol.set_threads(args.threads)
    from gossamer.calibrate import Gram
    from gossamer.evaluate import evaluate, reconstruction_error

    layers = layers_of(args, [int(block) for block in args.blocks.split(",")])
    windows, dense, model = None, None, None
    if args.eval_windows:
        windows = protocol.measured_windows(protocol.load_tokenizer(args.model), args.data, args.eval_windows)
        dense, model = (protocol.load_model(args.model, "bfloat16") for _ in range(2))
    rows = []
    for kind, grids in (("sparse", SPARSE), ("dense", DENSE)):
        if kind not in args.kinds.split(","):
            continue
        first: dict[int, list[float]] = {}
        for name, levels in grids.items():
            if args.grids != "all" and name not in args.grids.split(";"):
                continue
            errors = []
            for layer in layers:
                made = compress(layer, levels, kind == "sparse")
                errors.append(reconstruction_error(layer.weight, made.weight, layer[Gram].matrix))
                if model is not None:
                    with torch.no_grad():
                        model.get_parameter(f"{layer.name}.weight").copy_(made.weight)
            base = first.setdefault(len(levels), errors)
            ratio = math.exp(sum(math.log(a / b) for a, b in zip(errors, base, strict=True)) / len(errors))
            figures: dict[str, Any] = {"error": sum(errors) / len(errors), "error_ratio": round(ratio, 4)}
            figures["errors"] = {layer.name: e for layer, e in zip(layers, errors, strict=True)}
            if model is not None:
                quality = evaluate(model, windows, reference=dense)
                figures |= {"perplexity": quality.perplexity, "kl": quality.mean_kl}
                figures["dense_perplexity"] = quality.reference_perplexity
            rows.append([kind, name, *(f"{figures[k]:.5f}" if k in figures else None
                                       for k in ("error", "error_ratio", "perplexity", "kl"))])  # fmt: skip
            told = {"blocks": args.blocks, "windows": args.windows, **figures}
            protocol.update_json(args.out, {"runs": {f"{kind} {name}": told}, "machine": protocol.machine()})
            print(json.dumps({f"{kind} {name}": told}), flush=True)
    protocol.print_table(["mask", "grid", "layer error", "ratio (geometric)", "perplexity", "KL"], rows)


if __name__ == "__main__":
    main()
