"""Whole models in our native decoder beside llama.cpp, OpenVINO GenAI and transformers: prompts and decoding.

SmolLM2-135M (`--model`), models of the shapes of Llama-3.2-1B and Llama-3-8B with random weights, and the
time from a process's start to its first token. Every contender is a process that lives through all rounds
(`decode_protocol`); a round is one prompt and the tokens after it by each in turn, the order shifted by one
from round to round, plain reading of memory before each. Figures are medians of rounds; ratios are medians of
the rounds' ratios. Files that contenders load are made first, under `--work`.
"""

from __future__ import annotations

import argparse
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks import decode_start, protocol
from benchmarks.decode_processes import GoneError, Server, job_of, make, python_of
from benchmarks.decode_protocol import SUBJECTS, Contender, Ready, Series
from benchmarks.decode_tables import print_run, write_tables
from benchmarks.kernel_protocol import PAST_CACHE, Reader, last_level_cache
from benchmarks.kernels import HELD_TO, environment, progress, rounded
from gossamer.bench.machine import OtherWork, machine_facts, use_threads

START = "start"
READ = 256 << 20  # bytes of a slice of plain reading
READS = 3  # slices before each turn; the best counts, the first wakes threads


def parse() -> argparse.Namespace:
    parser = protocol.parser("decode", __doc__)
    parser.add_argument("--model", metavar="DIR", help="Hugging Face folder of SmolLM2-135M")
    parser.add_argument(
        "--work", type=Path, default=Path("decode.work"), metavar="DIR", help="where files are kept"
    )
    parser.add_argument(
        "--only", nargs="+", default=[*SUBJECTS, START], choices=[*SUBJECTS, START], metavar="ROW",
        help=f"of: {', '.join([*SUBJECTS, START])}",
    )  # fmt: skip
    parser.add_argument("--prompts", type=int, nargs="+", metavar="N", help="of the row's prompts only these")
    parser.add_argument(
        "--contenders", default="", metavar="REGEX", help="only those whose name holds it ('dense|Q4')"
    )
    parser.add_argument(
        "--rival-python",
        action="append",
        default=[],
        metavar="PATH",
        help="python of an environment with llama-cpp-python or openvino-genai (may be given several times)",
    )
    parser.add_argument("--threads", type=int, default=2, help="of every contender (default 2)")
    parser.add_argument("--rounds", type=int, default=7, help="of the first prompt (default 7; others 3)")
    parser.add_argument("--steps", type=int, default=64, help="tokens after each prompt (default 64)")
    parser.add_argument("--quick", action="store_true", help="two rounds (others one) of 16 tokens, no file")
    parser.add_argument(
        "--isa",
        default=os.environ.get("GOSSAMER_ISA") or None,
        help="hold ours, and rivals where they can be, to an instruction set (default: $GOSSAMER_ISA)",
    )
    parser.add_argument(
        "--huge-pages", action="store_true", help="for every process, and our weights read into them"
    )
    parser.add_argument("--make", action="store_true", help="make the files and end")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="results (default: benchmarks/results/decode.json)"
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE",
        help="measure nothing: write the results' tables between the marks in a Markdown file",
    )  # fmt: skip
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.steps = min(args.rounds, 2), min(args.steps, 16)
    if args.out is None and not args.quick:
        args.out = protocol.RESULTS / "decode.json"
    return args


# ---- rounds


@dataclass
class Found:
    """What came of one subject: series by prompt and contender, and what each said when it was loaded."""

    series: dict[int, dict[str, Series]] = field(default_factory=dict)
    ready: dict[str, Ready] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    other_work: dict[int, float] = field(default_factory=dict)

    def note(self, text: str) -> None:
        self.notes.append(text)
        progress(text)


def measure(args: argparse.Namespace, name: str, pythons: dict[str, str], reader: Reader | None) -> Found:
    """All contenders on one subject."""
    subject, env, found = SUBJECTS[name], environment(args), Found()
    (args.work / name).mkdir(parents=True, exist_ok=True)
    servers: dict[Contender, Server] = {}
    for engine in {c.engine: None for c in subject.contenders}:
        if engine not in pythons:
            found.note(f"{engine}: skipped, no --rival-python has it")
    wanted = [
        c for c in subject.contenders if c.engine in pythons and re.search(args.contenders or "", c.name)
    ]
    prompts = [n for n in subject.prompts if n in (args.prompts or subject.prompts)]
    if prompts and prompts[0] != subject.prompts[0]:
        wanted = [c for c in wanted if c.long]
    try:
        for c in wanted:
            job, python = job_of(args, name, subject, c), pythons[c.engine]
            try:
                make(args, python, job, env)
                if not args.make:
                    servers[c] = Server(python, job, env, c.name)
                    found.ready[c.name] = servers[c].ready
                    progress(f"{name}: {c.name} loaded in {servers[c].ready.seconds:.1f} s")
            except GoneError as why:
                found.note(str(why))
        for prompt in prompts if servers and reader else ():
            players = {c: s for c, s in servers.items() if prompt == subject.prompts[0] or c.long}
            others = WorkOfOthers(players)
            found.series[prompt] = play(args, players, prompt, prompt != subject.prompts[0], reader, found)
            found.other_work[prompt] = others.cores()
    finally:
        for server in servers.values():
            server.close()
    return found


