"""The processes of the decode benchmark's contenders: what they load is made, and they are started."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import decode_files
from benchmarks.decode_protocol import SUBJECTS, Contender, Job, Ready, Run, Subject
from benchmarks.kernels import rivals_in

MODULES = {
    "gossamer": "benchmarks.decode_torch",
    "transformers": "benchmarks.decode_torch",
    "llama_cpp": "benchmarks.rival_llamacpp_decode",
    "openvino": "benchmarks.rival_openvino_decode",
}
PACKAGES = {"llama_cpp": "llama_cpp", "openvino_genai": "openvino"}  # to the engine
ROOT = Path(__file__).parent.parent


class Server:
    """A contender's process (`decode_protocol`); raises GoneError with its last words where it ends early."""

    def __init__(self, python: str, job: Job, env: dict[str, str], name: str) -> None:
        self.name = name
        self.log = Path(job.folder) / f"{re.sub('[^a-zA-Z0-9_+.-]+', '_', name)}.log"
        command = [python, "-m", MODULES[job.engine], json.dumps(asdict(job))]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env=env,
            )
        self.ready = Ready(**self._answer("ready"))

    def run(self, prompt: int, steps: int, seed: int) -> Run:
        return Run(**self._ask({"prompt": prompt, "steps": steps, "seed": seed}, "run"))

    def judge(self, window: Path) -> dict[str, float]:
        """Loss, KL and agreement on a window that lies in the folder (`decode_protocol.judged`)."""
        return self._ask({"window": str(window)}, "judged")

    def _ask(self, asked: dict[str, Any], kind: str) -> dict[str, Any]:
        assert self.process.stdin
        try:
            print(json.dumps(asked), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise GoneError(self._last_words()) from None
        return self._answer(kind)

    def _answer(self, kind: str) -> dict[str, Any]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise GoneError(self._last_words())
        return dict(json.loads(line)[kind])

    def _last_words(self) -> str:
        self.process.wait()
        return f"{self.name} ended with {self.process.returncode}: {last_line(self.log.read_text())}"

    def close(self) -> None:
        assert self.process.stdin
        with suppress(BrokenPipeError):  # it has ended already
            self.process.stdin.close()
        self.process.wait()


class GoneError(Exception):
    """A contender's process ended; says why."""


def last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no word"])[-1]


def job_of(args: argparse.Namespace, name: str, subject: Subject, c: Contender) -> Job:
    """What a contender loads. OpenVINO's files are exported from a folder with weights."""
    folder = (args.work / name).absolute()
    if subject.config is not None:
        model = folder / "dense" if c.engine == "openvino" else folder
    elif args.model is None:
        raise SystemExit(f"{name} needs --model DIR")
    else:
        model = Path(args.model).expanduser().absolute()
    context = max(subject.prompts) + args.steps
    return Job(
        c.engine, c.variant, c.setting, str(model), str(folder), args.threads, context, args.huge_pages
    )


def make(args: argparse.Namespace, python: str, job: Job, env: dict[str, str]) -> None:
    """The file that a contender loads; raises GoneError where it cannot be made."""
    folder = Path(job.folder)
    if not decode_files.has_weights(job.model):
        decode_files.folder_of(SUBJECTS[folder.name].config or {}, folder)
    if job.engine == "llama_cpp":
        random = not decode_files.has_weights(job.model)
        decode_files.gguf(job, job.file("", ".gguf") if random else folder / "source.gguf")
    if job.engine == "openvino" and job.model.startswith(job.folder):
        if args.model is None:
            raise GoneError("OpenVINO: skipped, a random model borrows the tokenizer of --model DIR")
        decode_files.dense_folder(replace(job, model=job.folder), Path(args.model).expanduser())
    command = [python, "-m", MODULES[job.engine], "--make", json.dumps(asdict(job))]
    done = subprocess.run(
        command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        raise GoneError(f"{job.engine} {job.variant}: skipped, could not be made: {last_line(done.stderr)}")


def python_of(args: argparse.Namespace) -> dict[str, str]:
    """The interpreter of each engine that is there."""
    found = {"gossamer": sys.executable, "transformers": sys.executable}
    for python, engine in rivals_in(args.rival_python, PACKAGES):
        found.setdefault(engine, python)
    return found
