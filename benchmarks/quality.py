"""Quality won back, at equal bytes and at equal quality: our checkpoints beside llama.cpp's and OpenVINO's.

Parts, each resumable: `make` builds our checkpoints (one-shot; tuned block by block; then distilled),
`judge` measures loss, KL and agreement of all contenders through the engines that serve them, `tasks` asks
zero-shot questions of ours, `speed` times decoding after 512 tokens in interleaved rounds, `table` writes the
docs page.
Everything is compared with the dense model in bfloat16 on two texts; no tuning saw either. Weights of
SmolLM2 lie on a 4-bit grid of llama.cpp's (Q4_1): formats near it are flattered; `--name small --model DIR`
measures a model of float weights instead (`examples/train_small.py`). With `--tuned-first` the dense model is
tuned on its task first, and ours and the rivals' are made of that one; they are still held against the model
as it was.
"""

from __future__ import annotations

import argparse
import gzip
import math
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import protocol, quality_cells, quality_tables
from benchmarks.compress import told_by_gossamer
from benchmarks.decode import Found, WorkOfOthers, play
from benchmarks.decode_processes import GoneError, Server, make, python_of
from benchmarks.decode_protocol import Contender
from benchmarks.importance import importance
from benchmarks.kernel_protocol import PAST_CACHE, Reader, last_level_cache
from benchmarks.kernels import environment, progress
from benchmarks.llamacpp_files import CALIBRATED
from benchmarks.quality_cells import CELLS, LEVELS, PLAIN, RIVALS, Cell, job_of, record_of, rival_bytes
from gossamer.bench.machine import cpu_name, machine_facts, use_threads

PARTS = ("make", "judge", "tasks", "speed", "table")
NOVEL = "text/persuasion.txt.gz"
DEPTH, READ = 512, 256 << 20


def parse() -> argparse.Namespace:
    parser = protocol.parser("quality", __doc__)
    parser.add_argument("parts", nargs="+", choices=PARTS)
    protocol.add_model_arguments(parser, required=False)
    parser.set_defaults(threads=2)
    parser.add_argument("--name", default="SmolLM2-135M", help="of the model in results and folders")
    parser.add_argument("--work", type=Path, default=Path("quality.work"), help="where files are kept")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS), metavar="CELL")
    parser.add_argument("--levels", nargs="+", default=list(LEVELS), choices=LEVELS)
    parser.add_argument("--rivals", default="", metavar="REGEX", help="only rivals whose name holds it")
    parser.add_argument("--rival-python", action="append", default=[], metavar="PATH")
    parser.add_argument("--calibration", type=int, default=32, help="windows of 1,024 (default 32)")
    parser.add_argument("--epochs", type=int, default=4, help="of blockwise tuning (default 4)")
    parser.add_argument("--tokens", type=int, default=200_000, help="of distillation (default 200,000)")
    parser.add_argument("--tuned-first", action="store_true", help="make all of the dense model tuned")
    parser.add_argument("--dense-rate", type=float, default=2e-5, help="of that tuning (default 2e-5)")
    parser.add_argument("--tune", default="--loss kl", help="further options of `gossamer tune`")
    parser.add_argument("--eval-windows", type=int, default=protocol.EVAL_WINDOWS)
    parser.add_argument("--novel-windows", type=int, default=8)
    parser.add_argument("--items", type=int, default=200, help="of each task (default 200)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--again", action="store_true", help="measure what the results hold already")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "quality.json")
    parser.add_argument("--page", type=Path, default=protocol.RESULTS.parents[1] / "docs/quality.md")
    parser.set_defaults(huge_pages=False, isa=None, make=False)
    return parser.parse_args()


def save(args: argparse.Namespace, name: str, found: dict[str, Any]) -> None:
    """Merges one contender's figures into the results."""
    models = protocol.read_json(args.out).get("models", {})
    model = models.setdefault(args.name, {})
    model[name] = {**model.get(name, {}), **found}
    protocol.update_json(args.out, {"models": models, "machine": protocol.machine()})


