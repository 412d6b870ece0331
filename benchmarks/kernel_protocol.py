"""What the kernel benchmark multiplies, and how the processes that measure it report.

Needs nothing but Python, so that rivals' own environments can use it. Every one of them is a process,
`python -m benchmarks.NAME` with the options below, that prints one JSON object a line: a `product` for each
measurement, and `version`, `note`, `machine`, `read`, `call` or `cycles` where it has such.

What is timed is a *block*: the linear layers of one decoder block, one after the other, each with an input of
`rows` rows. A contender holds as many different blocks as it takes to fill `own_bytes` with its own weights,
and walks them in turn, so that a layer is read again only after all others were: from memory, not from a
cache.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
import mmap
import os
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

Layer = tuple[int, int]  # outputs, inputs


@dataclass(frozen=True)
class Structure:
    """A packed layout, and which random weights of it are kept."""

    layout: str
    pattern: str | None = None
    sparsity: float = 0.0


STRUCTURES = {
    "dense": Structure("dense"),
    "bitmap": Structure("bitmap", "32:64", 0.5),
    "bitmap 70%": Structure("bitmap", "19:64", 45 / 64),
    "32:64": Structure("32:64", "32:64", 0.5),
    "16x4": Structure("16x4", "16x4", 0.5),
    "32x32 80%": Structure("16x4", "32x32", 0.8),
}
VALUES = ("float32", "bfloat16", "int8", "int4", "int3")
MANY_ROWS = ("bfloat16", "int4")
"""Values that are measured on more than one row; the others on decoding alone."""
GROUP = 64  # inputs that share a scale, ours and rivals'


def decoder(hidden: int, inner: int, keys: int) -> tuple[Layer, ...]:
    """The linear layers of one Llama block: queries, keys, values, output, gate, up, down."""
    attention = ((hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden))
    return (*attention, (inner, hidden), (inner, hidden), (hidden, inner))


MODELS: dict[str, tuple[Layer, ...]] = {
    "SmolLM2-135M": decoder(576, 1536, 192),
    "Llama-3.2-1B": decoder(2048, 8192, 512),
    "Llama-3-8B": decoder(4096, 14336, 1024),
}

OWN_BYTES = 2 << 30
PAST_CACHE = 4  # so many times the last-level cache is read from memory
SLICES = 8  # of what is walked, or read: a round takes one
DECODE_ROWS = 16  # up to here a product is bound by reading the weights

# How each instruction set of ours is asked of the rivals: PyTorch's own kernels, oneDNN (PyTorch's and
# OpenVINO's), MKL, FBGEMM and OpenVINO read these when they start.
HELD_TO = {
    "avx2": {
        "GOSSAMER_ISA": "avx2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "FBGEMM_ENABLE_INSTRUCTIONS": "AVX2",
        "OV_CPU_MAX_ISA": "AVX2",
    }
}


@dataclass
class Product:
    """Blocks multiplied by one contender.

    ``values``: the format that it is held against ours by; ``structure``: of ours, None for rivals; ``bits``
    a weight and ``block_bytes`` count everything that is stored; ``own_bytes``: of all blocks walked in turn;
    ``seconds``: of one block, the median of ``rounds``, and ``quartiles`` around it. Medians of ratios within
    a round: ``to_dense``, how many times as fast as our own dense bfloat16; ``of_reading``, its bytes a
    second to those of plain reading. ``read``: plain reading in its rounds, bytes a second. ``layers``:
    median seconds by shape, where they can be told apart.
    """

    contender: str
    values: str
    model: str
    rows: int
    bits: float
    block_bytes: int
    own_bytes: int
    seconds: float
    quartiles: tuple[float, float]
    rounds: int
    structure: str | None = None
    setting: str = ""
    to_dense: float | None = None
    of_reading: float | None = None
    read: float | None = None
    layers: dict[str, float] = field(default_factory=dict)


def weights_of(layers: tuple[Layer, ...]) -> int:
    return sum(out * cols for out, cols in layers)


def product(
    times: list[float], rates: list[float], block: tuple[Layer, ...], block_bytes: int, **facts: Any
) -> Product:
    """A `Product` from the seconds a block of each round, and from plain reading in the same rounds."""
    low, middle, high = statistics.quantiles(times, n=4) if len(times) > 1 else times * 3
    return Product(
        bits=round(8 * block_bytes / weights_of(block), 4),
        block_bytes=block_bytes,
        seconds=middle,
        quartiles=(low, high),
        rounds=len(times),
        of_reading=statistics.median(block_bytes / t / r for t, r in zip(times, rates, strict=True)),
        read=statistics.median(rates),
        **facts,
    )


class Reader:
    """Plain reading of memory, which products are held against, a slice a round.

    A machine's memory may be twice as fast in one minute as in the next, so every process reads beside what
    it measures: by our native module, which needs no other part of ours; $GOSSAMER_NATIVE says where it is.
    """

    def __init__(self, size: int, threads: int) -> None:
        self.sum_words = _native_module().sum_words
        self.memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for page in range(0, size, mmap.PAGESIZE):
            self.memory[page] = 1
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.words, self.threads = size // SLICES // 8, threads
        self.slices = itertools.cycle(range(SLICES))
        self.rates: list[float] = []

    def step(self, record: bool = True) -> float:
        """Bytes a second of one slice."""
        address = self.address + 8 * self.words * next(self.slices)
        start = time.perf_counter()
        self.sum_words(address, self.words, self.threads)
        rate = 8 * self.words / (time.perf_counter() - start)
        if record:
            self.rates.append(rate)
        return rate


def _native_module() -> Any:
    name = "gossamer.kernels._native"
    if name not in sys.modules:  # in a rival's process
        spec = spec_from_file_location(name, os.environ["GOSSAMER_NATIVE"])
        assert spec is not None
        assert spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    return sys.modules[name]


def emit(kind: str, content: Any) -> None:
    """One line for the runner."""
    print(json.dumps({kind: asdict(content) if isinstance(content, Product) else content}), flush=True)


def parse_line(line: str) -> tuple[str, Any]:
    """The inverse of `emit`; other output of a library is a note."""
    try:
        ((kind, content),) = json.loads(line).items()
    except (ValueError, AttributeError):
        return "note", line.rstrip()
    return kind, Product(**content) if kind == "product" else content


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the runner and every contender take; the runner hands them on."""
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS), metavar="NAME")
    parser.add_argument(
        "--shapes", nargs="+", default=[], metavar="OUTxIN", help="these layers alone instead"
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 32, 512], help="default 1 32 512")
    parser.add_argument("--threads", type=int, default=2, help="of every contender (default 2)")
    parser.add_argument("--own-mib", type=int, help="own bytes of each contender, MiB")
    parser.add_argument("--rounds", type=int, default=24, help="of decoding (default 24; five of prompts)")
    parser.add_argument(
        "--quick", action="store_true", help="two models, less memory, bfloat16 and int4 alone"
    )


