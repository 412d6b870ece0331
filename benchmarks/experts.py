"""A mixture of experts: dense in transformers and in the native decoder, beside its checkpoints, of which
each expert is a pair of packed layers.

Random weights of a small Qwen3-MoE (8 blocks of 32 experts of 512, 4 a token), compressed by magnitude:
speeds and bytes, no quality.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import protocol
from benchmarks.compress import told_by_gossamer
from gossamer.recipes.describe import weight_bytes
from gossamer.recipes.load import load
from gossamer.recipes.measure import speed

SHAPE = {
    "hidden_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 8, "num_attention_heads": 16,
    "num_key_value_heads": 4, "head_dim": 64, "num_experts": 32, "num_experts_per_tok": 4,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
CONTENDERS = {"int4": ["--sparsity", "0"], "32:64 int4": ["--pattern", "32:64"]}


def parse() -> argparse.Namespace:
    parser = protocol.parser("experts", __doc__)
    parser.add_argument("--tokenizer", required=True, metavar="DIR", help="a model whose tokenizer is taken")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=128, help="tokens (default 128)")
    parser.add_argument("--decode", type=int, default=32, help="tokens (default 32)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("experts.work"), help="where models are kept")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "experts.json")
    return parser.parse_args()


def make_dense(folder: Path, tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_moe", vocab_size=len(tokenizer), **SHAPE)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    args = parse()
    dense = args.work / "dense"
    if not dense.exists():
        make_dense(dense, protocol.load_tokenizer(args.tokenizer))
    folders = {"dense": dense, "dense, native": dense}
    folders |= {name: args.work / name.replace(":", "_") for name in CONTENDERS}
    for name, options in CONTENDERS.items():
        if not folders[name].exists():
            words = [str(dense), "-o", str(folders[name]), "--method", "magnitude", *options]
            told_by_gossamer(args.threads, "compress", *words, "--threads", str(args.threads))
    protocol.set_threads(args.threads)
    loaded = []
    for name, folder in folders.items():
        engine: Any = "transformers" if name == "dense" else "native"
        # transformers in the dtype that is faster here; the decoder multiplies what the files hold
        dtype = "fast" if name == "dense" else "auto"
        loaded.append(replace(load(folder, dtype=dtype, engine=engine), label=name))
    told = speed(*loaded, prompt=args.prompt, decode=args.decode, repeats=args.repeats, threads=args.threads)
    document = told.to_dict()
    rows: dict[str, Any] = {}
    for (name, folder), figures in zip(folders.items(), document["contenders"].values(), strict=True):
        rows[name] = {"weight_file_bytes": weight_bytes(folder), **figures}
    content = {"models": rows, "threads": args.threads, "other_work": document["other_work"]}
    protocol.update_json(args.out, {**content, "machine": protocol.machine()})
    table = []
    for name, row in rows.items():
        cells: list[Any] = [name, f"{row['weight_file_bytes'] / 1e6:.0f} MB"]
        for phase in ("prompt", "decode"):
            cells += [f"{row[f'{phase}_tokens_per_second']:,.1f}", f"{row[f'{phase}_ratio']:.2f}x"]
        table.append(cells)
    protocol.print_table(["", "weights", "prompt tok/s", "ratio", "decode tok/s", "ratio"], table)


if __name__ == "__main__":
    main()
