"""What each instruction set of this processor gives: whole models in our decoder, side by side.

    python -m benchmarks.instruction_sets --model DIR CHECKPOINT CHECKPOINT --threads 2

A round runs each instruction set that the processor has once, in a process of its own (`GOSSAMER_ISA`), on
all checkpoints, and the dense model, `--model`, by PyTorch in bfloat16 and in float32, of which the faster
counts. Ratios are medians of those of each round. Results: `results/instruction_sets.json`.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.compress import told_by_gossamer
from gossamer import kernels

DENSE = ("bfloat16", "float32")
FIRST = "avx2"  # what the others are held against
KEYS = tuple(f"{phase}{to}" for phase in ("prompt", "decode") for to in ("", f"_to_{FIRST}", "_to_dense"))
Speeds = dict[str, dict[str, list[float]]]  # by model, then phase: tokens a second of every round


def measure(args: Any, models: list[str], isa: str = "", dtype: str = "auto") -> tuple[Speeds, float]:
    """Tokens a second of one round of ``models`` by the kernels of ``isa``, and the cores that others kept
    busy."""
    words = ["--prompt", str(args.prompt), "--decode", str(args.decode), "--threads", str(args.threads)]
    words += ["--repeats", "1", "--dtype", dtype]
    env = {"GOSSAMER_ISA": isa} if isa else {}
    found = told_by_gossamer(args.threads, "bench", *models, *words, **env)
    speeds = {
        name: {phase: [one[f"{phase}_tokens_per_second"]] for phase in ("prompt", "decode")}
        for name, one in found["contenders"].items()
    }
    return speeds, found["other_work"] or 0.0


def ratio(of: list[float], to: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(of, to, strict=True)), 2)


def main() -> None:
    parser = protocol.parser("instruction_sets", __doc__)
    protocol.add_model_arguments(parser)
    parser.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--decode", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "instruction_sets.json")
    args = parser.parse_args()
    sets = [isa for isa in kernels.available() if isa != "portable"]
    contenders = {isa: partial(measure, args, args.checkpoints, isa) for isa in sets}
    dense = {f"PyTorch {dtype}": partial(measure, args, [args.model], dtype=dtype) for dtype in DENSE}
    seen: dict[str, Speeds] = {}  # by contender
    busy = 0.0
    for turn in range(args.rounds):
        for name in (*sets[turn % len(sets) :], *sets[: turn % len(sets)], *dense):
            speeds, other = {**contenders, **dense}[name]()
            busy = max(busy, other)
            for model, phases in speeds.items():
                for phase, runs in phases.items():
                    own = seen.setdefault(name, {}).setdefault(model if name in sets else "dense", {})
                    own.setdefault(phase, []).extend(runs)
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
    best = {p: max((seen[n]["dense"][p] for n in dense), key=statistics.median) for p in ("prompt", "decode")}
    told: dict[str, dict[str, Any]] = {}  # by model, then contender
    rows = []
    for name, models in seen.items():
        for model, phases in models.items():
            figures: dict[str, Any] = {"runs": phases}
            for phase, runs in phases.items():
                figures[phase] = round(statistics.median(runs), 1)
                figures[f"{phase}_to_dense"] = ratio(runs, best[phase])
                if name in sets:
                    figures[f"{phase}_to_{FIRST}"] = ratio(runs, seen[FIRST][model][phase])
            told.setdefault(model, {})[name] = figures
            rows.append([model, name, *map(figures.get, KEYS)])
    content = {"threads": args.threads, "prompt": args.prompt, "decode": args.decode, "models": told}
    content |= {"most_other_work": round(busy, 2), "machine": protocol.machine()}
    protocol.update_json(args.out, {f"{'+'.join(sets)}, {args.threads} threads": content})
    protocol.print_table(["model", "by", *KEYS], rows)


if __name__ == "__main__":
    main()