def known(args: argparse.Namespace, name: str) -> dict[str, Any]:
    return dict(protocol.read_json(args.out).get("models", {}).get(args.name, {}).get(name, {}))


def cells(args: argparse.Namespace) -> Iterator[Cell]:
    for name in args.cells:
        for level in args.levels:
            yield Cell(name, level)


def ready(args: argparse.Namespace) -> list[Contender]:
    """Ours that are made, and the rivals that there are pythons for; their files are made here."""
    ours = [cell.contender for cell in cells(args)]
    found = [c for c in ours if (job_of(args, c).file("gossamer-") / "gossamer.json").exists()]
    pythons, env = python_of(args), environment(args)
    for c in RIVALS if args.model == args.reference else (PLAIN, *RIVALS):
        if c.engine in pythons and re.search(args.rivals, c.name):
            if c.variant.endswith(CALIBRATED):
                importance(args)
            try:
                make(args, pythons[c.engine], job_of(args, c), env)
                found.append(c)
            except GoneError as why:
                progress(str(why))
    return found


# ---- parts


def build(args: argparse.Namespace) -> None:
    for cell in cells(args):
        progress(f"making {cell.contender.name}")
        made = quality_cells.make(args, cell)
        folder = job_of(args, cell.contender).file("gossamer-")
        save(args, cell.contender.name, record_of(folder) | ({"made": made} if made else {}))


def references(args: argparse.Namespace) -> dict[str, list[Path]]:
    """Windows of both texts with the dense model's log-probabilities, by text, on disk."""
    tokenizer = protocol.load_tokenizer(str(args.model))
    novel = gzip.decompress((Path(args.data) / NOVEL).read_bytes()).decode("utf-8", "replace")
    ids = tokenizer(novel, add_special_tokens=False, verbose=False).input_ids
    count, length = args.novel_windows, protocol.EVAL_SEQLEN
    texts = {
        "wikitext": protocol.measured_windows(tokenizer, args.data, args.eval_windows),
        "novel": torch.tensor(ids[: count * length]).reshape(count, length),
    }
    model: Any = None
    found: dict[str, list[Path]] = {}
    losses: dict[str, list[float]] = {}
    for text, windows in texts.items():
        for i, window in enumerate(windows):
            folder = (args.work / args.name / "windows" / f"{text}-{i:02d}").absolute()
            found.setdefault(text, []).append(folder)
            if not (folder / "ids.npy").exists():
                model = model or protocol.load_model(str(args.reference), "bfloat16")
                folder.mkdir(parents=True, exist_ok=True)
                logp = _dense(model, window)
                np.save(folder / "logp.npy", logp)
                np.save(folder / "ids.npy", window.numpy())
            ids_, logp = np.load(folder / "ids.npy"), np.load(folder / "logp.npy", mmap_mode="r")
            loss = -float(logp[np.arange(len(logp)), ids_[1:]].mean(dtype=np.float64))
            losses.setdefault(text, []).append(loss)
    plain = {text: {"loss": values} for text, values in losses.items()}
    weights = sum(path.stat().st_size for path in args.reference.glob("*.safetensors"))
    told: dict[str, Any] = {"judged": plain, "weight_bytes": weights, "bits_all_in": 16.0}
    if args.model != args.reference:
        told["tuned_first"] = {"tokens": args.tokens, "rate": args.dense_rate}
    training = protocol.read_json(args.reference / "training.json")
    if training:
        told["training"] = {**training, "log": training["log"][-1:]}
    save(args, "dense bfloat16", told)
    return found


@torch.inference_mode()
def _dense(model: Any, window: Tensor) -> np.ndarray:
    logits = model(window[None], use_cache=False).logits[0, :-1].float()
    return np.asarray(logits.log_softmax(-1).numpy())


