"""What the quality benchmark compares: our checkpoints by how they are made, and rivals' files."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import protocol
from benchmarks.compress import GOSSAMER, limited
from benchmarks.decode_protocol import Contender, Job
from benchmarks.llamacpp_files import CALIBRATED

LEVELS = ("one-shot", "blockwise", "distilled", "longer")
TIMES = {"one-shot": (1, 0), "blockwise": (1, 1), "longer": (4, 2)}
"""Of levels without distillation: times the windows, and times the epochs of tuning block by block."""
CELLS = {
    "int8": "--sparsity 0 --values int8",
    "int4": "--sparsity 0 --values int4",
    "int4 by 32": "--sparsity 0 --values int4 --group 32",
    "int3": "--sparsity 0 --values int3",
    "nl4": "--sparsity 0 --values nl4",
    "nl4 by 32": "--sparsity 0 --values nl4 --group 32",
    "nl4 all": "--sparsity 0 --values nl4 --head-values nl4",
    "nl4 all by 32": "--sparsity 0 --values nl4 --head-values nl4 --group 32",
    "nl3 with head nl4": "--sparsity 0 --values nl3 --head-values nl4",
    "nl3": "--sparsity 0 --values nl3",
    "nl4 or nl3 in 65 MB": "--values nl4,nl3 --head-values nl4 --allocation sensitivity --budget 65MB",
    "int8 or nl4 in 80 MB": "--values int8,nl4 --head-values nl4 --allocation sensitivity --budget 80MB",
    "nl3 all": "--sparsity 0 --values nl3 --head-values nl3",
    "32:64 bf16": "--pattern 32:64 --values bf16",
    "32:64 int4": "--pattern 32:64 --values int4",
    "32:64 int3": "--pattern 32:64 --values int3",
    "32:64 int3 with head nl4": "--pattern 32:64 --values int3 --head-values nl4",
    "2:4 int4": "--pattern 2:4 --values int4",
    "70 % int4": "--sparsity 0.7 --values int4",
    "70 % int4 with head nl4": "--sparsity 0.7 --values int4 --head-values nl4",
    "3/4 of blocks int4": "--sparsity 0 --values int4",
}
"""Options of `gossamer compress` by name (*all*: embedding and head, too); of the last one a quarter of the
blocks is removed first."""
SHRUNK = {"3/4 of blocks int4": "--blocks 0.25"}
RIVALS = (
    *(
        Contender("llama_cpp", variant, "")
        for variant in ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q4_0+q4_0", "Q3_K_M", "Q2_K", "Q2_0")
    ),
    *(
        Contender("llama_cpp", f"{variant}{CALIBRATED}", "")
        for variant in ("Q5_K_M", "Q4_K_M", "Q4_0", "IQ4_NL", "Q3_K_M", "Q2_K")
    ),
    *(Contender("openvino", variant, "") for variant in ("int8", "int4", "int4 all")),
)
PLAIN = Contender("transformers", "bfloat16", "")
"""The tuned dense model itself, where contenders are made of one."""


@dataclass(frozen=True)
class Cell:
    """One of ours: what of ``CELLS``, won back how far (``LEVELS``)."""

    name: str
    level: str

    @property
    def contender(self) -> Contender:
        return Contender("gossamer", f"{self.name}, {self.level}", "")


def job_of(args: argparse.Namespace, c: Contender) -> Job:
    """What a contender's process loads."""
    folder = (args.work / args.name).absolute()
    context = protocol.EVAL_SEQLEN
    return Job(c.engine, c.variant, c.setting, str(args.model), str(folder), args.threads, context)


def make(args: argparse.Namespace, cell: Cell) -> dict[str, Any] | None:
    """Makes a cell's checkpoint, unless it is there already (None); what it took."""
    out = job_of(args, cell.contender).file("gossamer-")
    if (out / "gossamer.json").exists():
        return None
    text = Path(args.data) / protocol.CALIBRATION_TEXT
    if cell.level == "distilled":
        source = job_of(args, Cell(cell.name, "blockwise").contender).file("gossamer-")
        command = ["tune", str(source), "--teacher", str(args.model), "--text", str(text)]
        command += ["--tokens", str(args.tokens), *args.tune.split()]
    else:
        source = shrunk(args, cell) if cell.name in SHRUNK else Path(args.model)
        command = ["compress", str(source), *CELLS[cell.name].split(), "--calibration", str(text)]
        windows, epochs = TIMES[cell.level]
        command += ["--seqlen", str(protocol.CALIBRATION_SEQLEN)]
        command += ["--windows", str(windows * args.calibration)]
        if epochs:
            command += ["--tune", "blockwise", "--tune-option", f"epochs={epochs * args.epochs}"]
    return _run(args, [*command, "--out", str(out), "--json"])


