"""Attention policies at equal budgets, and prompts through the native decoder: what several parts share."""

from __future__ import annotations

import gzip
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import protocol
from gossamer.dynamic.attention import Policy
from gossamer.dynamic.attention.block_topk import BlockTopK
from gossamer.dynamic.attention.hip import HiP
from gossamer.dynamic.attention.minference import MInference, candidates, searched
from gossamer.dynamic.attention.seer import Seer, learned
from gossamer.dynamic.attention.sink_window import SinkWindow
from gossamer.dynamic.attention.strided import Strided
from gossamer.engine import Decoder
from gossamer.kernels import BLOCK

MEASURED, SEARCHED = "text/persuasion.txt.gz", "text/northangerabbey.txt.gz"
SKIPPED_TOKENS = 20_000
ROWS = 512  # of a prompt that the decoder takes together
NAMES = ("sink_window", "strided", "block_topk", "seer", "hip", "minference")
LEARNED = (8, 2048)  # windows, and tokens of each, on which gates are learned
_gates: dict[int, Tensor] = {}  # by model: learned once for all budgets


def policy(name: str, budget: int, positions: int, model: Any = None, text: Tensor | None = None) -> Policy:
    """The one that looks at about ``budget`` blocks for each block of queries in ``positions``. MInference's
    patterns are searched, and Seer's gates learned, with the transformers ``model`` on ``text``; without them
    all heads have one pattern, and there is no Seer."""
    half = budget // 2
    match name:
        case "sink_window":
            return SinkWindow(BLOCK, (budget - 2) * BLOCK)
        case "strided":
            return Strided(window=half * BLOCK, stride=max(1, positions // BLOCK // half))
        case "block_topk":
            return BlockTopK(budget)
        case "hip":
            return HiP(budget - 3, 2 * BLOCK)
        case "minference":
            if model is None or text is None:
                return MInference(other=candidates(budget)[2])
            return searched(model, text[:positions], budget)
        case "seer" if model is not None and text is not None:
            if id(model) not in _gates:
                count, length = LEARNED
                _gates[id(model)] = learned(model, text[: count * length].reshape(count, length)).gates
            return Seer(_gates[id(model)], budget)
    raise SystemExit(f"unknown policy {name!r}; there are: {', '.join(NAMES)}")


def tokens_of(tokenizer: Any, data: str | None, name: str) -> Tensor:
    """The tokens of a novel behind its first ones, int64 ``(n,)``."""
    text = gzip.decompress((protocol.data_folder(data) / name).read_bytes()).decode("utf-8", "replace")
    ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    return torch.tensor(ids)[SKIPPED_TOKENS:]


def read(
    decoder: Decoder, ids: Tensor, asked: Policy | None, last: int = 1
) -> tuple[dict[str, float], Tensor]:
    """One prompt through the native decoder: ``seconds`` to its first token, but for the head (logits of more
    than one token are no part of a prompt), ``attention`` seconds of those, the share ``looked`` of blocks;
    and the float32 logits after each of the ``last`` tokens, ``(last, vocab)``."""
    policy = None if asked is None else decoder.new_policy(asked.native(len(decoder.windows), decoder.heads))
    cache = decoder.new_cache()
    found: list[Tensor] = []
    head = attention = 0.0
    start = time.perf_counter()
    for begin in range(0, len(ids), ROWS):
        chunk = ids[begin : begin + ROWS]
        wanted = begin + ROWS > len(ids) - last
        logits, parts = decoder.append(cache, chunk, every=wanted, timed=True, policy=policy)
        head, attention = head + parts["head"], attention + parts["attention"]
        if wanted:
            found.append(logits)
    seconds = time.perf_counter() - start - head
    looked = policy.looked / policy.there if policy is not None and policy.there else 1.0
    return {"seconds": seconds, "attention": attention, "looked": looked}, torch.cat(found)[-last:]


def chosen(names: Sequence[str] | None) -> Sequence[str]:
    """Names of policies, all of them for None; refused where one is unknown."""
    unknown = sorted(set(names or ()) - set(NAMES))
    if unknown:
        raise SystemExit(f"unknown policies {', '.join(unknown)}; there are: {', '.join(NAMES)}")
    return names or NAMES
