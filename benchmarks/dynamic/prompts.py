"""Attention policies on long prompts: time to the first token, and perplexity of the last 1,024 tokens.

Windows of a novel (8,064 tokens each, from its 20,001st token on) go through the model once per policy, dense
attention in the same kernel and PyTorch's own among them; windows and policies interleave. MInference's
patterns are searched on another novel. All in transformers, the model in bfloat16.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import protocol
from gossamer.dynamic.attention import Policy, attention
from gossamer.dynamic.attention.block_topk import BlockTopK
from gossamer.dynamic.attention.hip import HiP
from gossamer.dynamic.attention.minference import searched
from gossamer.dynamic.attention.sink_window import SinkWindow
from gossamer.dynamic.attention.strided import Strided
from gossamer.kernels import BLOCK

MEASURED, SEARCHED = "text/persuasion.txt.gz", "text/northangerabbey.txt.gz"
LAST = 1024
SKIPPED_TOKENS = 20_000


def policies(model: Any, prompt: Tensor, budget: int) -> dict[str, Policy]:
    """Those that look at about ``budget`` blocks for each block of queries."""
    half = budget // 2
    return {
        "sink_window": SinkWindow(BLOCK, (budget - 2) * BLOCK),
        "strided": Strided(window=half * BLOCK, stride=max(1, len(prompt) // BLOCK // half)),
        "block_topk": BlockTopK(budget),
        "hip": HiP(budget - 3, 2 * BLOCK),
        "minference": searched(model, prompt, budget),
    }


def tokens_of(tokenizer: Any, data: str, name: str) -> Tensor:
    text = gzip.decompress((Path(data) / name).read_bytes()).decode("utf-8", "replace")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


@contextmanager
def attending(model: Any, policy: Policy | str) -> Iterator[Any]:
    """``torch``, ``dense`` or a policy."""
    if policy == "torch":
        with nullcontext():
            yield None
    else:
        with attention(model, None if policy == "dense" else policy) as attend:
            yield attend


def measure(model: Any, ids: Tensor, policy: Policy | str) -> dict[str, float]:
    """One prompt: seconds, the mean loss of its last tokens, and the share of blocks that was looked at."""
    with attending(model, policy) as attend:
        start = time.perf_counter()
        logits = model(ids[None], use_cache=False, logits_to_keep=LAST + 1).logits[0, :-1]
        seconds = time.perf_counter() - start
    loss = float(torch.nn.functional.cross_entropy(logits.float(), ids[-LAST:]))
    return {"seconds": seconds, "loss": loss, "looked": 1.0 if attend is None else attend.looked}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dynamic prompts", description=__doc__)
    protocol.add_model_arguments(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--tokens", type=int, default=8064)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[8, 16, 32], help="blocks a block of queries"
    )
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_prompts.json")
    args = parser.parse_args()
    if not args.data:
        raise SystemExit("the texts are needed: pass --data DIR or set GOSSAMER_DATA")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    protocol.set_threads(args.threads)
    tokenizer, model = protocol.load_tokenizer(args.model), protocol.load_model(args.model, "bfloat16")
    text = tokens_of(tokenizer, args.data, MEASURED)[SKIPPED_TOKENS:]
    windows = text[: args.windows * args.tokens].reshape(-1, args.tokens)
    other = tokens_of(tokenizer, args.data, SEARCHED)[SKIPPED_TOKENS : SKIPPED_TOKENS + args.tokens]
    found: dict[str, list[dict[str, float]]] = {}
    with torch.no_grad():
        contenders: dict[str, Policy | str] = {"torch": "torch", "dense": "dense"}
        for budget in args.budgets:
            some = policies(model, other, budget)
            contenders |= {f"{name}, {budget} blocks": policy for name, policy in some.items()}
        for ids in windows:
            for name, policy in contenders.items():
                found.setdefault(name, []).append(measure(model, ids, policy))
                print(json.dumps({name: found[name][-1]}), flush=True)
    rows = []
    for name, runs in found.items():
        perplexity = math.exp(statistics.mean(run["loss"] for run in runs))
        seconds = statistics.median(run["seconds"] for run in runs)
        speed = statistics.median(
            one["seconds"] / run["seconds"] for one, run in zip(found["dense"], runs, strict=True)
        )
        looked = statistics.mean(run["looked"] for run in runs)
        rows.append([name, f"{looked:.0%}", f"{perplexity:.2f}", f"{seconds:.2f}", f"{speed:.2f}x"])
    protocol.print_table(
        ["", "blocks looked at", f"perplexity, last {LAST}", "prompt, s", "beside dense"], rows
    )
    content = {"machine": protocol.machine(), "threads": args.threads, "tokens": args.tokens, "runs": found}
    args.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
