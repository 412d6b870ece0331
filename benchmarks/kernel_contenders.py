"""Times our packed weights and PyTorch's linear layers in one process, in interleaved rounds.

As many contenders as fit into memory are held at a time, our own dense bfloat16 and a plain reader of memory
always among them: each round takes one slice of every contender's walk, so that a slow minute of the machine
falls on all, and ratios are those of one round. See `kernel_protocol` for what a walk is.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
import torch
from torch import Tensor

from benchmarks.kernel_layers import (
    Call,
    Made,
    Packed,
    torch_int4,
    torch_int8,
    torch_plain,
    torch_prepacked,
    torch_qlinear,
)
from benchmarks.kernel_protocol import (
    DECODE_ROWS,
    MANY_ROWS,
    SLICES,
    STRUCTURES,
    VALUES,
    Layer,
    Product,
    Reader,
    Task,
    add_arguments,
    distinct,
    emit,
    product,
    task_of,
)
from gossamer.bench.machine import OtherWork, machine_facts
from gossamer.kernels.native import native

Inputs = dict[tuple[int, int, torch.dtype], Tensor]  # by rows, columns and dtype

BASELINE = ("dense", "bfloat16")  # always there: what the others' speed is held against
SLICE_MACS = 2e9  # of a prompt's slice at least
ROOM = 0.7  # of the free memory that contenders may take


# ---- contenders and their walks


@dataclass(frozen=True)
class Contender:
    """``make``: one layer's call and bytes; ``dtype``: of its inputs; ``rows``: at which it is measured."""

    name: str
    values: str
    make: Callable[[Layer], Made]
    rows: tuple[int, ...]
    dtype: torch.dtype = torch.bfloat16
    structure: str | None = None
    setting: str = ""


def contenders(task: Task, structures: list[str], values: tuple[str, ...]) -> list[Contender]:
    """All of them, our own dense bfloat16 first, then those that are measured at most row counts."""
    decode = tuple(rows for rows in task.rows if rows <= DECODE_ROWS)
    prompt = tuple(rows for rows in task.rows if rows > DECODE_ROWS)
    found = []
    for name, value in dict.fromkeys([BASELINE, *itertools.product(structures, values)]):
        rows = decode + prompt if value in MANY_ROWS else decode
        make = Packed(STRUCTURES[name], value)
        found.append(Contender(f"{name} {value}", value, make, rows, structure=name))
    for name in ("bfloat16", "float32"):
        if name not in values:
            continue
        dtype = getattr(torch, name)
        found.append(Contender(f"torch {name}", name, partial(torch_plain, dtype), (*decode, *prompt), dtype))
        for rows in (*decode, *prompt):
            make = partial(torch_prepacked, dtype, rows)
            found.append(Contender(f"torch {name} prepacked", name, make, (rows,), dtype))
    if "int8" in values:
        found.append(Contender("torch int8", "int8", torch_int8, decode, setting="_weight_int8pack_mm"))
        for engine in ("onednn", "fbgemm"):
            make, setting = partial(torch_qlinear, engine), f"linear_dynamic, {engine}"
            name = f"torch int8 dynamic {engine}"
            found.append(Contender(name, "int8", make, decode, torch.float32, setting=setting))
    if "int4" in values:
        found.append(
            Contender("torch int4", "int4", torch_int4, decode, setting="_weight_int4pack_mm_for_cpu")
        )
    found = [c for c in found if c.rows]
    return sorted(found, key=lambda c: ((c.structure, c.values) != BASELINE, -max(c.rows), -len(c.rows)))


