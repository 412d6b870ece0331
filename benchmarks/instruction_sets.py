"""What each instruction set of this processor gives: whole models in our decoder, side by side.

    python -m benchmarks.instruction_sets --model DIR CHECKPOINT CHECKPOINT --threads 2

A round runs each instruction set that the processor has once, in a process of its own (`GOSSAMER_ISA`), on
all checkpoints, and the dense model, `--model`, by PyTorch in bfloat16 and in float32, of which the faster
counts. Ratios are medians of those of each round. Results: `results/instruction_sets.json`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.compress import GOSSAMER, limited
from gossamer import kernels

FIRST = "avx2"  # what the others are held against


def measure(
    models: list[str], isa: str | None, args: Any, dtype: str = "auto"
) -> dict[str, dict[str, float]]:
    """Tokens a second of a prompt and of decoding, by model."""
    command = [sys.executable, "-c", GOSSAMER, "bench", *models, "--json", "--repeats", "1", "--dtype", dtype]
    command += ["--prompt", str(args.prompt), "--decode", str(args.decode), "--threads", str(args.threads)]
    env = limited(args.threads) | ({} if isa is None else {"GOSSAMER_ISA": isa})
    done = subprocess.run(command, stdout=subprocess.PIPE, env=env, check=True)
    found = json.loads(done.stdout)
    args.other_work.append(found["other_work"] or 0.0)
    return {
        name: {phase: one[f"{phase}_tokens_per_second"] for phase in ("prompt", "decode")}
        for name, one in found["contenders"].items()
    }


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
    parser.set_defaults(other_work=[])  # cores that others kept busy, of every process
    args = parser.parse_args()
    sets = [isa for isa in kernels.available() if isa != "portable"]
    seen: dict[tuple[str, str], dict[str, list[float]]] = {}

    def note(isa: str, found: dict[str, dict[str, float]]) -> None:
        for name, speeds in found.items():
            for phase, speed in speeds.items():
                seen.setdefault((name, isa), {}).setdefault(phase, []).append(speed)

    for turn in range(args.rounds):
        for isa in (*sets[turn % len(sets) :], *sets[: turn % len(sets)]):
            note(isa, measure(args.checkpoints, isa, args))
        for dtype in ("bfloat16", "float32"):
            note(
                f"PyTorch {dtype}",
                {"dense": next(iter(measure([args.model], None, args, dtype).values()))},
            )
        print(f"round {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
    runs: dict[str, Any] = {}
    rows = []
    dense = {
        phase: max(
            (seen["dense", f"PyTorch {d}"][phase] for d in ("bfloat16", "float32")), key=statistics.median
        )
        for phase in ("prompt", "decode")
    }
    for (name, isa), speeds in seen.items():
        told: dict[str, Any] = {p: round(statistics.median(all_runs), 1) for p, all_runs in speeds.items()}
        for phase, runs_of in speeds.items():
            told[f"{phase}_to_dense"] = ratio(runs_of, dense[phase])
            if name != "dense" and (name, FIRST) in seen:
                told[f"{phase}_to_{FIRST}"] = ratio(runs_of, seen[name, FIRST][phase])
        runs.setdefault(name, {})[isa] = told | {"runs": speeds}
        rows.append([name, isa, *(told.get(key) for key in KEYS)])
    content = {"threads": args.threads, "prompt": args.prompt, "decode": args.decode, "models": runs}
    content |= {"most_other_work": round(max(args.other_work), 2), "machine": protocol.machine()}
    protocol.update_json(args.out, {f"{'+'.join(sets)}, {args.threads} threads": content})
    protocol.print_table(["model", "by", *KEYS], rows)


KEYS = (
    "prompt",
    f"prompt_to_{FIRST}",
    "prompt_to_dense",
    "decode",
    f"decode_to_{FIRST}",
    "decode_to_dense",
)

if __name__ == "__main__":
    main()