class WorkOfOthers:
    """Counts what other processes than this one and the ``players`` compute from when it is made on."""

    def __init__(self, players: dict[Contender, Server]) -> None:
        self.players, self.start, self.own = players, time.perf_counter(), cpu_seconds(players)
        self.others = OtherWork()

    def cores(self) -> float:
        """How many cores' worth of time that was on average, up to now."""
        own = (cpu_seconds(self.players) - self.own) / (time.perf_counter() - self.start)
        return round(max(0.0, self.others.cores() - own), 3)


def cpu_seconds(players: dict[Contender, Server]) -> float:
    """Of processor time that the contenders that still live have taken."""
    times = [
        psutil.Process(server.process.pid).cpu_times()
        for server in players.values()
        if server.process.poll() is None
    ]
    return sum(t.user + t.system for t in times)


def play(
    args: argparse.Namespace,
    players: dict[Contender, Server],
    prompt: int,
    long: bool,
    reader: Reader,
    found: Found,
) -> dict[str, Series]:
    """Rounds of one prompt; who ends early is taken out."""
    rounds = max(1, min(3, args.rounds // 2)) if long else args.rounds
    series = {c.name: Series() for c in players}
    names = list(players)
    for turn in range(-1, rounds):  # the first is not counted, and short where prompts are long
        shift = max(turn, 0) % len(names)
        for c in names[shift:] + names[:shift]:
            if c.name not in series:
                continue
            read = max(reader.step(record=False) for _ in range(READS))
            try:
                run = players[c].run(64 if turn < 0 and long else prompt, args.steps, turn)
            except GoneError as why:
                found.note(str(why))
                del series[c.name]
                continue
            if turn >= 0:
                series[c.name].add(run, read)
                text = f"{prompt / run.prompt_seconds:.0f} and {1 / run.step:.1f} tokens/s"
                progress(f"{prompt} tokens, round {turn + 1}: {c.name} {text}")
    return series


def start(args: argparse.Namespace, pythons: dict[str, str]) -> dict[str, Any]:
    """The time to the first token of a process that has loaded nothing, ours and llama.cpp's."""
    name = "SmolLM2-135M"
    env, programs = environment(args), {}
    for engine, variant in (("gossamer", "dense int4/int8"), ("llama_cpp", "Q4_0")):
        if engine not in pythons:
            progress(f"{engine}: skipped, no --rival-python has it")
            continue
        c = Contender(engine, variant, "")
        job = job_of(args, name, SUBJECTS[name], c)
        Path(job.folder).mkdir(parents=True, exist_ok=True)
        try:
            make(args, pythons[engine], job, env)
        except GoneError as why:
            progress(str(why))
            continue
        file = job.file("gossamer-") if engine == "gossamer" else job.file("", ".gguf")
        programs[c.name] = (pythons[engine], engine, file)
    return decode_start.measure(programs, args.threads, env, 2 if args.quick else decode_start.ROUNDS)


# ---- results


def save(args: argparse.Namespace, name: str, found: Found, facts: dict[str, Any]) -> None:
    """One run for each prompt, so that long ones can be taken on their own."""
    runs = {}
    for prompt, series in found.series.items():
        key = f"{name}_{prompt}_{facts['isa']}_t{args.threads}" + ("_huge" if args.huge_pages else "")
        runs[key] = {
            "model": name,
            "prompt": prompt,
            "steps": args.steps,
            "threads": args.threads,
            "huge_pages": args.huge_pages,
            "machine": facts,
            "other_work_cores": found.other_work[prompt],
            "notes": found.notes,
            "contenders": {
                who: asdict(found.ready[who]) | asdict(one) for who, one in series.items() if one.step
            },
        }
    for key, run in runs.items():
        print_run(run)
        runs[key] = rounded(run)
    write(args, runs)


def write(args: argparse.Namespace, runs: dict[str, Any]) -> None:
    if args.out is None:
        return
    command = "python -m benchmarks.decode --model DIR --rival-python PATH --rival-python PATH"
    protocol.update_json(args.out, {"runs": runs, "command": command, "machine": protocol.machine()})


def main() -> None:
    args = parse()
    if args.table:
        write_tables(args.out or protocol.RESULTS / "decode.json", args.table)
        return
    pythons = python_of(args)
    if args.isa and args.isa not in HELD_TO:
        progress(f"rivals cannot be held to {args.isa}: they run as fast as they can")
    with use_threads(args.threads):
        facts = machine_facts().to_dict()
    reader = None if args.make else Reader(max(8 * READ, PAST_CACHE * last_level_cache()), args.threads)
    for name in args.only:
        if name == START and not args.make:
            run = start(args, pythons)
            print_run(run | {"machine": facts})
            write(args, {f"start_{facts['isa']}_t{args.threads}": rounded(run | {"machine": facts})})
        if name != START:
            save(args, name, measure(args, name, pythons, reader), facts)


if __name__ == "__main__":
    main()