@dataclass
class Task:
    """The arguments, read."""

    models: dict[str, tuple[Layer, ...]]
    rows: list[int]
    threads: int
    own_bytes: int
    decode_rounds: int
    quick: bool

    def reader(self) -> Reader:
        return Reader(max(self.own_bytes, PAST_CACHE * last_level_cache()), self.threads)

    def rounds(self, rows: int) -> int:
        return self.decode_rounds if rows <= DECODE_ROWS else min(5, self.decode_rounds)

    def values(self, wanted: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(v for v in wanted if not self.quick or v in ("bfloat16", "int4"))


def task_of(args: argparse.Namespace) -> Task:
    models = {name: MODELS[name] for name in args.models}
    if args.quick and len(models) == len(MODELS):
        models = {name: MODELS[name] for name in ("SmolLM2-135M", "Llama-3.2-1B")}
    if args.shapes:
        models = {text: (_shape(text),) for text in args.shapes}
    own = args.own_mib << 20 if args.own_mib else PAST_CACHE * last_level_cache() + 1
    if not args.own_mib and not args.quick:
        own = max(own, OWN_BYTES)
    return Task(models, args.rows, args.threads, own, args.rounds, args.quick)


def _shape(text: str) -> Layer:
    out, _, cols = text.partition("x")
    if not (out.isdigit() and cols.isdigit() and int(out) % 16 == int(cols) % 64 == 0):
        raise SystemExit(f"a shape is OUTxIN, multiples of 16 and 64 such as 4096x4096, not {text!r}")
    return int(out), int(cols)


def last_level_cache() -> int:
    """Bytes of this machine's last-level cache, or 32 MiB where the system does not say."""
    for name in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        size = os.sysconf(name) if name in os.sysconf_names else 0
        if size > 0:
            return size
    return 32 << 20


def blocks_for(own_bytes: int, block_bytes: int) -> int:
    return max(2, -(-own_bytes // block_bytes))


def distinct(layers: tuple[Layer, ...]) -> Iterator[int]:
    """The numbers of inputs that the layers take, each once."""
    yield from sorted({cols for _, cols in layers})
