"""GPUSQ-ViT in miniature: a small vision transformer trained on 8,000 images of Fashion-MNIST (`modules`),
pruned to 2:4 and rounded to int8 or int4, with and without the parts of its distillation.

Accuracy on 2,000 other images. Contenders are tuned by as many steps on the same images (`--epochs` passes
of each of the two stages); `task` has the labels' loss alone, `soft` the teacher's logits beside, `mixed`
features of the blocks as well. `rounded`: pruned and rounded, not tuned.
"""

from __future__ import annotations

import copy
import statistics
from pathlib import Path
from typing import Any

import torch

import gossamer as gs
from benchmarks import protocol
from benchmarks.modules import TRAINED, images, vit
from gossamer.recipes.gpusq import Mixed
from gossamer.tune import ModuleTuning

LOSSES = {"task": Mixed(1, 0, 0), "soft": Mixed(1, 10, 0), "mixed": Mixed(1, 10, 5)}
SKIP = "projection|classifier"


def main() -> None:
    parser = protocol.parser("gpusq", __doc__)
    protocol.add_data_arguments(parser, "folder of texts and images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--values", nargs="+", default=["int8", "int4"])
    parser.add_argument("--work", type=Path, default=Path("modules.work"))
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "gpusq.json")
    args = parser.parse_args()
    args.data = protocol.data_folder(args.data)
    protocol.set_threads(args.threads)
    found: dict[str, dict[str, float]] = protocol.read_json(args.out).get("accuracy", {})
    x, y = images(args)
    batches = list(zip(x[:TRAINED].split(64), y[:TRAINED].split(64), strict=True))
    for seed in range(args.seeds):
        subject = vit(args, seed)
        blocks = [name for name, one in subject.model.named_modules() if type(one).__name__ == "ViTLayer"]

        def put(name: str, model: torch.nn.Module, seed: int = seed, measure: Any = subject.measure) -> None:
            found.setdefault(name, {})[str(seed)] = round(measure(model), 4)
            print(f"seed {seed}, {name}: {found[name][str(seed)]:.4f}", flush=True)
            protocol.update_json(
                args.out, {"accuracy": found, "epochs": args.epochs, "machine": protocol.machine()}
            )

        put("dense", subject.model)
        for values in args.values:
            model = copy.deepcopy(subject.model)
            masks = gs.sparsify(model, method="magnitude", pattern="2:4", skip=SKIP).masks
            put("2:4", model)
            ModuleTuning(model, masks, values=values).merge()
            put(f"2:4 {values}, rounded", model)
            for name, loss in LOSSES.items():
                if str(seed) in found.get(f"2:4 {values}, {name}", {}):
                    continue
                model = copy.deepcopy(subject.model)
                gs.gpusq(
                    model,
                    batches,
                    features=blocks,
                    values=values,
                    epochs=args.epochs,
                    loss=loss,
                    skip=SKIP,
                    seed=seed,
                )
                put(f"2:4 {values}, {name}", model)
    rows = [
        [
            name,
            f"{statistics.mean(each.values()):.4f}",
            f"{min(each.values()):.4f} to {max(each.values()):.4f}",
        ]
        for name, each in found.items()
    ]
    protocol.print_table(["contender", "accuracy", "seeds"], rows)


if __name__ == "__main__":
    main()
