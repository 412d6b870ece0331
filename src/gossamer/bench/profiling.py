"""Where a token's time goes in the native decoder: seconds, bytes and arithmetic of each part of it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from gossamer.bench.machine import Machine, OtherWork, machine_facts, use_threads
from gossamer.bench.speed import prompt_for
from gossamer.engine import Decoder
from gossamer.engine.caches import CacheKind
from gossamer.progress import Progress, silent

_WARM_STEPS = 8  # tokens written in the round that is not timed


@dataclass(frozen=True)
class Part:
    """One part of a token's way through the decoder, or the whole.

    ``token_seconds``: of each token written; ``nbytes``: bytes of weights, and of the cache, that one of them
    reads, on average; ``prompt_seconds``: a token's share of each prompt; ``operations``: multiplications and
    additions of a prompt's token, on average, those with pruned weights included.
    """

    token_seconds: tuple[float, ...]
    nbytes: float
    prompt_seconds: tuple[float, ...]
    operations: float

    @property
    def gb_per_second(self) -> float:
        """How fast a written token reads, in 1e9 bytes a second, at the median."""
        return self.nbytes / median(self.token_seconds) / 1e9

    @property
    def gop_per_second(self) -> float:
        """Operations of a prompt, in 1e9 a second, at the median."""
        return self.operations / median(self.prompt_seconds) / 1e9


@dataclass(frozen=True)
class Profile:
    """``decode`` tokens written after a prompt of ``prompt`` tokens, several times over.

    ``parts``: ``attention_products`` (q, k, v and o), ``attention`` (with the rotation and storing of keys),
    ``mlp``, ``head``, each with its norms and the rounding of its activations, and ``rest``: the embedding,
    starting the threads, waiting for the last of them. ``other_work``: see `SpeedComparison`.
    """

    prompt: int
    decode: int
    parts: dict[str, Part]
    whole: Part
    machine: Machine
    other_work: float

    def share_of_reading(self, part: Part) -> float | None:
        """How fast ``part`` reads beside plain reading of this machine's memory; None: not measured."""
        plain = self.machine.read_gb_per_second
        return None if plain is None else part.gb_per_second / plain

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: medians."""

        def told(part: Part) -> dict[str, Any]:
            return {
                "token_seconds": median(part.token_seconds),
                "bytes": part.nbytes,
                "gb_per_second": part.gb_per_second,
                "share_of_reading": self.share_of_reading(part),
                "prompt_seconds": median(part.prompt_seconds),
                "operations": part.operations,
                "gop_per_second": part.gop_per_second,
            }

        return {
            "machine": self.machine.to_dict(),
            "other_work": self.other_work,
            "prompt": self.prompt,
            "decode": self.decode,
            "past_cache": self.machine.past_cache(round(self.whole.nbytes)),
            "parts": {name: told(part) for name, part in self.parts.items()},
            "whole": told(self.whole),
        }


def profile(
    decoder: Decoder,
    *,
    prompt: int = 512,
    decode: int = 64,
    repeats: int = 3,
    threads: int | None = None,
    seed: int = 0,
    cache: CacheKind = torch.bfloat16,
    progress: Progress = silent,
) -> Profile:
    """Time the parts of ``decoder``: ``repeats`` times a fresh ``cache`` (`engine.caches`), a prompt of
    ``prompt`` random tokens by ``seed``, and ``decode`` greedy tokens; before that a round that is not timed.

    ``threads``: of the decoder; None leaves them. Bytes of weights are all that they have; of the layout
    columns fewer may be read. Raises EvaluationError where a count is below 1 or the context is too short.
    """
    ids = prompt_for({"the model": decoder.model}, prompt, decode, repeats, seed=seed)
    written: list[dict[str, float]] = []
    read: list[dict[str, float]] = []
    with use_threads(threads):
        machine, others = machine_facts(), OtherWork()
        for turn in range(repeats + 1):
            first, steps = _run(decoder, cache, ids, decode if turn else min(decode, _WARM_STEPS))
            if turn:
                read.append({name: seconds / prompt for name, seconds in first.items()})
                written += steps
            progress("bench", turn + 1, repeats + 1)
        other_work = others.cores()
    nbytes = {
        name: sum(one.nbytes * share for one, share in weights) for name, weights in decoder.weights.items()
    }
    # keys and values are read once for all heads of queries, and multiplied once by each
    seen = _positions(decoder, range(prompt + 1, prompt + decode + 1)) / decode
    token_bytes = {
        **nbytes,
        "attention": seen * decoder.new_cache(cache).token_bytes / len(decoder.windows),
    }
    products = {
        name: 2.0 * sum(one.shape[0] * one.shape[1] * share for one, share in weights)
        for name, weights in decoder.weights.items()
    }
    products["head"] /= prompt  # of the last token alone
    met = _positions(decoder, range(1, prompt + 1)) / prompt
    operations = {**products, "attention": met * 4 * decoder.heads * decoder.head_dim}

    def part(name: str) -> Part:
        return Part(
            tuple(one[name] for one in written),
            token_bytes.get(name, 0),
            tuple(one[name] for one in read),
            operations.get(name, 0),
        )

    whole = Part(
        tuple(sum(one.values()) for one in written),
        sum(token_bytes.values()),
        tuple(sum(one.values()) for one in read),
        sum(operations.values()),
    )
    return Profile(prompt, decode, {name: part(name) for name in read[0]}, whole, machine, other_work)


def _run(
    decoder: Decoder, kind: CacheKind, ids: Tensor, decode: int
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Seconds of the parts of the prompt, and of each of ``decode`` greedy tokens after it."""
    cache = decoder.new_cache(kind)

    def timed(ids: Tensor) -> tuple[int, dict[str, float]]:
        start = time.perf_counter()
        logits, parts = decoder.append(cache, ids, timed=True)
        parts = _with_rest(parts, time.perf_counter() - start)
        return int(logits.numpy().argmax()), parts

    token, first = timed(ids)
    steps = []
    for _ in range(decode):
        token, parts = timed(torch.tensor([token]))
        steps.append(parts)
    return first, steps


def _with_rest(parts: Mapping[str, float], whole: float) -> dict[str, float]:
    """The decoder's own ``parts``, and as ``rest`` all that they leave of the ``whole``."""
    named = {name: seconds for name, seconds in parts.items() if name != "rest"}
    return {**named, "rest": whole - sum(named.values())}


def _positions(decoder: Decoder, lengths: Iterable[int]) -> int:
    """Positions that tokens at these lengths of the sequence see, in all layers together."""
    return sum(min(length, window or length) for length in lengths for window in decoder.windows)
