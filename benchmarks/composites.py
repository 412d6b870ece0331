"""Sums and products of packed weights: one call beside leaf by leaf, and beside the plain leaf.

    python -m benchmarks.composites --threads 2

Every contender has `--own-mib` MiB of weights of its own, as many copies that are walked in turn, so that
weights are read from memory. Rounds take all contenders of a shape in turn. What is timed is one product with
`--rows` rows of bfloat16 activations through `gossamer.kernels.matmul`; leaf by leaf, PyTorch adds the terms
of sums, and results between leaves are bfloat16.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import protocol
from gossamer import kernels
from gossamer.bench.machine import OtherWork
from gossamer.matrices import BlockDiagonal, LowRank, Matrix, Packed, Product, Quantized, Sum, value_type
from gossamer.matrices.inference import compile_matrix
from gossamer.sparse import mask_from_scores, parse_pattern

Call = Callable[[Tensor], Tensor]
BLOCK = 64  # outputs and inputs of a block of a block-diagonal factor


def leaf(out: int, width: int, values: str, layout: str = "dense") -> Packed:
    """Random values; half of 64 are kept where the layout is 32:64."""
    mask = None
    if layout == "32:64":
        mask = mask_from_scores(torch.rand(out, width), parse_pattern(layout), None)
    kind = value_type(values)
    if not kind.is_integer:
        return Packed.pack(torch.randn(out, width) / width**0.5, values, layout, mask=mask)
    codes = torch.randint(kind.qmin, kind.qmax + 1, (out, width), dtype=torch.int8)
    scales = torch.full((out, -(-width // 64)), 0.3 / kind.qmax / width**0.5).half()
    return Packed.pack(Quantized(codes, scales, 64, kind), layout=layout, mask=mask)


def core(out: int, width: int) -> Packed:
    return leaf(out, width, "int4", "32:64")


def low_rank(out: int, width: int, rank: int, values: str, left: str = "dense") -> Matrix:
    return Sum(core(out, width), LowRank(leaf(out, rank, values, left), leaf(rank, width, values)))


def between_blocks(out: int, width: int, values: str) -> Matrix:
    left, right = (BlockDiagonal(leaf(n, BLOCK, values), n // BLOCK) for n in (out, width))
    return Product(left, core(out, width), right)


CONTENDERS: dict[str, Callable[[int, int], Matrix]] = {
    "32:64 int4": core,
    "dense int4": lambda out, width: leaf(out, width, "int4"),
    "+ low rank 32, bfloat16, A dense": partial(low_rank, rank=32, values="bfloat16"),
    "+ low rank 32, bfloat16": partial(low_rank, rank=32, values="bfloat16", left="16x4"),
    "+ low rank 32, int8, A dense": partial(low_rank, rank=32, values="int8"),
    "+ low rank 32, int8": partial(low_rank, rank=32, values="int8", left="16x4"),
    "+ low rank 64, bfloat16": partial(low_rank, rank=64, values="bfloat16"),
    "+ low rank 64, int8": partial(low_rank, rank=64, values="int8"),
    "blocks bfloat16 x 32:64 x blocks": partial(between_blocks, values="bfloat16"),
    "blocks int8 x 32:64 x blocks": partial(between_blocks, values="int8"),
}


def one_call(matrix: Matrix) -> Call:
    program = compile_matrix(matrix)
    assert isinstance(program, kernels.Operand)
    return partial(kernels.matmul, program)


def leaf_by_leaf(matrix: Matrix) -> Call:
    """A call of the kernels for each leaf, and PyTorch between them."""
    if isinstance(matrix, (Sum, Product)):
        first, *rest = map(leaf_by_leaf, matrix if isinstance(matrix, Sum) else reversed(list(matrix)))
        return partial(_summed if isinstance(matrix, Sum) else _chained, first, rest)
    return one_call(matrix)


def _summed(first: Call, rest: list[Call], x: Tensor) -> Tensor:
    y = first(x)
    for term in rest:
        y = y + term(x)
    return y


def _chained(first: Call, rest: list[Call], x: Tensor) -> Tensor:
    x = first(x)
    for factor in rest:
        x = factor(x)
    return x


def measure(out: int, width: int, args: argparse.Namespace) -> dict[str, Any]:
    """Microseconds of each contender of one shape, and what it stores."""
    torch.manual_seed(0)
    facts: dict[str, Any] = {}
    calls: dict[tuple[str, str], list[Call]] = {}
    for name, make in CONTENDERS.items():
        if not args.only or any(text in name for text in args.only):
            matrix = make(out, width)
            copies = [copy.deepcopy(matrix) for _ in range(-(-(args.own_mib << 20) // matrix.nbytes))]
            calls[name, "one call"] = list(map(one_call, copies))
            if isinstance(matrix, (Sum, Product)):
                calls[name, "leaf by leaf"] = list(map(leaf_by_leaf, copies))
            facts[name] = {"bits": round(matrix.bits_per_weight, 3), "bytes": matrix.nbytes}
    x = torch.randn(args.rows, width).bfloat16()
    taken: dict[tuple[str, str], list[float]] = {way: [] for way in calls}
    order, others = list(calls), OtherWork()
    with torch.inference_mode():
        for turn in range(args.rounds + 1):  # the first one warms up
            for way in order[turn % len(order) :] + order[: turn % len(order)]:
                start = time.perf_counter()
                for call in calls[way]:
                    call(x)
                taken[way].append((time.perf_counter() - start) / len(calls[way]))
    for (name, way), times in taken.items():
        low, middle, high = (1e6 * t for t in statistics.quantiles(times[1:], n=4))
        facts[name][way] = round(middle, 1)
        facts[name][f"{way} quartiles"] = [round(low, 1), round(high, 1)]
    return {"contenders": facts, "other_work": round(others.cores(), 3)}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["2048x2048", "8192x2048"], metavar="OUTxIN")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--own-mib", type=int, default=512, help="weights of each contender (default 512)")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="contenders whose names hold one of these")
    parser.add_argument("--out", type=Path, help="results (default: benchmarks/results/composites.json)")
    return parser.parse_args()


def main() -> None:
    args = parse()
    protocol.set_threads(args.threads)
    for text in args.shapes:
        out, width = map(int, text.split("x"))
        found = measure(out, width, args)
        contenders = found["contenders"]
        plain = next(iter(contenders.values()))
        print(
            f"\n{text}, {args.rows} rows, {args.threads} threads, {kernels.isa()}; "
            f"other processes kept {found['other_work']:.2f} cores busy"
        )
        rows = []
        for name, facts in contenders.items():
            apart = facts.get("leaf by leaf")
            rows.append(
                [name, facts["one call"], apart, f"{apart / facts['one call']:.2f}" if apart else None,
                 f"{facts['one call'] / plain['one call']:.2f}", f"{facts['bytes'] / plain['bytes']:.2f}",
                 facts["bits"], f"{facts['bytes'] / facts['one call'] / 1e3:.1f}"]
            )  # fmt: skip
        head = ["", "us, one call", "leaf by leaf", "gain", "to plain", "bytes to plain", "bits", "GB/s"]
        protocol.print_table(head, rows)
        protocol.update_json(
            args.out or protocol.RESULTS / "composites.json",
            {
                "runs": {f"{text}, {args.rows} rows, {args.threads} threads, {kernels.isa()}": found},
                "command": "python -m benchmarks.composites --threads 2",
                "machine": protocol.machine(),
            },
        )


if __name__ == "__main__":
    main()
