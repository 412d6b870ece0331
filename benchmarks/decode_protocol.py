"""What the decode benchmark runs, and how its contenders' processes are spoken to. Needs nothing but Python.

A contender is a process, `python -m MODULE JOB`, with a `Job` as JSON. It loads its model and prints a line
`{"ready": {...}}`; then it answers each line of its standard input, such as
`{"prompt": 512, "steps": 64, "seed": 0}`, by `{"run": {...}}`, one such as `{"window": FOLDER}` by
`{"judged": {...}}`, and ends with its input. With `--make` it
makes the file that it loads, where that is missing, and ends. Whatever a library prints goes to
the standard error.
"""

from __future__ import annotations

import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TextIO

INT4, INT4_8, INT8, BF16 = "int4, head int4", "int4, head int8", "int8, head int8", "bfloat16"


@dataclass(frozen=True)
class Contender:
    """``engine``: one of `ENGINES`; ``variant``: which of its files, in its own words; ``bits``: of linear
    layers and head, rivals are held against ours of the same; ``setting``: what it is asked for beside;
    ``long``: whether it reads the long prompts."""

    engine: str
    variant: str
    bits: str
    setting: str = ""
    long: bool = True

    @property
    def name(self) -> str:
        words = [ENGINES[self.engine], self.variant, self.setting]
        return " ".join(word for word in words if word)

    @property
    def ours(self) -> bool:
        return self.engine == "gossamer"


ENGINES = {"gossamer": "", "llama_cpp": "llama.cpp", "openvino": "OpenVINO", "transformers": "transformers"}


@dataclass(frozen=True)
class Subject:
    """A model. ``config``: of a Llama with random weights, in transformers' words, or None for the one of
    ``--model``; ``prompts``: tokens, of which all but the first are long; ``contenders``: ours first."""

    prompts: tuple[int, ...]
    contenders: tuple[Contender, ...]
    config: dict[str, Any] | None = None


def llama(hidden: int, inner: int, layers: int, tied: bool) -> dict[str, Any]:
    """The config of a Llama 3 with 32 heads, 8 of them with keys and values of their own."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": hidden // 32,
        "vocab_size": 128256,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    }


def _openvino(variant: str, bits: str) -> tuple[Contender, ...]:
    return tuple(Contender("openvino", variant, bits, hint) for hint in ("", "f32"))


SUBJECTS = {
    "SmolLM2-135M": Subject(
        prompts=(512, 4096, 8064),
        contenders=(
            Contender("gossamer", "dense int4/int4", INT4, long=False),
            Contender("gossamer", "32:64 int4/int4", INT4, long=False),
            Contender("gossamer", "dense int4/int8", INT4_8),
            Contender("gossamer", "32:64 int4/int8", INT4_8),
            Contender("gossamer", "dense int8/int8", INT8),
            Contender("gossamer", "dense bfloat16/bfloat16", BF16),
            Contender("llama_cpp", "Q4_0+q4_0", INT4, long=False),
            Contender("llama_cpp", "Q4_0", INT4_8),
            Contender("llama_cpp", "Q8_0", INT8),
            Contender("llama_cpp", "BF16", BF16),
            *_openvino("int4", INT4_8),
            *_openvino("int8", INT8),
            *_openvino("bf16", BF16),
            Contender("transformers", "bfloat16", BF16),
            Contender("transformers", "float32", BF16, long=False),
        ),
    ),
    "Llama-3.2-1B": Subject(
        prompts=(512,),
        contenders=(
            Contender("gossamer", "dense int4/int4", INT4),
            Contender("gossamer", "32:64 int4/int4", INT4),
            Contender("gossamer", "32x32 50% int4/int4", INT4),
            Contender("llama_cpp", "Q4_0+q4_0", INT4),
            *_openvino("int4 all", INT4),
        ),
        config=llama(2048, 8192, 16, tied=True),
    ),
    "Llama-3-8B": Subject(
        prompts=(128,),
        contenders=(
            Contender("gossamer", "dense int4/int4", INT4),
            Contender("llama_cpp", "Q4_0+q4_0", INT4),
        ),
        config=llama(4096, 14336, 32, tied=False),
    ),
}


@dataclass(frozen=True)
class Job:
    """What one process loads. ``model``: the dense model's folder (of a random one: its config alone);
    ``folder``: where files made of it are kept; ``context``: tokens that must fit."""

    engine: str
    variant: str
    setting: str
    model: str
    folder: str
    threads: int
    context: int
    huge_pages: bool = False

    def file(self, prefix: str, suffix: str = "") -> Path:
        """The file of this variant that an engine keeps."""
        name = self.variant.replace("/", "-").replace(" ", "_").replace("%", "").replace(":", "_")
        return Path(self.folder) / f"{prefix}{name}{suffix}"

    @property
    def config(self) -> dict[str, Any]:
        return dict(json.loads((Path(self.model) / "config.json").read_text(encoding="utf-8")))


@dataclass
class Run:
    """A prompt and greedy steps after it, in seconds; the first tokens that were written; bytes of resident
    memory after it, and the most since the process began."""

    prompt_seconds: float
    step_seconds: list[float]
    tokens: list[int]
    resident: int = 0
    peak: int = 0

    @property
    def step(self) -> float:
        """Seconds of a token: the median of all but the first, which wakes threads."""
        return statistics.median(self.step_seconds[1:] or self.step_seconds)


PARTS = ("q k v o", "attention", "MLP", "head", "rest")
"""Of a token in our decoder, in the order of its timings."""


@dataclass
class Ready:
    """``seconds``: of loading; ``weight_bytes``: all of them; ``setting``: what it runs by; ``parts``:
    seconds of each part of a token, where they can be told apart."""

    weight_bytes: int
    versions: dict[str, str]
    setting: str = ""
    seconds: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)


class Engine(Protocol):
    """A model that is loaded."""

    ready: Ready

    def run(self, ids: list[int], steps: int) -> Run:
        """A new sequence: the prompt ``ids`` to the first token, then ``steps`` tokens after it."""

    def logits(self, ids: list[int]) -> Any:
        """A new sequence: the logits after each of ``ids``, a float32 array ``(len(ids), vocabulary)``."""


class Stepper(Protocol):
    """One sequence; both give the likeliest next token."""

    def prompt(self, ids: list[int]) -> int: ...
    def step(self, token: int) -> int: ...


def stepped(sequence: Stepper, ids: list[int], steps: int) -> Run:
    """`Engine.run` for what takes a token at a time."""
    clock = time.perf_counter
    start = clock()
    tokens = [sequence.prompt(ids)]
    end = clock()
    run = Run(end - start, [], tokens)
    for _ in range(steps):
        start = end
        tokens.append(sequence.step(tokens[-1]))
        end = clock()
        run.step_seconds.append(end - start)
    return run


def main(load: Callable[[Job], Engine], make: Callable[[Job], None], argv: Sequence[str]) -> None:
    """What every contender's process does."""
    *options, text = argv
    job = Job(**json.loads(text))
    if "--make" in options:
        make(job)
        return
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    vocabulary = job.config["vocab_size"]
    start = time.perf_counter()
    engine = load(job)
    engine.ready.seconds = time.perf_counter() - start
    _emit(out, "ready", engine.ready)
    for line in sys.stdin:
        asked = json.loads(line)
        if "window" in asked:
            _emit(out, "judged", judged(engine, Path(asked["window"])))
            continue
        run = engine.run(prompt_ids(asked["prompt"], vocabulary, asked["seed"]), asked["steps"])
        run.tokens = run.tokens[:8]
        run.resident, run.peak = memory()
        _emit(out, "run", run)


