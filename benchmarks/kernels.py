"""Times every layout and value type beside PyTorch's bfloat16 and float32 linear layers, in the same run.

``python -m benchmarks.kernels [--quick]``: median time of one product, GB/s of packed bytes (what a product
of one row is bound by), and the ratio to torch's bfloat16 linear. Weights are random; several copies of each
are walked in turn, so that one row's products read memory and not a cache (``--cached``: one copy).
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle

import torch
from torch import Tensor

from gossamer import kernels

LAYOUTS = ("dense", "bitmap", "32:64")
VALUES = ("float32", "bfloat16", "int8", "int4", "int3")
SHAPES = ((1536, 576), (576, 1536), (4096, 4096), (14336, 4096))


def random_sections(
    layout: str, values: str, out: int, cols: int, group: int, generator: torch.Generator
) -> dict[str, Tensor]:
    """A valid packed weight at 50 %: random values, and masks of one panel-group repeated in random order."""
    panel_groups = -(-out // 16) * -(-cols // 64)
    sizes = kernels.section_bytes(layout, values, out, cols, group)
    sections = {}
    if layout != "dense":
        kinds = torch.stack([_mask_words(generator) for _ in range(64)])
        sections["masks"] = kinds[torch.randint(64, (panel_groups,), generator=generator)].reshape(-1)
    total = sizes["values"]
    if layout == "bitmap":  # every panel-group keeps 512, so offsets are even
        per_panel = (
            -(-cols // 64)
            * {"float32": 2048, "bfloat16": 1024, "int8": 512, "int4": 256, "int3": 192}[values]
        )
        panels = -(-out // 16)
        total = -(-panels * per_panel // 64) * 64
        offsets = torch.zeros((sizes["offsets"] or 0) // 8, dtype=torch.int64)
        offsets[: panels + 1] = torch.arange(panels + 1) * per_panel
        sections["offsets"] = offsets
    assert total is not None
    count = total // {"float32": 4, "bfloat16": 2}.get(values, 1)
    if values == "float32":
        sections["values"] = torch.randn(count, generator=generator).view(torch.uint8)
    elif values == "bfloat16":
        sections["values"] = torch.randn(count, generator=generator).bfloat16().view(torch.uint8)
    else:
        sections["values"] = torch.randint(256, (count,), dtype=torch.uint8, generator=generator)
    if "scales" in sizes:
        sections["scales"] = torch.full(((sizes["scales"] or 0) // 2,), 0.01, dtype=torch.float16)
    return sections


def _mask_words(generator: torch.Generator) -> Tensor:
    """16 mask words of a panel-group in which every output keeps 32 of 64 inputs."""
    kept = torch.rand(16, 64, generator=generator).argsort(1) < 32
    bits = kept.reshape(16, 16, 4).permute(1, 0, 2).reshape(16, 64).to(torch.int64)
    return (bits << torch.arange(64)).sum(1)


def median_seconds(calls: Iterator[Callable[[], object]], budget: float) -> float:
    """Median time of one call; each round takes the next of ``calls``."""
    next(calls)()
    times: list[float] = []
    stop = time.perf_counter() + budget
    while len(times) < 5 or (time.perf_counter() < stop and len(times) < 2000):
        call = next(calls)
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def cache_bytes() -> int:
    """Size of the last-level cache, or 32 MiB where the system does not say."""
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        size = os.sysconf(name) if name in os.sysconf_names else 0
        if size > 0:
            return size
    return 32 << 20


def copies_of(size: int, past: int) -> int:
    return max(1, min(256, -(-past // size)))


def bench_shape(out: int, cols: int, rows: int, args: argparse.Namespace) -> None:
    past = 0 if args.cached or rows > 16 else (2 if args.quick else 4) * cache_bytes()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, cols, generator=generator)
    macs = out * cols * rows
    rival = 0.0
    for dtype in (torch.bfloat16, torch.float32):
        size = out * cols * dtype.itemsize
        weights = [torch.randn(out, cols).to(dtype) for _ in range(copies_of(size, past))]
        y = x.to(dtype)
        calls = cycle([partial(torch.nn.functional.linear, y, w) for w in weights])
        seconds = median_seconds(calls, args.seconds)
        rival = rival or seconds
        report(f"torch {str(dtype).removeprefix('torch.')}", out, cols, rows, size, seconds, macs, rival)
        del weights, calls
    for layout in args.layouts:
        for values in args.values:
            handles = []
            sections = random_sections(layout, values, out, cols, args.group, generator)
            size = sum(t.numel() * t.element_size() for t in sections.values())
            for _ in range(copies_of(size, past)):
                copy = {name: t.clone() for name, t in sections.items()}
                handles.append(kernels.make_handle(layout, values, out, cols, args.group, copy))
            calls = cycle([partial(kernels.matmul, h, x, args.isa) for h in handles])
            seconds = median_seconds(calls, args.seconds)
            report(f"{layout} {values}", out, cols, rows, size, seconds, macs, rival)
            del handles, calls


def report(
    name: str, out: int, cols: int, rows: int, size: int, seconds: float, macs: int, rival: float
) -> None:
    print(
        f"{name:18} {out:6} x {cols:<6} {rows:4}  {size / 2**20:8.2f} MiB {seconds * 1e6:11.1f} us "
        f"{size / seconds / 1e9:7.1f} GB/s {macs / seconds / 1e9:8.1f} GMAC/s {rival / seconds:6.2f}x",
        flush=True,
    )


def overhead(args: argparse.Namespace) -> None:
    """Time of a call whose work is next to nothing: 16 outputs of 64 inputs."""
    generator = torch.Generator().manual_seed(0)
    handle = kernels.make_handle(
        "dense", "int4", 16, 64, 64, random_sections("dense", "int4", 16, 64, 64, generator)
    )
    x = torch.randn(1, 64)
    direct = median_seconds(cycle([lambda: kernels.matmul(handle, x, args.isa)]), args.seconds)
    op = median_seconds(cycle([lambda: torch.ops.gossamer.packed_matmul(x, handle.id, 16)]), args.seconds)
    weight = torch.randn(16, 64)
    linear = median_seconds(cycle([lambda: torch.nn.functional.linear(x, weight)]), args.seconds)
    print(f"one call: {direct * 1e6:.1f} us; as an op {op * 1e6:.1f} us; torch linear {linear * 1e6:.1f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes, short timings")
    parser.add_argument(
        "--cached", action="store_true", help="one copy of each weight, which may stay in cache"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 512])
    parser.add_argument("--shapes", nargs="+", help="such as 4096x4096")
    parser.add_argument("--layouts", nargs="+", default=list(LAYOUTS))
    parser.add_argument("--values", nargs="+", default=list(VALUES))
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--isa", default=None)
    parser.add_argument("--seconds", type=float, default=None, help="per measurement")
    args = parser.parse_args()
    args.seconds = args.seconds or (0.2 if args.quick else 1.0)
    torch.set_num_threads(args.threads)
    shapes = [tuple(map(int, s.split("x"))) for s in args.shapes] if args.shapes else SHAPES
    if args.quick and not args.shapes:
        shapes = SHAPES[:1] + SHAPES[2:3]
    print(
        f"isa {args.isa or kernels.isa()}, {args.threads} threads, load {os.getloadavg()[0]:.2f}, "
        f"last-level cache {cache_bytes() / 2**20:.0f} MiB, torch {torch.__version__}; "
        "ratio: to torch bfloat16"
    )
    with torch.inference_mode():
        overhead(args)
        for rows in args.rows:
            for out, cols in shapes:
                bench_shape(out, cols, rows, args)


if __name__ == "__main__":
    main()