def judge(args: argparse.Namespace) -> None:
    windows = references(args)
    env, pythons = environment(args), python_of(args)
    for c in ready(args):
        found = known(args, c.name).get("judged", {})
        wanted = {t: w for t, w in windows.items() if len(found.get(t, {}).get("loss", ())) != len(w)}
        if not wanted and not args.again:
            continue
        folder = job_of(args, c).file("gossamer-")
        save(args, c.name, record_of(folder) if c.ours else {"weight_bytes": rival_bytes(args, c)})
        try:
            server = Server(pythons[c.engine], job_of(args, c), env, c.name)
        except GoneError as why:
            progress(str(why))
            continue
        try:
            judged: dict[str, Any] = {}
            for text, folders in windows.items():
                each = [server.judge(folder) for folder in folders]
                judged[text] = {name: [round(one[name], 6) for one in each] for name in each[0]}
                mean = {name: statistics.mean(values) for name, values in judged[text].items()}
                progress(f"{c.name}, {text}: perplexity {math.exp(mean['loss']):.2f}, KL {mean['kl']:.4f}")
            save(args, c.name, {"judged": judged})
        except GoneError as why:
            progress(str(why))
        finally:
            server.close()


def tasks(args: argparse.Namespace) -> None:
    """Zero-shot questions through `gossamer eval --tasks`."""
    asked: dict[str, Path] = {"dense bfloat16": args.model}
    for cell in cells(args):
        folder = job_of(args, cell.contender).file("gossamer-")
        if (folder / "gossamer.json").exists():
            asked[cell.contender.name] = folder
    for name, folder in asked.items():
        if "tasks" in known(args, name) and not args.again:
            continue
        words = ["eval", str(folder), "--items", str(args.items)]
        words += ["--tasks", "arc_easy,piqa,openbook_qa,winogrande,boolq"]
        told = told_by_gossamer(args.threads, *words, GOSSAMER_DATA=str(args.data))
        found = {task: compact(score) for task, score in told["tasks"].items()}
        save(args, name, {"tasks": found})
        shown = ", ".join(f"{task} {score['accuracy']:.1%}" for task, score in found.items())
        progress(f"{name}: {shown}")


def compact(score: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a task's answers: ``correct`` as a string of 0 and 1, an item each."""
    kept = ("items", "of", "accuracy", "accuracy_interval", "accuracy_norm", "file_sha256")
    right = "".join(str(int(one)) for one in score["correct"])
    return {**{key: score[key] for key in kept if key in score}, "correct": right}


def speed(args: argparse.Namespace) -> None:
    """Every layout once (tuned weights take the time of others), rivals in the same rounds."""
    players: dict[Contender, Server] = {}
    found, env, pythons = Found(), environment(args), python_of(args)
    run = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime())
    seen: set[str] = set()
    reader = Reader(max(8 * READ, PAST_CACHE * last_level_cache()), args.threads)
    try:
        for c in ready(args):
            cell = c.variant.rpartition(", ")[0] if c.ours else c.name
            if cell in seen:
                continue
            try:
                players[c] = Server(pythons[c.engine], job_of(args, c), env, c.name)
                seen.add(cell)
            except GoneError as why:
                progress(str(why))
        others = WorkOfOthers(players)
        series = play(args, players, DEPTH, False, reader, found)
        busy = others.cores()
    finally:
        for server in players.values():
            server.close()
    with use_threads(args.threads):
        isa = machine_facts().to_dict()["isa"]
    for c in players:
        if c.name not in series:
            continue
        rate = [round(1 / seconds, 2) for seconds in series[c.name].step]
        timed = {
            "run": run,
            "decode": rate,
            "depth": DEPTH,
            "threads": args.threads,
            "isa": isa,
            "cpu": cpu_name(),
            "other_work": busy,
        }
        save(args, c.name, {"speed": timed})


def main() -> None:
    args = parse()
    if parts := [part for part in args.parts if part != "table"]:
        args.model = args.reference = protocol.model_folder(args.model)
        args.data = protocol.data_folder(args.data)
        protocol.set_threads(args.threads)
        if args.tuned_first:
            args.model = quality_cells.tuned_dense(args)
            args.name = f"{args.name}, tuned first"
        (args.work / args.name).mkdir(parents=True, exist_ok=True)
    for part in parts:
        {"make": build, "judge": judge, "tasks": tasks, "speed": speed}[part](args)
    if "table" in args.parts:
        quality_tables.write(args.out, args.page)


if __name__ == "__main__":
    main()