def judged(engine: Engine, window: Path) -> dict[str, float]:
    """What an engine makes of a window whose tokens and reference `quality` has written: the mean loss, KL
    from the reference, nats a token, and the share of positions where both rank the same token first."""
    import numpy as np

    ids, expected = np.load(window / "ids.npy"), np.load(window / "logp.npy", mmap_mode="r")
    logits = np.asarray(engine.logits(ids.tolist()))[:-1]
    loss = kl = same = 0.0
    for start in range(0, len(logits), 128):  # a few rows at a time: the whole is 400 MB
        part, want = logits[start : start + 128].astype(np.float32), expected[start : start + 128]
        part -= part.max(axis=1, keepdims=True)
        part -= np.log(np.exp(part).sum(axis=1, keepdims=True, dtype=np.float64)).astype(np.float32)
        targets = ids[start + 1 : start + 1 + len(part)]
        loss -= float(part[np.arange(len(part)), targets].sum(dtype=np.float64))
        same += float((part.argmax(axis=1) == want.argmax(axis=1)).sum())
        part -= want
        kl -= float((np.exp(want) * part).sum(dtype=np.float64))
    return {"loss": loss / len(logits), "kl": kl / len(logits), "top1": same / len(logits)}


def prompt_ids(count: int, vocabulary: int, seed: int = -1) -> list[int]:
    """The same random tokens for everybody, others with each seed, so that nobody has read them before; the
    first few of the vocabulary, special in most, are left out."""
    return random.Random(seed).choices(range(16, min(vocabulary, 40000)), k=count)


def _emit(out: TextIO, kind: str, content: Ready | Run | dict[str, float]) -> None:
    plain = content if isinstance(content, dict) else asdict(content)
    print(json.dumps({kind: plain}), file=out, flush=True)


def memory() -> tuple[int, int]:
    """Bytes of resident memory of this process: now, and the most so far; 0 where the system does not say."""
    found = {"VmRSS": 0, "VmHWM": 0}
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="ascii").splitlines() if status.exists() else ():
        name, _, value = line.partition(":")
        if name in found:
            found[name] = int(value.split()[0]) << 10
    return found["VmRSS"], found["VmHWM"]


@dataclass
class Series:
    """One contender's rounds of one prompt: seconds of the prompt and of a token after it, memory, and plain
    reading before each, bytes a second."""

    prompt: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    read: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    resident: int = 0
    peak: int = 0

    def add(self, run: Run, read: float) -> None:
        self.prompt.append(run.prompt_seconds)
        self.step.append(run.step)
        self.read.append(read)
        self.tokens = run.tokens
        self.resident, self.peak = run.resident, run.peak
