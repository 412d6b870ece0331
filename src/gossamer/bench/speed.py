"""How fast a language model reads a prompt and writes tokens: medians of several runs, rivals in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.bench.machine import Machine, OtherWork, machine_facts, use_threads
from gossamer.errors import EvaluationError
from gossamer.models.session import Session, SessionFactory, context_length
from gossamer.nn import StructuredEmbedding
from gossamer.nn.experts import share_of_tokens
from gossamer.nn.modes import evaluating
from gossamer.progress import Progress, silent

_WARM_STEPS = 8  # decode steps of a warm-up round


@dataclass(frozen=True)
class Speed:
    """Runs of one model: a prompt of ``prompt`` tokens, then ``decode`` greedy steps of one token each.

    ``prompt_seconds``: of each run, from the tokens to the first new one; ``decode_seconds``: of each run,
    all steps together. ``decode_bytes``: bytes of weights that a step reads (`decode_bytes`);
    ``resident_bytes``: that all steps read between them, more where tokens go to different experts.
    """

    prompt: int
    decode: int
    threads: int
    prompt_seconds: tuple[float, ...]
    decode_seconds: tuple[float, ...]
    decode_bytes: int
    resident_bytes: int | None = None

    @property
    def prompt_tokens_per_second(self) -> float:
        """Median over runs."""
        return self.prompt / median(self.prompt_seconds)

    @property
    def decode_tokens_per_second(self) -> float:
        """Median over runs."""
        return self.decode / median(self.decode_seconds)

    @property
    def first_token_seconds(self) -> float:
        """Median time from the prompt to the first new token."""
        return median(self.prompt_seconds)

    @property
    def decode_gb_per_second(self) -> float:
        """Weights read while decoding, in 1e9 bytes a second, at the median."""
        return self.decode_bytes * self.decode_tokens_per_second / 1e9

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: medians and all runs."""
        return {
            "prompt_tokens_per_second": self.prompt_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "first_token_seconds": self.first_token_seconds,
            "decode_bytes": self.decode_bytes,
            "decode_gb_per_second": self.decode_gb_per_second,
            "prompt": self.prompt,
            "decode": self.decode,
            "threads": self.threads,
            "runs": {
                "prompt_seconds": list(self.prompt_seconds),
                "decode_seconds": list(self.decode_seconds),
            },
        }


@dataclass(frozen=True)
class SpeedComparison:
    """Contenders measured in turn on one machine; the first of ``speeds`` is what others are held against.
    ``other_work``: cores that other processes kept busy meanwhile, on average (None: unknown); above a tenth
    or so they disturb the figures. ``engines``: what ran each one, where that is known."""

    speeds: dict[str, Speed]
    machine: Machine
    other_work: float | None = None
    engines: dict[str, str] = field(default_factory=dict)

    @property
    def baseline(self) -> str:
        """The contender that the ratios are against."""
        return next(iter(self.speeds))

    def ratio(self, name: str, phase: str = "decode") -> float:
        """How many times as fast as the baseline ``name`` is, at ``phase`` "prompt" or "decode": the median
        of the ratios of each round, in which both ran one shortly after the other."""
        runs = f"{phase}_seconds"
        ours: tuple[float, ...] = getattr(self.speeds[name], runs)
        theirs: tuple[float, ...] = getattr(self.speeds[self.baseline], runs)
        return median(their / our for our, their in zip(ours, theirs, strict=True))

    def past_cache(self, name: str) -> bool | None:
        """Whether the weights that ``name`` reads are more than four times the last-level cache, so that they
        come from memory each time; else its speed is that of a cache. None: unknown."""
        return self.machine.past_cache(self.working_set(name))

    def working_set(self, name: str) -> int:
        """Bytes of weights that ``name`` reads over and over."""
        speed = self.speeds[name]
        return speed.resident_bytes or speed.decode_bytes

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "machine": self.machine.to_dict(),
            "other_work": self.other_work,
            "baseline": self.baseline,
            "contenders": {
                name: {
                    **speed.to_dict(),
                    "prompt_ratio": self.ratio(name, "prompt"),
                    "decode_ratio": self.ratio(name, "decode"),
                    "past_cache": self.past_cache(name),
                    "engine": self.engines.get(name),
                }
                for name, speed in self.speeds.items()
            },
        }


