"""Block-sparse attention of a prompt beside dense attention: torch's, flex_attention and our own kernel.

Random queries, keys and values in bfloat16 with the heads of SmolLM2-135M (9 on 3, of 64 numbers); blocks of
64 x 64 are skipped at random, each block of queries keeping its own and the first. All contenders in one
process in turn, medians of rounds; ratios are medians of the rounds' ratios to the fastest dense rival.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks import protocol
from gossamer.dynamic.attention.policy import causal
from gossamer.kernels import block_attention, block_count, isa

SKIPPED = (0.5, 0.75, 0.9, 0.95)
BUDGET = 20.0  # seconds of a contender's rounds


def skipping(share: float, heads: int, positions: int) -> Tensor:
    """Blocks of which ``share`` of the causal ones are left out, the own and the first not among them."""
    shape = (heads, *block_count(positions, positions))
    there = causal(torch.ones(shape, dtype=torch.bool), positions, positions)
    always = causal(torch.zeros(shape, dtype=torch.bool), positions, positions)
    always[:, :, 0] = True
    left = (1 - share) * int(there.sum()) - int(always.sum())
    chance = left / (int(there.sum()) - int(always.sum()))
    return (there & (torch.rand(shape) < chance)) | always


def contenders(q: Tensor, k: Tensor, v: Tensor, flex: bool) -> dict[str, Callable[[], object]]:
    """Rivals by name, ours last."""
    scaling = q.shape[2] ** -0.5
    attend = functional.scaled_dot_product_attention
    group = len(q) // len(k)
    of_torch = [
        one[None].contiguous() for one in (q, k.repeat_interleave(group, 0), v.repeat_interleave(group, 0))
    ]
    wide = [one.float() for one in of_torch]
    found: dict[str, Callable[[], object]] = {
        "torch bfloat16": lambda: attend(*of_torch, is_causal=True),
        "torch float32": lambda: attend(*wide, is_causal=True),
    }
    if flex:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        positions = q.shape[1]
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, positions, positions, device="cpu")
        compiled = torch.compile(flex_attention)
        found["flex bfloat16"] = lambda: compiled(*of_torch, block_mask=mask)
    found["ours, dense"] = lambda: block_attention(q, k, v, scaling=scaling)
    for share in SKIPPED:
        blocks = skipping(share, len(q), q.shape[1])
        found[f"ours, {share:.0%} skipped"] = lambda blocks=blocks: block_attention(  # type: ignore[misc]
            q, k, v, scaling=scaling, blocks=blocks
        )
    return found


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(
    positions: int, heads: int, kv_heads: int, dim: int, rounds: int, flex: bool
) -> dict[str, list[float]]:
    torch.manual_seed(positions)
    shapes = (heads, positions, dim), (kv_heads, positions, dim), (kv_heads, positions, dim)
    q, k, v = (torch.randn(shape).bfloat16() for shape in shapes)
    calls = contenders(q, k, v, flex)
    first = {name: seconds(call) for name, call in calls.items()}
    rounds = max(2, min(rounds, int(BUDGET / max(first.values()))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic blocks", description=__doc__)
    parser.add_argument("--positions", type=int, nargs="+", default=[2048, 8192, 32768])
    parser.add_argument(
        "--heads", type=int, nargs=3, default=[9, 3, 64], metavar=("HEADS", "KV_HEADS", "DIM")
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-flex", action="store_true", help="leave out flex_attention, which is compiled")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_blocks.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    heads, kv_heads, dim = args.heads
    results: dict[str, Any] = {"machine": protocol.machine(), "threads": args.threads, "isa": isa()}
    results |= {"heads": args.heads, "seconds": {}}
    rows = []
    with torch.inference_mode():
        for positions in args.positions:
            found = measure(positions, heads, kv_heads, dim, args.rounds, not args.no_flex)
            results["seconds"][str(positions)] = found
            rivals = [name for name in found if not name.startswith("ours, ") or name == "ours, dense"]
            best = min(rivals, key=lambda name: statistics.median(found[name]))
            for name, times in found.items():
                ratio = statistics.median(b / t for b, t in zip(found[best], times, strict=True))
                rows.append(
                    [f"{positions:,}", name, f"{1e3 * statistics.median(times):,.1f}", f"{ratio:.2f}x"]
                )
    print(f"{results['machine']}, {isa()}, {args.threads} threads, heads {heads} on {kv_heads} of {dim}")
    protocol.print_table(["positions", "", "ms", "beside the fastest dense"], rows)
    args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
