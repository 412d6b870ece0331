"""Caches of keys and values on a long text: bytes a token, perplexity and KL, and tokens a second.

Windows of a novel (8,064 tokens, from its 20,001st on): the last ones (``--last``) go through the cache after
the others were read. In transformers those were read densely once for all, and pieces of 64 follow, each
token choosing for itself where a method chooses. The native decoder reads them through its cache too; where
it chooses, tokens follow one by one. Perplexity of the last tokens, and KL to transformers with its own cache
in bfloat16, are of the same pass. Then steps follow, contenders in turn, round by round. Label channels and
the native decoder's basis of keys come from another novel. Model and caches in bfloat16 unless said.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from transformers import DynamicCache

from benchmarks import protocol
from benchmarks.dynamic.contenders import MEASURED, SEARCHED, tokens_of
from gossamer.dynamic.cache import CacheMethod, reading
from gossamer.dynamic.cache.double_sparsity import DoubleSparsity, label_channels
from gossamer.dynamic.cache.gear import Gear
from gossamer.dynamic.cache.key_basis import key_basis
from gossamer.dynamic.cache.low_rank_keys import LowRankKeys
from gossamer.engine import Decoder, Looks, NativeSession, PackedCache
from gossamer.engine.caches import PACKED, CacheKind
from gossamer.models.attention import decoding

PIECE = 64  # tokens of the measured text that go in together
TURN = 0.5  # seconds after which a slow contender's turn ends
DENSE, PLAIN = "transformers, bfloat16", "native, bfloat16"


def methods(labels: Tensor) -> dict[str, CacheMethod]:
    """Caches of transformers by name."""
    found: dict[str, CacheMethod] = {
        "KIVI 4 bits": Gear(4, rank=0, outliers=0, later_rank=0),
        "GEAR 4 bits": Gear(4),
        "KIVI 2 bits": Gear(2, rank=0, outliers=0, later_rank=0),
        "GEAR 2 bits": Gear(2),
    }
    for rank, tokens in ((96, 1024), (96, 256), (48, 1024)):
        found[f"low-rank keys {rank}, {tokens} tokens"] = LowRankKeys(rank, tokens)
    for count, tokens in ((16, 1024), (16, 512), (16, 256), (8, 512)):
        some = labels[..., :count]
        found[f"Double Sparsity {count}, {tokens} tokens"] = DoubleSparsity(some, tokens)
    return found


class InTransformers:
    """A transformers cache that took in a prompt which was read once for all."""

    def __init__(self, model: Any, method: CacheMethod | None, prompt: DynamicCache) -> None:
        self.model = model
        self.cache: Any = DynamicCache(config=model.config) if method is None else method.new(model)
        self.method = method
        for number, layer in enumerate(prompt.layers):
            self.cache.update(layer.keys, layer.values, number)

    @property
    def nbytes(self) -> int:
        if self.method is None:
            return sum(layer.keys.nbytes + layer.values.nbytes for layer in self.cache.layers)
        return int(self.cache.nbytes)

    def logits(self, ids: Tensor) -> Tensor:
        with nullcontext() if self.method is None else reading(self.model, self.cache):
            return self._run(ids)

    def steps(self, ids: Tensor) -> list[float]:
        with ExitStack() as stack:
            stack.enter_context(
                decoding(self.model) if self.method is None else reading(self.model, self.cache)
            )
            return timed(lambda token: self._run(token[None]), ids)

    def _run(self, ids: Tensor) -> Tensor:
        out = self.model(ids[None], past_key_values=self.cache, use_cache=True)
        return out.logits[0].float()


class Native:
    """A session of the native decoder, whose every row goes through the cache as it is."""

    def __init__(self, session: NativeSession, prompt: Tensor, chooses: bool) -> None:
        self.session, self.chooses = session, chooses
        session.prompt(prompt)

    @property
    def nbytes(self) -> int:
        return self.session.nbytes

    def logits(self, ids: Tensor) -> Tensor:
        if not self.chooses:  # a token sees the same in any company
            return self.session.logits(ids)
        return torch.stack([self.session.step(int(token)).clone() for token in ids])

    def steps(self, ids: Tensor) -> list[float]:
        return timed(lambda token: self.session.step(int(token)), ids)


def timed(step: Callable[[Tensor], object], ids: Tensor) -> list[float]:
    """Seconds of one token after the other, until a turn has taken `TURN` seconds."""
    found: list[float] = []
    for token in ids:
        if sum(found) > TURN:
            break
        start = time.perf_counter()
        step(token)
        found.append(time.perf_counter() - start)
    return found


def natives(decoder: Decoder, labels: Tensor, basis: Tensor) -> dict[str, Callable[[Tensor], Native]]:
    """Contenders of the native decoder by name; Double Sparsity there reads blocks of 64 tokens."""

    def made(prompt: Tensor, cache: CacheKind, looks: Looks | None = None) -> Native:
        return Native(NativeSession(decoder, cache, looks), prompt, looks is not None)

    names = ("bfloat16", "int8", *PACKED)
    found: dict[str, Callable[[Tensor], Native]] = {
        f"native, {cache}": partial(made, cache=cache) for cache in names
    }
    low = {f"low-rank keys {rank}": PackedCache(4, keys=basis[:, :rank]) for rank in (144, 96, 48)}
    found |= {f"native, {name}": partial(made, cache=cache) for name, cache in low.items()}
    choosing: tuple[tuple[str, int, int], ...] = (
        ("bfloat16", 16, 2048),
        ("bfloat16", 16, 1024),
        ("bfloat16", 16, 512),
        ("bfloat16", 8, 1024),
        ("int8", 16, 2048),
        ("int8", 16, 1024),
        ("gear4", 16, 1024),
        ("low-rank keys 96", 16, 1024),
    )
    for cache, count, tokens in choosing:
        policy = DoubleSparsity(labels[..., :count], tokens).policy(decoder.model)
        looks = policy.native(len(decoder.windows), decoder.heads)
        name = f"native, {cache}, Double Sparsity {count}, {tokens} tokens"
        found[name] = partial(made, cache=low.get(cache, cache), looks=looks)
    return found


def quality(contender: Any, text: Tensor, last: int, dense: list[Tensor] | None) -> dict[str, Any]:
    """Losses of the last tokens of ``text``, whose first are in the cache; and KL a token to ``dense``."""
    losses, divergences, logits = [], [], []
    places = range(len(text) - last, len(text) - 1, PIECE)
    for number, begin in enumerate(places):
        found = contender.logits(text[begin : begin + PIECE])
        targets = text[begin + 1 : begin + PIECE + 1]
        losses.append(cross_entropy(found[: len(targets)], targets, reduction="sum").item())
        if dense is None:
            logits.append(found.to(torch.bfloat16))
        else:
            ours, theirs = log_softmax(found, -1), log_softmax(dense[number].float(), -1)
            divergences.append(kl_div(ours, theirs, log_target=True, reduction="sum").item())
    result: dict[str, Any] = {"loss": sum(losses) / (last - 1)}
    if dense is not None:
        result["kl"] = sum(divergences) / last
    return result | ({"logits": logits} if dense is None else {})


def one_window(
    args: argparse.Namespace,
    model: Any,
    known: dict[str, Any],
    ids: Tensor,
    number: int,
    save: Callable[[dict[str, dict[str, Any]]], None],
) -> dict[str, dict[str, Any]]:
    """All contenders on one window: first their quality, one after the other, then steps in turn. What is
    known so far is saved on the way."""
    text, later = ids[: args.tokens], ids[args.tokens :]
    prefix = text[: args.tokens - args.last]
    prompt = DynamicCache(config=model.config)
    model(prefix[None], past_key_values=prompt, use_cache=True, logits_to_keep=1)
    contenders: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    dense: list[Tensor] | None = None
    for name, what in known.items():
        start = time.perf_counter()
        if callable(what):
            contender: Any = what(prefix)
        else:
            contender = InTransformers(model, what, prompt)
        result = quality(contender, text, args.last, dense)
        dense = result.pop("logits", dense)
        result["bytes"] = contender.nbytes / args.tokens
        result["read_seconds"] = time.perf_counter() - start
        found[name] = result
        save({name: result})
        print(json.dumps({f"{name}, window {number}": result}), flush=True)
        if number == 0:
            contenders[name] = contender
    if number == 0:
        for name in contenders:
            found[name]["seconds"] = []
        for each in later[: args.rounds * args.steps].split(args.steps):
            for name, contender in contenders.items():
                found[name]["seconds"] += contender.steps(each)
            save(found)
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> None:
    rows = []
    plain = {kind: median_seconds(runs) for kind, runs in found.items() if kind in (DENSE, PLAIN)}
    for name, runs in found.items():
        perplexity = math.exp(statistics.mean(run["loss"] for run in runs))
        kl = "" if "kl" not in runs[0] else f"{statistics.mean(run['kl'] for run in runs):.4f}"
        seconds = median_seconds(runs)
        beside = plain.get(PLAIN if name.startswith("native") else DENSE)
        rows.append(
            [
                name,
                f"{runs[0]['bytes']:,.0f}",
                f"{perplexity:.3f}",
                kl,
                f"{1 / seconds:.1f}",
                f"{beside / seconds:.2f}x" if beside else "",
            ]
        )
    protocol.print_table(["", "bytes a token", "perplexity", "KL", "tokens/s", "beside bfloat16"], rows)


def median_seconds(runs: list[dict[str, Any]]) -> float:
    return statistics.median(second for run in runs for second in run.get("seconds", []))


def main() -> None:
    parser = protocol.parser("dynamic caches", __doc__)
    protocol.add_model_arguments(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--tokens", type=int, default=8064)
    parser.add_argument("--last", type=int, default=256, help="tokens that perplexity is of")
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=8, help="of a contender in a round")
    parser.add_argument("--only", default="", metavar="REGEX", help="contenders besides the dense ones")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_caches.json")
    args = parser.parse_args()
    if args.last % PIECE or not PIECE < args.last < args.tokens:
        raise SystemExit(f"--last is a multiple of {PIECE}, and less than --tokens")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    protocol.set_threads(args.threads)
    tokenizer, model = protocol.load_tokenizer(args.model), protocol.load_model(args.model, "bfloat16")
    later = args.rounds * args.steps
    text = tokens_of(tokenizer, args.data, MEASURED)
    other = tokens_of(tokenizer, args.data, SEARCHED)[:4096]
    found: dict[str, list[dict[str, Any]]] = {}
    with torch.no_grad():
        decoder = Decoder(model)
        labels = label_channels(model, other.reshape(-1, 1024), 16)
        basis = key_basis(model, other.reshape(-1, 1024), 144)
        known: dict[str, Any] = {DENSE: None, **methods(labels), **natives(decoder, labels, basis)}
        known = {
            name: what for name, what in known.items() if name in (DENSE, PLAIN) or re.search(args.only, name)
        }

        def save(results: dict[str, dict[str, Any]]) -> None:
            protocol.update_json(
                args.out,
                {
                    "command": "python -m benchmarks.dynamic caches --model DIR",
                    "machine": protocol.machine(),
                    "threads": args.threads,
                    "tokens": args.tokens,
                    "last": args.last,
                    "runs": {name: [*found.get(name, []), result] for name, result in results.items()},
                },
            )

        for number in range(args.windows):
            begin = number * args.tokens
            ids = text[begin : begin + args.tokens + later]
            for name, result in one_window(args, model, known, ids, number, save).items():
                found.setdefault(name, []).append(result)
    table(found)


if __name__ == "__main__":
    main()
