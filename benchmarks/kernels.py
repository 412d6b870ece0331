"""Products with packed weights beside PyTorch's, OpenVINO's and llama.cpp's: time, bits, GB/s.

Decoding (one row) in every structure, skinny products (32 rows) and prompts (512), over the linear layers of
three models, with 2 GiB of weights for each contender (`kernel_protocol`). Model by model one process runs
after the other: ours and PyTorch's together (`kernel_contenders`), then what the environments of
`--rival-python` have.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.kernel_protocol import (
    DECODE_ROWS,
    HELD_TO,
    PAST_CACHE,
    STRUCTURES,
    VALUES,
    Product,
    Task,
    add_arguments,
    last_level_cache,
    parse_line,
    task_of,
    weights_of,
)
from gossamer.kernels.native import native

RIVALS = {"openvino": "benchmarks.rival_openvino", "llama_cpp": "benchmarks.rival_llamacpp_kernels"}
PROBE = "import importlib.util as u, sys; print(*(n for n in sys.argv[1:] if u.find_spec(n)))"


@dataclass
class Findings:
    """What the processes said about one model. ``read``: bytes a second of plain reading, in quartiles;
    ``other_work``: cores that other processes kept busy while ours and PyTorch's were timed."""

    products: list[Product] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    read: tuple[float, float, float] = (0.0, 0.0, 0.0)
    load: float = 0.0
    other_work: float = 0.0


@dataclass
class Facts:
    """What they said about the machine. ``cycles``: of one core for 64 weights, by structure and values."""

    machine: dict[str, Any] = field(default_factory=dict)
    call: dict[str, float] = field(default_factory=dict)
    cycles: dict[str, float] = field(default_factory=dict)
    clock_ghz: float = 0.0


def parse() -> argparse.Namespace:
    parser = protocol.parser("kernels", __doc__)
    add_arguments(parser)
    parser.add_argument("--structures", nargs="+", default=list(STRUCTURES), choices=list(STRUCTURES))
    parser.add_argument("--values", nargs="+", default=list(VALUES), choices=VALUES)
    parser.add_argument(
        "--rival-python",
        action="append",
        default=[],
        metavar="PATH",
        help="python of an environment with openvino or llama-cpp-python (may be given several times)",
    )
    parser.add_argument(
        "--isa",
        default=os.environ.get("GOSSAMER_ISA") or None,
        help="hold ours, and rivals where they can be, to an instruction set (default: $GOSSAMER_ISA)",
    )
    parser.add_argument(
        "--huge-pages", action="store_true", help="ask for huge pages in every process (glibc.malloc.hugetlb)"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="results (default: benchmarks/results/kernels.json, but nothing for --quick and --own-mib)",
    )
    return parser.parse_args()


# ---- processes


