"""Quantizes a GGUF model with llama.cpp, and measures perplexity, bits and tokens a second by our protocol.

Run it in an environment of its own: `pip install llama-cpp-python gguf transformers torch` (build flags: see
benchmarks/README.md). The source is expanded to float32 first, so all variants come from the same weights.
`QUANT` leaves the tied head as llama.cpp chooses it; `QUANT+TYPE` sets it: `Q4_0+q4_0`.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import protocol
from benchmarks.llamacpp_files import quantize

DEFAULT_VARIANTS = "BF16,Q8_0,Q4_1,Q4_0,Q4_0+q4_0,Q4_K_M,Q3_K_M,Q2_K"
LINEARS = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
DEPTH, DECODED = 512, 64


def parse() -> argparse.Namespace:
    parser = protocol.parser("rival_llamacpp", __doc__)
    protocol.add_model_arguments(parser)
    parser.add_argument(
        "--gguf", required=True, type=Path, metavar="FILE", help="source model, any GGUF type"
    )
    parser.add_argument(
        "--work", required=True, type=Path, metavar="DIR", help="where quantized files are kept"
    )
    parser.add_argument(
        "--variants", default=DEFAULT_VARIANTS, metavar="A,B", help=f"default {DEFAULT_VARIANTS}"
    )
    parser.add_argument(
        "--eval-windows", type=int, default=protocol.EVAL_WINDOWS, help="0 skips perplexity (default 20)"
    )
    parser.add_argument(
        "--speed",
        type=int,
        default=0,
        metavar="RUNS",
        help="time prompt and decode, median of RUNS (default: no)",
    )
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "llamacpp.json", metavar="FILE")
    return parser.parse_args()


def sizes(path: Path) -> dict[str, Any]:
    """Bits a weight of the blocks' linears, of all tensors, of the file with its tokenizer; types."""
    from gguf import GGUFReader

    bits: dict[str, int] = {}
    weights: dict[str, int] = {}
    types: dict[str, set[str]] = {}
    for tensor in GGUFReader(path).tensors:
        part = tensor.name.split(".")[2] if tensor.name.startswith("blk.") else tensor.name
        kind = "linears" if part in LINEARS else "rest"
        bits[kind] = bits.get(kind, 0) + 8 * int(tensor.n_bytes)
        weights[kind] = weights.get(kind, 0) + int(tensor.n_elements)
        types.setdefault("head" if "token_embd" in part or part.startswith("output.") else kind, set()).add(
            tensor.tensor_type.name
        )
    size = path.stat().st_size
    return {
        "bits_linears": round(bits["linears"] / weights["linears"], 3),
        "bits_all_in": round(sum(bits.values()) / sum(weights.values()), 3),
        "bits_file": round(8 * size / sum(weights.values()), 3),
        "file_bytes": size,
        "types_linears": sorted(types["linears"]),
        "types_head": sorted(types["head"]),
    }


def load(path: Path, threads: int, context: int, all_logits: bool) -> Any:
    import llama_cpp

    return llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=DEPTH,
        n_threads=threads,
        n_threads_batch=threads,
        logits_all=all_logits,
        verbose=False,
    )


def perplexity(path: Path, windows: np.ndarray, threads: int) -> float:
    """exp of the mean negative log likelihood, windows int [count, seqlen], no begin token."""
    model = load(path, threads, windows.shape[1], all_logits=True)
    total = 0.0
    for ids in windows:
        model.reset()
        model.eval(ids.tolist())
        logits = model.scores[: len(ids) - 1]
        top = logits.max(axis=1)
        for start in range(0, len(logits), 256):  # a few rows at a time: the whole is 400 MB
            part = logits[start : start + 256] - top[start : start + 256, None]
            log_sum = np.log(np.exp(part).sum(axis=1, dtype=np.float64))
            target = ids[start + 1 : start + 1 + len(part)]
            total += float((log_sum - part[np.arange(len(part)), target]).sum())
    model.close()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def speed(path: Path, ids: np.ndarray, threads: int, runs: int) -> dict[str, float]:
    """Tokens a second: a prompt of 512, and 64 greedy tokens decoded after it; medians, one warm-up."""
    model = load(path, threads, DEPTH + DECODED, all_logits=False)
    prompt, decode = [], []
    for _ in range(runs + 1):
        model.reset()
        start = time.perf_counter()
        model.eval(ids[:DEPTH].tolist())
        prompt.append(DEPTH / (time.perf_counter() - start))
        start = time.perf_counter()
        for _ in range(DECODED):
            model.eval([int(np.argmax(model._scores[-1]))])
        decode.append(DECODED / (time.perf_counter() - start))
    model.close()
    return {
        "prompt_tokens_per_s": round(statistics.median(prompt[1:]), 1),
        "decode_tokens_per_s": round(statistics.median(decode[1:]), 1),
    }


def main() -> None:
    args = parse()
    protocol.set_threads(args.threads)
    import llama_cpp

    tokenizer = protocol.load_tokenizer(args.model)
    windows = protocol.measured_windows(tokenizer, args.data, max(args.eval_windows, 1)).numpy()
    args.work.mkdir(parents=True, exist_ok=True)
    source = quantize(args.gguf, args.work / "F32.gguf", "F32", args.threads)
    rows = []
    for variant in args.variants.split(","):
        path = quantize(source, args.work / f"{variant}.gguf", variant, args.threads)
        figures: dict[str, Any] = sizes(path)
        if args.eval_windows:
            figures["perplexity"] = round(perplexity(path, windows, args.threads), 4)
            figures["eval_windows"] = args.eval_windows
        if args.speed:
            figures |= speed(path, windows[0], args.threads, args.speed)
            figures["speed_threads"] = args.threads
            figures["load_average"] = round(os.getloadavg()[0], 2)
        keys = ("bits_linears", "bits_all_in", "perplexity", "prompt_tokens_per_s", "decode_tokens_per_s")
        rows.append([variant, "/".join(figures["types_head"]), *(figures.get(key) for key in keys)])
        print(variant, figures, flush=True)
        old = protocol.read_json(args.out).get("runs", {}).get(variant, {})
        protocol.update_json(
            args.out,
            {
                "runs": {variant: {**old, **figures}},
                "command": "python -m benchmarks.rival_llamacpp --model DIR --gguf FILE --work DIR",
                "settings": {
                    "depth": DEPTH,
                    "decoded": DECODED,
                    "cache": "float16",
                    "source": "float32 GGUF",
                },
                "llama_cpp_python": llama_cpp.__version__,
                "machine": protocol.machine(),
            },
        )
    print()
    head = [
        "variant",
        "head",
        "bits (linears)",
        "bits (all in)",
        "perplexity",
        "prompt tok/s",
        "decode tok/s",
    ]
    protocol.print_table(head, rows)


if __name__ == "__main__":
    main()
