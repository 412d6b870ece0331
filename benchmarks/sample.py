"""Text drawn from a model for self-data distillation: one document at a time and several side by side, by
transformers' `generate` and by the native decoder.

Every contender draws as many tokens after the same prompts, which are equally long so that transformers needs
no padding; no token ends a document.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import protocol
from gossamer.bench.machine import OtherWork
from gossamer.models.generate import Prompt, generate_each
from gossamer.models.sampling import Sampling
from gossamer.recipes.load import LoadedModel, load

Draw = Callable[[], int]  # draws all documents, and says how many tokens these are


def parse() -> argparse.Namespace:
    parser = protocol.parser("sample", __doc__)
    protocol.add_model_arguments(parser)
    parser.add_argument("--checkpoint", metavar="[NAME=]DIR", help="a Gossamer checkpoint beside it")
    parser.add_argument("--documents", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=32, help="tokens (default 32)")
    parser.add_argument("--decode", type=int, default=64, help="tokens (default 64)")
    parser.add_argument("--together", default="1,4,8,16", metavar="A,B")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "sample.json")
    return parser.parse_args()


def in_transformers(model: Any, prompts: list[list[int]], count: int, together: int) -> int:
    drawn = 0
    for start in range(0, len(prompts), together):
        ids = torch.tensor(prompts[start : start + together])
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=count,
            min_new_tokens=count,
            do_sample=True,
            top_k=0,
            pad_token_id=0,
        )
        drawn += out.numel() - ids.numel()
    return drawn


def natively(loaded: LoadedModel, prompts: list[list[int]], count: int, together: int) -> int:
    asked = [Prompt(ids, Sampling(temperature=1.0, seed=i)) for i, ids in enumerate(prompts)]
    answers = generate_each(loaded.model, asked, count, start=loaded.session, together=together)
    return sum(len(written.tokens) for written in answers)


def main() -> None:
    args = parse()
    model, widths = str(protocol.model_folder(args.model)), list(map(int, args.together.split(",")))
    data = str(protocol.data_folder(args.data))
    ids = protocol.measured_windows(protocol.load_tokenizer(model), data, protocol.EVAL_WINDOWS).flatten()
    starts = range(0, len(ids), args.prompt)
    prompts = [ids[i : i + args.prompt].tolist() for i in starts][: args.documents]
    if len(prompts) < args.documents or len(prompts[-1]) < args.prompt:
        raise SystemExit(f"the text has {len(ids)} tokens: too few for so many prompts of {args.prompt}")
    protocol.set_threads(args.threads)
    # rounded to bfloat16 for both; transformers multiplies that in the dtype that is faster here
    dense = load(model, dtype="fast", engine="transformers").model
    loaded = {"dense bf16": load(model, dtype="fast", engine="native")}
    if args.checkpoint:
        name, equals, path = args.checkpoint.partition("=")
        path = path if equals else name
        loaded[name if equals else Path(path).name] = load(path, engine="native")
    contenders: dict[str, Draw] = {}
    for width in widths:
        contenders[f"transformers, {width}"] = partial(in_transformers, dense, prompts, args.decode, width)
    for name, one in loaded.items():
        for width in widths:
            contenders[f"{name}, {width}"] = partial(natively, one, prompts, args.decode, width)
    others, seconds = OtherWork(), {name: list[float]() for name in contenders}
    for _ in range(args.repeats):
        for name, draw in contenders.items():
            start = time.perf_counter()
            drawn = draw()
            seconds[name].append(time.perf_counter() - start)
            assert drawn == args.documents * args.decode, (name, drawn)
    speeds = {name: args.documents * args.decode / statistics.median(s) for name, s in seconds.items()}
    first = next(iter(speeds.values()))
    content = {
        "tokens_per_second": {name: round(speed, 2) for name, speed in speeds.items()},
        "documents": args.documents,
        "prompt": args.prompt,
        "decode": args.decode,
        "threads": args.threads,
        "repeats": args.repeats,
        "other_work": round(others.cores(), 3),
        "machine": protocol.machine(),
    }
    protocol.update_json(args.out, content)
    rows = [[name, f"{speed:,.1f}", f"{speed / first:.2f}x"] for name, speed in speeds.items()]
    protocol.print_table(["contender, side by side", "tokens/s", "ratio"], rows)


if __name__ == "__main__":
    main()