def environment(args: argparse.Namespace) -> dict[str, str]:
    """Equal threads, instruction set and pages for every process."""
    found = {**os.environ, **protocol_threads(args.threads), "GOSSAMER_NATIVE": native().__file__}
    if args.isa:
        found |= HELD_TO.get(args.isa, {"GOSSAMER_ISA": args.isa})
    if args.huge_pages:
        found["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    return found


def protocol_threads(threads: int) -> dict[str, str]:
    return {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def rivals_in(pythons: list[str], modules: dict[str, str]) -> list[tuple[str, str]]:
    """(python, module) of each rival that the environments have, of ``modules`` by package; refuses one that
    has none."""
    found = []
    for python in pythons:
        done = subprocess.run([python, "-c", PROBE, *modules], capture_output=True, text=True, check=False)
        names = done.stdout.split()
        if not names:
            raise SystemExit(f"{python} has neither of: {', '.join(modules)} {done.stderr.strip()}")
        found += [(python, modules[name]) for name in names]
    return found


def lines_of(python: str, module: str, options: list[str], env: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """What one process prints, as it comes."""
    root = Path(__file__).parent.parent
    command = [python, "-m", module, *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root, env=env) as child:
        assert child.stdout
        for line in child.stdout:
            yield parse_line(line)
    if child.returncode:
        yield "note", f"{module} ended with {child.returncode}: its figures are not complete"


def shared_options(args: argparse.Namespace) -> list[str]:
    options = ["--threads", str(args.threads), "--rounds", str(args.rounds)]
    options += ["--rows", *map(str, args.rows)]
    if args.own_mib:
        options += ["--own-mib", str(args.own_mib)]
    return options + (["--quick"] if args.quick else [])


def measure(
    args: argparse.Namespace, task: Task, model: str, rivals: list[tuple[str, str]], facts: Facts
) -> Findings:
    """Ours and PyTorch's, then each rival, on one model."""
    options = [*shared_options(args), *(["--shapes", model] if args.shapes else ["--models", model])]
    ours = [
        "--structures",
        *args.structures,
        "--values",
        *args.values,
        *([] if facts.cycles else ["--cycles"]),
    ]
    jobs = [(sys.executable, "benchmarks.kernel_contenders", ours), *((*rival, []) for rival in rivals)]
    found = Findings(load=os.getloadavg()[0])
    env = environment(args)
    for python, module, more in jobs:
        for kind, content in lines_of(python, module, options + more, env):
            if kind == "product":
                found.products.append(content)
                progress(f"{model}, {content.rows} rows: {content.contender} {1e6 * content.seconds:.0f} us")
            elif kind == "cycles":
                facts.cycles[content["contender"]] = content["cycles_per_64"]
                facts.clock_ghz = content["clock_ghz"]
            elif kind == "read":
                found.read = tuple(content["bytes_per_second"])
                found.other_work = content["other_work"]
            elif kind == "version":
                found.versions |= content
            elif kind == "note":
                found.notes.append(content)
                progress(content)
            else:
                setattr(facts, kind, content)
    if not any(p.structure for p in found.products):
        raise SystemExit("our own products could not be measured: see above")
    return found


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- tables


def header(args: argparse.Namespace, task: Task, facts: Facts) -> None:
    machine = facts.machine
    pages = "asked for" if args.huge_pages else machine["huge_pages"]
    calls = " and ".join(f"{facts.call[name]}" for name in ("gossamer", "torch"))
    print(
        f"{machine['cpu']}, {machine['isa']} (torch {machine['torch_isa']}), {args.threads} threads, clock "
        f"{facts.clock_ghz:.2f} GHz, last-level cache {last_level_cache() >> 20} MiB, huge pages {pages}\n"
        f"each contender has {task.own_bytes >> 20} MiB of weights of its own or more (* = may be in cache)\n"
        f"ours and PyTorch's are a call from Python for each layer (an empty one takes {calls} us); "
        "OpenVINO and llama.cpp run all layers as one graph"
    )


def tables(found: Findings, task: Task, model: str, facts: Facts) -> None:
    read = found.read[1]
    weights = weights_of(task.models[model])
    print(
        f"\n{model}: a block's linear layers, {weights / 1e6:.1f} M weights; plain reading "
        f"{read / 1e9:.1f} GB/s (quartiles {found.read[0] / 1e9:.1f}-{found.read[2] / 1e9:.1f}); "
        f"load before {found.load:.2f}, other work {found.other_work:.2f} cores"
    )
    for rows in task.rows:
        here = [p for p in found.products if p.rows == rows]
        if rows <= DECODE_ROWS:
            own_table(here, facts, task)
            rival_table(here)
        else:
            prompt_table(here, weights)
    for note in found.notes:
        print(f"note: {note}")


def named(p: Product) -> str:
    """A contender's name; a star where its weights may lie in the cache."""
    return p.contender + ("" if p.own_bytes > PAST_CACHE * last_level_cache() else " *")


def of_ours(products: list[Product]) -> list[Product]:
    """In the order of the structures and values."""
    order = [(name, values) for name in STRUCTURES for values in VALUES]
    return sorted(
        (p for p in products if p.structure), key=lambda p: order.index((str(p.structure), p.values))
    )


def rate(p: Product) -> float:
    return p.block_bytes / p.seconds


def share(p: Product) -> str | None:
    return p.of_reading and f"{100 * p.of_reading:.0f} %"


def own_table(products: list[Product], facts: Facts, task: Task) -> None:
    """Every structure of ours: share of plain reading, cycles, speed beside bytes against dense bfloat16."""
    ours = of_ours(products)
    dense = next((p for p in ours if (p.structure, p.values) == ("dense", "bfloat16")), None)
    rows = []
    for p in ours:
        cycles = facts.cycles.get(p.contender)
        binds = ""
        if cycles and p.read:
            arithmetic = cycles / (facts.clock_ghz * 1e9 * task.threads)
            binds = "bytes" if p.bits * 8 / p.read > arithmetic else "arithmetic"
        rows.append(
            [
                named(p),
                f"{p.bits:.2f}",
                f"{1e6 * p.seconds:.1f}",
                f"{rate(p) / 1e9:.1f}",
                share(p),
                cycles and f"{cycles:.2f}",
                binds,
                dense and f"{dense.bits / p.bits:.2f}x",
                "1.00x" if p is dense else p.to_dense and f"{p.to_dense:.2f}x",
            ]
        )
    head = [
        "ours",
        "bits",
        "us",
        "GB/s",
        "of reading",
        "cycles/64",
        "binds",
        "fewer bytes",
        "faster than dense bf16",
    ]
    print()
    protocol.print_table(head, rows)


def rival_table(products: list[Product]) -> None:
    """Each rival beside each structure of ours with the same values. Ratio: how many times as fast ours is,
    and would be had memory been read at the same rate while the two were measured."""

    def columns(p: Product) -> list[str | None]:
        return [named(p), f"{p.bits:.2f}", f"{1e6 * p.seconds:.1f}", f"{rate(p) / 1e9:.1f}", share(p)]

    rows = []
    for rival in products:
        if rival.structure is None:
            for p in of_ours(products):
                if p.values != rival.values or not rival.read or not p.read:
                    continue
                ratio = rival.seconds / p.seconds
                equal = ratio * rival.read / p.read
                rows.append([*columns(rival), *columns(p), f"{ratio:.2f}x", f"{equal:.2f}x"])
    side = ["bits", "us", "GB/s", "of reading"]
    print()
    if rows:
        protocol.print_table(["rival", *side, "ours", *side, "ratio", "equal memory"], rows)


def prompt_table(products: list[Product], weights: int) -> None:
    """All contenders beside the fastest dense rival."""
    best = min((p for p in products if p.structure is None), key=lambda p: p.seconds, default=None)
    rows = [
        [
            named(p),
            f"{p.bits:.2f}",
            f"{1e3 * p.seconds:.2f}",
            f"{p.rows * weights / p.seconds / 1e9:.0f}",
            f"{rate(p) / 1e9:.2f}",
            best and f"{best.seconds / p.seconds:.2f}x",
        ]
        for p in sorted(products, key=lambda p: p.seconds)
    ]
    print()
    if rows:
        what = f"beside {best.contender}" if best else "beside"
        protocol.print_table([f"{products[0].rows} rows", "bits", "ms", "GMAC/s", "GB/s", what], rows)


# ---- results


def rounded(value: Any) -> Any:
    """Four digits of every float, nothing that says nothing."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items() if item not in (None, "", {})}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def save(args: argparse.Namespace, out: Path, task: Task, model: str, found: Findings, facts: Facts) -> None:
    settings = {"isa": facts.machine.get("isa"), "threads": args.threads, "load_average_before": found.load}
    name = f"{model}_{settings['isa']}_t{args.threads}" + ("_huge" if args.huge_pages else "")
    run = {
        **settings,
        "huge_pages": "asked for" if args.huge_pages else facts.machine.get("huge_pages"),
        "own_bytes": task.own_bytes,
        "other_work_cores": found.other_work,
        "last_level_cache": last_level_cache(),
        "block_weights": weights_of(task.models[model]),
        "read_bytes_per_second_quartiles": found.read,
        "clock_ghz": facts.clock_ghz,
        "cycles_per_64_weights": facts.cycles,
        "call_microseconds": facts.call,
        "versions": found.versions,
        "notes": found.notes,
        "products": [asdict(p) for p in found.products],
    }
    protocol.update_json(
        out,
        {
            "runs": {name: rounded(run)},
            "command": "python -m benchmarks.kernels --rival-python PATH --rival-python PATH --threads N",
            "machine": protocol.machine(),
        },
    )


def main() -> None:
    args = parse()
    task = task_of(args)
    out = args.out or (None if args.quick or args.own_mib else protocol.RESULTS / "kernels.json")
    rivals = rivals_in(args.rival_python, RIVALS)
    if args.isa and args.isa not in HELD_TO:
        progress(f"rivals cannot be held to {args.isa}: they run as fast as they can")
    facts = Facts()
    for model in task.models:
        found = measure(args, task, model, rivals, facts)
        if model == next(iter(task.models)):
            header(args, task, facts)
        tables(found, task, model, facts)
        if out:
            save(args, out, task, model, found, facts)


if __name__ == "__main__":
    main()