def measure_speed(
    model: nn.Module,
    *,
    prompt: int = 512,
    decode: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    warmup: int = 1,
    tokens: Tensor | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Speed:
    """Measure one model alone; see `compare_speed`."""
    options: dict[str, Any] = {"prompt": prompt, "decode": decode, "repeats": repeats, "warmup": warmup}
    options |= {"threads": threads, "tokens": tokens, "seed": seed, "progress": progress}
    sessions = {"the model": partial(Session, model)}
    return _measure({"the model": model}, sessions=sessions, **options)["the model"]


def compare_speed(
    models: Mapping[str, nn.Module],
    *,
    prompt: int = 512,
    decode: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    warmup: int = 1,
    tokens: Tensor | None = None,
    seed: int = 0,
    sessions: Mapping[str, SessionFactory] | None = None,
    progress: Progress = silent,
) -> SpeedComparison:
    """Measure several models round by round, so that drift of the machine hits all alike.

    Each of ``repeats`` rounds runs every model once, in an order that shifts by one from round to round.
    A run is a fresh key/value cache, a prompt of ``prompt`` tokens at once (``tokens``, int64 ``(prompt,)``,
    or random ones by ``seed``), and ``decode`` greedy steps from there. ``warmup`` rounds before that are
    shorter and not timed.
    ``threads``: of PyTorch and the kernels; None leaves them. ``sessions``: what runs a model, where that is
    not transformers. The first model is the baseline.

    Raises EvaluationError where there is no model, a count is below 1, or the model's context is too short.
    """
    facts = _facts(threads)
    options: dict[str, Any] = {"prompt": prompt, "decode": decode, "repeats": repeats, "warmup": warmup}
    options |= {"threads": threads, "tokens": tokens, "seed": seed, "progress": progress}
    options["sessions"] = {name: partial(Session, model) for name, model in models.items()} | dict(
        sessions or {}
    )
    others = OtherWork()
    speeds = _measure(models, **options)
    return SpeedComparison(speeds, facts, others.cores())


def decode_bytes(model: nn.Module, *, all_experts: bool = False) -> int:
    """Bytes of weights that one decode step reads: all parameters and buffers but embeddings, of which it
    looks up a row. A head tied to an embedding is read whole and counts; of experts the share counts that a
    token is sent to, or all of them.
    """
    seen: dict[tuple[int, int], float] = {}

    def visit(module: nn.Module, share: float) -> None:
        if isinstance(module, nn.Embedding | StructuredEmbedding):
            return
        if not all_experts:
            share *= share_of_tokens(module, getattr(model, "config", None))
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            seen[tensor.data_ptr(), tensor.nbytes] = share * tensor.nbytes
        for child in module.children():
            visit(child, share)

    visit(model, 1.0)
    return round(sum(seen.values()))


def _facts(count: int | None) -> Machine:
    with use_threads(count):
        return machine_facts()


def _measure(
    models: Mapping[str, nn.Module],
    *,
    prompt: int,
    decode: int,
    repeats: int,
    warmup: int,
    threads: int | None,
    tokens: Tensor | None,
    seed: int,
    sessions: Mapping[str, SessionFactory],
    progress: Progress,
) -> dict[str, Speed]:
    inputs = prompt_for(models, prompt, decode, repeats, warmup, tokens, seed)
    runs: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    names = list(models)
    total, done = (warmup + repeats) * len(names), 0
    with use_threads(threads), ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluating(model))
        for turn in range(warmup + repeats):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if turn < warmup:
                    _run(sessions[name], inputs, min(decode, _WARM_STEPS))
                else:
                    runs[name].append(_run(sessions[name], inputs, decode))
                done += 1
                progress("bench", done, total)
        used = torch.get_num_threads()
    return {
        name: Speed(
            prompt=inputs.numel(),
            decode=decode,
            threads=used,
            prompt_seconds=tuple(first for first, _ in runs[name]),
            decode_seconds=tuple(rest for _, rest in runs[name]),
            decode_bytes=decode_bytes(model),
            resident_bytes=decode_bytes(model, all_experts=True),
        )
        for name, model in models.items()
    }


def _run(start_session: SessionFactory, ids: Tensor, decode: int) -> tuple[float, float]:
    """Seconds from the prompt to the first new token, and of ``decode`` steps after it."""
    gc.collect()
    session = start_session()
    start = time.perf_counter()
    token = int(session.prompt(ids).numpy().argmax())  # PyTorch would start threads for it
    first = time.perf_counter()
    for _ in range(decode):
        token = int(session.step(token).numpy().argmax())
    return first - start, time.perf_counter() - first


def prompt_for(
    models: Mapping[str, nn.Module],
    prompt: int,
    decode: int,
    repeats: int,
    warmup: int = 0,
    tokens: Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """The prompt: ``tokens``, or random ones by ``seed`` that all ``models`` know. Raises EvaluationError
    where it, or what follows it, cannot be run."""
    if not models:
        raise EvaluationError("no model was given to measure")
    counts = {"prompt": prompt, "decode": decode, "repeats": repeats}
    for name, count in counts.items():
        if count < 1:
            raise EvaluationError(f"{name} must be at least 1, got {count}")
    if warmup < 0:
        raise EvaluationError(f"warmup must be at least 0, got {warmup}")
    if tokens is not None:
        if tokens.ndim != 1 or tokens.numel() < 1 or tokens.dtype != torch.int64:
            raise EvaluationError(f"tokens must be int64 (prompt,), got {tokens.dtype} {tuple(tokens.shape)}")
        prompt = tokens.numel()
    configs: dict[str, Any] = {name: model.config for name, model in models.items()}
    for name, config in configs.items():
        limit = context_length(config)
        if limit is not None and prompt + decode > limit:
            raise EvaluationError(
                f"a prompt of {prompt} and {decode} new tokens are more than the {limit} positions "
                f"that {name} knows: ask for fewer"
            )
    if tokens is not None:
        return tokens
    vocabulary = min(int(config.vocab_size) for config in configs.values())
    return torch.randint(vocabulary, (prompt,), generator=torch.Generator().manual_seed(seed))