def shrunk(args: argparse.Namespace, cell: Cell) -> Path:
    """The dense model with fewer blocks that a cell is made of."""
    out = (args.work / args.name / f"shrunk{SHRUNK[cell.name]}".replace(" ", "_")).absolute()
    if not out.exists():
        text = Path(args.data) / protocol.CALIBRATION_TEXT
        command = ["shrink", str(args.model), *SHRUNK[cell.name].split()]
        command += ["--calibration", str(text)]
        _run(args, [*command, "--out", str(out)])
    return out


def tuned_dense(args: argparse.Namespace) -> Path:
    """The dense model tuned on its task by as many tokens as are distilled: a folder of transformers'."""
    folder = (args.work / args.name).absolute()
    packed, tuned, out = (folder / f"dense-{step}" for step in ("packed", "tuned", "tuned-exported"))
    text = str(Path(args.data) / protocol.CALIBRATION_TEXT)
    if not packed.exists() and not tuned.exists():
        options = ["--method", "magnitude", "--sparsity", "0", "--values", "bf16"]
        options += ["--head-values", "bf16"]
        _run(args, ["compress", str(args.model), *options, "--out", str(packed)])
    if not tuned.exists():
        options = ["--loss", "task", "--rate", str(args.dense_rate), "--tokens", str(args.tokens)]
        options += ["--text", text, "--micro", "4", "--evaluations", "4"]
        _run(args, ["tune", str(packed), *options, "--out", str(tuned)])
    if not out.exists():
        _run(args, ["export", str(tuned), "--out", str(out)], threads=False)
    return out


def _run(args: argparse.Namespace, command: list[str], threads: bool = True) -> dict[str, Any]:
    """One command in a process of its own: seconds of the clock and of the processor."""
    start, before = time.perf_counter(), os.times()
    full = [sys.executable, "-c", GOSSAMER, *command, *(["--threads", str(args.threads)] if threads else [])]
    done = subprocess.run(full, stdout=subprocess.PIPE, env=limited(args.threads), check=False)
    if done.returncode:
        raise SystemExit(f"gossamer {command[0]} failed: {' '.join(command)}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    told = json.loads(done.stdout) if done.stdout.strip().startswith(b"{") else {}
    shown = [Path(word).name if "/" in word else word for word in command[:-3]]
    return {
        "command": "gossamer " + " ".join(shown),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(cpu, 1),
        "peak_rss_gb": round(told.get("peak_memory_bytes", 0) / 1e9, 2),
    }


def record_of(folder: Path) -> dict[str, Any]:
    """Bits of a checkpoint, and what was tuned on how many tokens."""
    from gossamer.evaluate import size_of

    size = size_of(folder)
    made = json.loads((folder / "gossamer.json").read_text(encoding="utf-8")).get("made", {})
    tokens = max((layer.get("tuned_tokens", 0) for layer in made.get("layers", ())), default=0)
    tokens += sum(one["tokens"] for one in made.get("tuned") or ())
    return {
        "weight_bytes": size.weight_file_bytes,
        "bits_linears": round(size.linear_bits, 3),
        "bits_all_in": round(size.all_bits, 3),
        "tuned_tokens": tokens,
    }


def rival_bytes(args: argparse.Namespace, c: Contender) -> int:
    """Bytes of a rival's file of weights."""
    job = job_of(args, c)
    if c.engine == "transformers":
        return sum(path.stat().st_size for path in Path(job.model).glob("*.safetensors"))
    if c.engine == "openvino":
        return (job.file("openvino-") / "openvino_model.bin").stat().st_size
    return job.file("", ".gguf").stat().st_size
