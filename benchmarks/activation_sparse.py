"""Decoding with activations of which many are zero: the layout `columns` beside our own dense layout.

One row of bfloat16 activations, their zeros at random, times weights that together are far past the
last-level cache: as many copies of one layer as fill `--own-mib` in each layout, walked in turn. Both layouts
hold the same values. A round takes one walk of each, and ratios are those of one round.

*read* is what a product reads of the weight: `columns` leaves out the weights of inputs that are zero where
fewer than its gate are not, and reads all of them otherwise. The break-even is the least measured share of
zeros from which on `columns` is the faster one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import protocol
from gossamer import kernels
from gossamer.bench.machine import PAST_CACHE, OtherWork, machine_facts
from gossamer.bench.timing import Product, activations, read_share
from gossamer.kernels.native import native
from gossamer.matrices import Packed, Quantized, value_type

SHAPES = ("2048x2048", "8192x2048", "2048x8192")  # layers of Llama-3.2-1B
ZEROS = (0.0, 0.25, 0.5, 0.55, 0.6, 0.7, 0.9, 0.95)
INPUTS = 16  # different rows of activations, taken in turn


@dataclass
class Point:
    """One share of zeros: median seconds of a product, and 1e9 bytes a second of what it reads; ``ratio``:
    how many times as fast `columns` is, the median of the rounds, and its quartiles."""

    zeros: float
    dense_seconds: float
    dense_gb_per_second: float
    columns_seconds: float
    columns_read: float
    columns_gb_per_second: float
    ratio: float
    quartiles: tuple[float, float]


def parse() -> argparse.Namespace:
    parser = protocol.parser("activation_sparse", __doc__)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="OUTxIN")
    parser.add_argument(
        "--values", nargs="+", default=["int4"], choices=["float32", "bfloat16", "int8", "int4"]
    )
    parser.add_argument("--zeros", nargs="+", type=float, default=list(ZEROS), help="shares, from 0 to 1")
    parser.add_argument("--threads", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--rows", type=int, default=1, help="of activations (default 1)")
    parser.add_argument("--own-mib", type=int, default=512, help="weights of each layout (default 512)")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--out", type=Path, help="results (default: benchmarks/results/activation_sparse.json)"
    )
    return parser.parse_args()


def weight(shape: tuple[int, int], values: str) -> Packed:
    """A random dense weight."""
    generator = torch.Generator().manual_seed(0)
    kind = value_type(values)
    if not kind.is_integer:
        return Packed.pack(torch.randn(shape, generator=generator), values, "dense")
    codes = torch.randint(kind.qmin, kind.qmax + 1, shape, dtype=torch.int8, generator=generator)
    scales = torch.full((shape[0], -(-shape[1] // 64)), 0.01, dtype=torch.float16)
    return Packed.pack(Quantized(codes, scales, 64, kind), layout="dense")


def copies(packed: Packed, own_bytes: int) -> list[Product]:
    """Products with as many copies of a weight as fill ``own_bytes``."""
    made: list[Product] = []
    for _ in range(-(-own_bytes // packed.nbytes)):
        sections = {name: section.clone() for name, section in packed.tensors().items()}
        handle = kernels.make_handle(packed.layout, packed.values_name, *packed.shape, packed.group, sections)
        made.append(partial(kernels.matmul, handle))
    return made


def walk(products: list[Product], inputs: list[Tensor]) -> float:
    """Seconds of a product, over all of them."""
    start = time.perf_counter()
    for index, product in enumerate(products):
        product(inputs[index % len(inputs)])
    return (time.perf_counter() - start) / len(products)


def measure(
    dense: Packed,
    columns: Packed,
    rivals: tuple[list[Product], list[Product]],
    zeros: float,
    args: argparse.Namespace,
) -> Point:
    """Both layouts at one share of zeros."""
    inputs = [activations(args.rows, dense.shape[1], zeros, seed) for seed in range(INPUTS)]
    if dense.value_type.is_integer:
        assert torch.equal(rivals[0][0](inputs[0]), rivals[1][0](inputs[0])), "the layouts disagree"
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(args.rounds):
        for products, taken in zip(rivals, times, strict=True):
            taken.append(walk(products, inputs))
    seconds = [statistics.median(taken) for taken in times]
    low, ratio, high = statistics.quantiles((a / b for a, b in zip(*times, strict=True)), n=4)
    read = statistics.mean(read_share(columns, x[0]) for x in inputs)
    return Point(
        zeros=zeros,
        dense_seconds=seconds[0],
        dense_gb_per_second=dense.nbytes / seconds[0] / 1e9,
        columns_seconds=seconds[1],
        columns_read=read,
        columns_gb_per_second=read * columns.nbytes / seconds[1] / 1e9,
        ratio=ratio,
        quartiles=(low, high),
    )


def break_even(points: list[Point]) -> float | None:
    """The least share of zeros from which on `columns` is the faster one, or None."""
    found = None
    for point in sorted(points, key=lambda point: -point.zeros):
        if point.ratio <= 1:
            break
        found = point.zeros
    return found


def show(points: list[Point]) -> None:
    rows = [
        [
            f"{100 * p.zeros:.0f} %",
            f"{1e6 * p.dense_seconds:.1f}",
            f"{p.dense_gb_per_second:.1f}",
            f"{1e6 * p.columns_seconds:.1f}",
            f"{100 * p.columns_read:.0f} %",
            f"{p.columns_gb_per_second:.1f}",
            f"{p.ratio:.2f}x ({p.quartiles[0]:.2f}-{p.quartiles[1]:.2f})",
        ]
        for p in points
    ]
    protocol.print_table(["zeros", "dense us", "GB/s", "columns us", "read", "GB/s", "faster"], rows)


def main() -> None:
    args = parse()
    out = args.out or protocol.RESULTS / "activation_sparse.json"
    torch.manual_seed(0)
    facts = machine_facts(bandwidth=False)
    own = args.own_mib << 20
    cache = facts.cache_bytes or 0
    past = "past" if own > PAST_CACHE * cache else "NOT past"
    print(
        f"{facts.cpu}, {facts.isa}, last-level cache {cache >> 20} MiB, {args.own_mib} MiB of weights in\n"
        f"each layout ({past} four times the cache), {args.rows} row(s); the gate: columns leaves out\n"
        f"zeros where at most {100 * native().most_active:.0f} % of the inputs are not zero"
    )
    for values in args.values:
        for text in args.shapes:
            rows, _, width = text.partition("x")
            dense = weight((int(rows), int(width)), values)
            columns = dense.repack("columns")
            rivals = copies(dense, own), copies(columns, own)
            for threads in args.threads:
                torch.set_num_threads(threads)
                others = OtherWork()
                with torch.inference_mode():
                    points = [measure(dense, columns, rivals, zeros, args) for zeros in args.zeros]
                busy, even = others.cores(), break_even(points)
                said = "never" if even is None else f"from {100 * even:.0f} % zeros on"
                print(f"\n{text} {values}, {threads} thread(s), other work {busy:.2f} cores; faster: {said}")
                show(points)
                found = {
                    "own_bytes": own,
                    "rows": args.rows,
                    "most_active": native().most_active,
                    "other_work_cores": round(busy, 3),
                    "break_even": even,
                    "points": [rounded(asdict(point)) for point in points],
                }
                name = f"{text}_{values}_{facts.isa}_t{threads}" + (
                    f"_rows{args.rows}" if args.rows > 1 else ""
                )
                command = "python -m benchmarks.activation_sparse"
                protocol.update_json(
                    out, {"runs": {name: found}, "command": command, "machine": protocol.machine()}
                )


def rounded(point: dict[str, object]) -> dict[str, object]:
    """Four digits of every figure."""
    return {
        key: [float(f"{v:.4g}") for v in value] if isinstance(value, tuple) else float(f"{value:.4g}")
        for key, value in point.items()
    }


if __name__ == "__main__":
    main()
