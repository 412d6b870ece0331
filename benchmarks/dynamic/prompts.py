"""Attention policies on long prompts in the native decoder, beside dense attention there and transformers.

Windows of a novel (8,064 tokens each, from its 20,001st token on) go through the model once per contender:
seconds to the first token, and perplexity of the last 1,024 tokens. *torch*: transformers in bfloat16 with
scaled_dot_product_attention. All others run in the decoder, weights and cache in bfloat16. Windows and
contenders interleave, ratios are to dense on the same window. MInference's patterns are searched, and Seer's
gates learned, on another novel. The model of random weights has SmolLM2's shape, 6 layers and a context of
32,768: for time alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import protocol
from benchmarks.dynamic import contenders
from gossamer.dynamic.attention import Policy
from gossamer.engine import Decoder
from gossamer.kernels import isa

LAST = 1024
RANDOM = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
RANDOM |= {"num_hidden_layers": 6, "vocab_size": 1024, "max_position_embeddings": 32768}


def parse() -> argparse.Namespace:
    parser = protocol.parser("dynamic prompts", __doc__)
    protocol.add_model_arguments(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--tokens", type=int, default=8064)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--policies", nargs="+", help=f"of: {', '.join(contenders.NAMES)} (default: all)")
    parser.add_argument(
        "--budgets", type=int, nargs="+", default=[8, 16, 32], help="blocks a block of queries"
    )
    parser.add_argument("--no-torch", action="store_true", help="leave transformers out")
    parser.add_argument(
        "--random", type=int, default=32768, metavar="TOKENS", help="of the model of random weights; 0: leave"
    )
    parser.add_argument("--random-rounds", type=int, default=3)
    parser.add_argument("--random-budget", type=int, default=32)
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_prompts.json")
    return parser.parse_args()


def in_torch(model: Any, ids: Tensor, last: int) -> tuple[dict[str, float], Tensor]:
    """As `contenders.read`, in transformers."""
    head = [0.0, 0.0]
    begun = model.lm_head.register_forward_pre_hook(lambda *_: head.__setitem__(0, time.perf_counter()))
    ended = model.lm_head.register_forward_hook(lambda *_: head.__setitem__(1, time.perf_counter()))
    start = time.perf_counter()
    logits = model(ids[None], use_cache=False, logits_to_keep=last).logits[0]
    seconds = time.perf_counter() - start - (head[1] - head[0])
    begun.remove()
    ended.remove()
    return {"seconds": seconds, "looked": 1.0}, logits.float()


def measure(model: Any, decoder: Decoder, ids: Tensor, asked: Policy | str | None) -> dict[str, float]:
    """One prompt by one contender (a policy, None: dense, "torch"), and the mean loss of its last tokens."""
    with torch.inference_mode():
        if isinstance(asked, str):
            found, logits = in_torch(model, ids, LAST + 1)
        else:
            found, logits = contenders.read(decoder, ids, asked, LAST + 1)
    return found | {"loss": float(torch.nn.functional.cross_entropy(logits[:-1], ids[-LAST:]))}


def on_novels(args: argparse.Namespace) -> None:
    tokenizer, model = protocol.load_tokenizer(args.model), protocol.load_model(args.model, "bfloat16")
    text = contenders.tokens_of(tokenizer, args.data, contenders.MEASURED)
    windows = text[: args.windows * args.tokens].reshape(-1, args.tokens)
    other = contenders.tokens_of(tokenizer, args.data, contenders.SEARCHED)
    decoder = Decoder(model)
    asked: dict[str, Policy | str | None] = {} if args.no_torch else {"torch": "torch"}
    asked["dense"] = None
    for budget in args.budgets:
        for name in contenders.chosen(args.policies):
            some = contenders.policy(name, budget, args.tokens, model, other)
            asked[f"{name}, {budget} blocks"] = some
    measure(model, decoder, windows[0][:2048], None)  # warm
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    for ids in windows:
        for name, one in asked.items():
            found[name].append(measure(model, decoder, ids, one))
            print(json.dumps({name: found[name][-1]}), flush=True)
    table(found, perplexity=True)
    protocol.update_json(
        args.out,
        {
            "machine": protocol.machine(),
            "setting": {"isa": isa(), "threads": args.threads, "tokens": args.tokens},
            "runs": found,
        },
    )


def on_random_weights(args: argparse.Namespace) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **RANDOM), dtype=torch.bfloat16)
    decoder, ids = Decoder(model.eval()), torch.randint(0, RANDOM["vocab_size"], (args.random,))
    asked: dict[str, Policy | None] = {"dense": None}
    for name in contenders.chosen(args.policies):
        if name == "seer":  # there is nothing to learn from, and it takes the time of block_topk
            continue
        asked[f"{name}, {args.random_budget} blocks"] = contenders.policy(
            name, args.random_budget, args.random
        )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in asked}
    for _ in range(args.random_rounds):
        for name, one in asked.items():
            found[name].append(contenders.read(decoder, ids, one)[0])
            print(json.dumps({name: found[name][-1]}), flush=True)
    print(f"random weights, {args.random:,} tokens, {RANDOM['num_hidden_layers']} layers")
    table(found, perplexity=False)
    protocol.update_json(args.out, {"random_runs": found, "random_shape": RANDOM | {"tokens": args.random}})


def table(found: dict[str, list[dict[str, float]]], perplexity: bool) -> None:
    rows = []
    for name, runs in found.items():
        pairs = list(zip(found["dense"], runs, strict=True))
        row = [name, f"{statistics.mean(run['looked'] for run in runs):.0%}"]
        if perplexity:
            row.append(f"{math.exp(statistics.mean(run['loss'] for run in runs)):.3f}")
        row += [
            f"{statistics.median(run['seconds'] for run in runs):.2f}",
            f"{statistics.median(one['seconds'] / run['seconds'] for one, run in pairs):.2f}x",
        ]
        of_attention = [one["attention"] / run["attention"] for one, run in pairs if "attention" in run]
        row.append(f"{statistics.median(of_attention):.2f}x" if of_attention else "")
        rows.append(row)
    head = ["", "blocks looked at", *([f"perplexity, last {LAST}"] if perplexity else [])]
    protocol.print_table([*head, "prompt, s", "beside dense", "attention alone"], rows)


def main() -> None:
    args = parse()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    protocol.set_threads(args.threads)
    contenders.chosen(args.policies)
    if args.windows:
        on_novels(args)
    if args.random:
        on_random_weights(args)


if __name__ == "__main__":
    main()