class Walk:
    """All blocks of one contender, and where it stands in them."""

    def __init__(self, contender: Contender, layers: tuple[Layer, ...], own_bytes: int) -> None:
        self.contender, self.layers = contender, layers
        self.blocks: list[list[Call]] = []
        self.own_bytes = 0
        while self.own_bytes < own_bytes or len(self.blocks) < 2:
            calls = []
            for layer in layers:
                call, size = contender.make(layer)
                calls.append(call)
                self.own_bytes += size
            self.blocks.append(calls)
        self.block_bytes = self.own_bytes // len(self.blocks)
        self.endless = itertools.cycle(self.blocks)
        self.times: dict[int, list[float]] = defaultdict(list)
        self.ratios: dict[int, list[float]] = defaultdict(list)
        self.read: dict[int, list[float]] = defaultdict(list)
        self.by_layer: dict[int, list[list[float]]] = {}

    def step(self, rows: int, inputs: Inputs, record: bool = True) -> float:
        """Seconds a block, over one slice."""
        clock = time.perf_counter
        xs = [inputs[rows, cols, self.contender.dtype] for _, cols in self.layers]
        by_layer = self.by_layer.setdefault(rows, [[] for _ in self.layers])
        seconds = 0.0
        count = self.slice_of(rows)
        for calls in itertools.islice(self.endless, count):
            start = clock()
            for i, (call, x) in enumerate(zip(calls, xs, strict=True)):
                call(x)
                end = clock()
                seconds += end - start
                if record:
                    by_layer[i].append(end - start)
                start = end
        if record:
            self.times[rows].append(seconds / count)
        return seconds / count

    def slice_of(self, rows: int) -> int:
        """Blocks of one slice."""
        most = -(-len(self.blocks) // SLICES)
        if rows <= DECODE_ROWS:
            return most
        macs = rows * sum(out * cols for out, cols in self.layers)
        return max(1, min(most, round(SLICE_MACS / macs)))

    def product(self, model: str, rows: int) -> Product:
        shapes: dict[str, list[float]] = defaultdict(list)
        for (out, cols), times in zip(self.layers, self.by_layer[rows], strict=True):
            shapes[f"{out}x{cols}"] += times
        ratios = self.ratios[rows]
        c = self.contender
        return product(
            self.times[rows],
            self.read[rows],
            self.layers,
            self.block_bytes,
            contender=c.name,
            values=c.values,
            model=model,
            rows=rows,
            own_bytes=self.own_bytes,
            structure=c.structure,
            setting=c.setting,
            to_dense=statistics.median(ratios) if ratios else None,
            layers={shape: statistics.median(times) for shape, times in shapes.items()},
        )


def batches(waiting: list[Contender], own_bytes: int) -> Iterator[list[Contender]]:
    """As many at a time as memory has room for beside what it holds already."""
    room = max(1, int(ROOM * psutil.virtual_memory().available / own_bytes))
    for start in range(0, len(waiting), room):
        yield waiting[start : start + room]


def measure(model: str, task: Task, found: list[Contender]) -> None:
    """All contenders on one model, the first of them in every batch."""
    layers = task.models[model]
    inputs = {
        (rows, cols, dtype): torch.randn(rows, cols).to(dtype)
        for rows in task.rows
        for cols in distinct(layers)
        for dtype in (torch.bfloat16, torch.float32)
    }
    others = OtherWork()
    reader = task.reader()
    baseline = Walk(found[0], layers, task.own_bytes)
    # whole blocks of dense float32 are the most that a contender takes
    most = max(task.own_bytes, 2 * 4 * sum(out * cols for out, cols in layers))
    for batch in batches(found[1:], most) if found[1:] else [[]]:
        measure_batch(baseline, batch, reader, model, task, inputs)
        gc.collect()
    report(baseline, model)
    emit(
        "read",
        {
            "model": model,
            "bytes_per_second": statistics.quantiles(reader.rates, n=4),
            "other_work": round(others.cores(), 3),
        },
    )


def measure_batch(
    baseline: Walk, batch: list[Contender], reader: Reader, model: str, task: Task, inputs: Inputs
) -> None:
    """Every round is one slice of each walk; the baseline's is what the others' ratios are to."""
    walks = [walk for c in batch if (walk := started(c, baseline.layers, task, inputs))]
    for rows in task.rows:
        players = [walk for walk in walks if rows in walk.contender.rows]
        if batch and not players:
            continue
        reader.step(record=False)
        baseline.step(rows, inputs, record=False)
        for _ in range(task.rounds(rows)):
            read = reader.step()
            dense = baseline.step(rows, inputs)
            baseline.read[rows].append(read)
            for walk in players:
                walk.ratios[rows].append(dense / walk.step(rows, inputs))
                walk.read[rows].append(read)
    for walk in walks:
        report(walk, model)


def started(contender: Contender, layers: tuple[Layer, ...], task: Task, inputs: Inputs) -> Walk | None:
    """A contender's walk, warm; None with a note where it cannot run here."""
    try:
        walk = Walk(contender, layers, task.own_bytes)
        for rows in contender.rows:
            walk.step(rows, inputs, record=False)
    except RuntimeError as error:
        emit("note", f"{contender.name} does not run here: {str(error).splitlines()[0]}")
        return None
    return walk


def report(walk: Walk, model: str) -> None:
    for rows in walk.times:
        emit("product", walk.product(model, rows))


# ---- cycles and calls


def cycles(task: Task, structures: list[str], values: tuple[str, ...]) -> None:
    """Cycles of one core for 64 weights of each layout, weights in its second-level cache.

    The difference between a larger and a smaller weight of equal inputs, so that the call and the preparation
    of the input fall out; each pair between two measurements of the clock.
    """
    room = int(os.sysconf("SC_LEVEL2_CACHE_SIZE")) if "SC_LEVEL2_CACHE_SIZE" in os.sysconf_names else 0
    room = room or 1 << 20
    cols = 1024
    x = torch.randn(1, cols).bfloat16()
    torch.set_num_threads(1)
    for name, value in itertools.product(structures, values):
        make = Packed(STRUCTURES[name], value)
        panel_bytes = make((32, cols))[1] / 2
        panels = [max(1, int(room * part / panel_bytes)) for part in (1 / 8, 1 / 2)]
        (small, _), (large, _) = (make((16 * count, cols)) for count in panels)
        clock = [native().cycles_per_second()]
        times: list[list[float]] = [[], []]
        for _ in range(200):
            for call, found in zip((small, large), times, strict=True):
                start = time.perf_counter()
                call(x)
                found.append(time.perf_counter() - start)
        clock.append(native().cycles_per_second())
        seconds = statistics.median(times[1]) - statistics.median(times[0])
        steps = 16 * cols * (panels[1] - panels[0]) / 64
        emit(
            "cycles",
            {
                "contender": f"{name} {value}",
                "cycles_per_64": round(seconds * statistics.mean(clock) / steps, 3),
                "clock_ghz": round(statistics.mean(clock) / 1e9, 3),
            },
        )
    torch.set_num_threads(task.threads)


def call_overhead() -> dict[str, float]:
    """Microseconds of a call whose work is next to nothing: 16 outputs of 64 inputs."""
    packed, _ = Packed(STRUCTURES["dense"], "int4")((16, 64))
    plain, _ = torch_plain(torch.bfloat16, (16, 64))
    x = torch.randn(1, 64).bfloat16()
    found = {}
    for name, call in {"gossamer": packed, "torch": plain}.items():
        times = []
        for _ in range(2000):
            start = time.perf_counter()
            call(x)
            times.append(time.perf_counter() - start)
        found[name] = round(1e6 * statistics.median(times), 2)
    return found


def huge_pages() -> str:
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(encoding="ascii")
    except OSError:
        return "unknown"
    return text[text.index("[") + 1 : text.index("]")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_contenders", description=__doc__)
    add_arguments(parser)
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument("--values", nargs="+", default=list(VALUES), choices=VALUES)
    parser.add_argument("--cycles", action="store_true", help="time the arithmetic alone, in cache, first")
    args = parser.parse_args()
    task = task_of(args)
    values = task.values(tuple(args.values))
    warnings.filterwarnings("ignore", message=".*deprecated", category=UserWarning)  # of quantized tensors
    torch.manual_seed(0)
    torch.set_num_threads(task.threads)
    facts = machine_facts(bandwidth=False).to_dict()
    emit(
        "machine", {**facts, "torch_isa": torch.backends.cpu.get_cpu_capability(), "huge_pages": huge_pages()}
    )
    with torch.inference_mode():
        emit("call", call_overhead())
        if args.cycles:
            cycles(task, args.structures, values)
        found = contenders(task, args.structures, values)
        for model in task.models:
            measure(model, task, found)


if __name__ == "__main__":
    main()
