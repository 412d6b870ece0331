"""Trains a small Llama (17 million parameters) and its tokenizer from scratch on plain texts, on a CPU.

    python examples/train_small.py OUT wikitext.txt novel.txt.gz --epochs 4

OUT becomes a Hugging Face folder in float32 that every `gossamer` command takes; OUT/training.json says what
loss it reached on held-out text. Interrupted, the same command goes on from the last evaluation.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SEQLEN, BATCH, WARM_UP = 512, 8, 100
SHAPE = {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "num_attention_heads": 8}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 2048}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    return parser.parse_args()


def read(path: Path) -> str:
    data = path.read_bytes()
    return (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")


def tokenizer_of(texts: list[str], out: Path) -> Any:
    """A byte-level BPE tokenizer of the texts, saved in ``out``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if not (out / "tokenizer.json").exists():
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=SHAPE["vocab_size"], special_tokens=["<s>", "</s>"], initial_alphabet=alphabet
        )
        made.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(out)
    return AutoTokenizer.from_pretrained(out)


def windows_of(tokenizer: Any, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Windows ``(n, SEQLEN + 1)`` to train on, and every 50th, held out."""
    ids = [i for text in texts for i in tokenizer(text, add_special_tokens=False, verbose=False).input_ids]
    count = (len(ids) - 1) // SEQLEN
    every = torch.tensor(ids[: count * SEQLEN + 1]).unfold(0, SEQLEN + 1, SEQLEN)
    held = torch.arange(count) % 50 == 49
    return every[~held], every[held]


def loss_of(model: Any, windows: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(windows[:, :-1], use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: Any, windows: Tensor) -> float:
    model.eval()
    losses = [float(loss_of(model, batch)) * len(batch) for batch in windows.split(BATCH)]
    model.train()
    return sum(losses) / len(windows)


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    args = parse()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    texts = [read(path) for path in args.texts]
    tokenizer = tokenizer_of(texts, args.out)
    windows, held = windows_of(tokenizer, texts)
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPE, tie_word_embeddings=True, bos_token_id=0, eos_token_id=1)
    model: Any = LlamaForCausalLM(config)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95))
    each = len(windows) // BATCH
    steps = args.epochs * each
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / WARM_UP, 0.05 + 0.475 * (1 + math.cos(math.pi * i / steps)))
    )
    state, log = args.out / "training.pt", []
    begin = 0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        schedule.load_state_dict(saved["schedule"])
        begin, log = saved["step"], saved["log"]
    size = sum(p.numel() for p in model.parameters())
    print(
        f"{size:,} parameters, {windows[:, 1:].numel():,} tokens an epoch, {held[:, 1:].numel():,} held out"
    )
    clock = time.perf_counter()
    for step in range(begin, steps):
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(step // each))
        batch = windows[order[step % each * BATCH :][:BATCH]]
        loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % 100 == 0 or done == steps:
            speed = (done - begin) * BATCH * SEQLEN / (time.perf_counter() - clock)
            log.append(
                {"step": done, "loss": round(loss.item(), 4), "held_out": round(evaluate(model, held), 4)}
            )
            print(f"step {done} of {steps}: {log[-1]}, {speed:.0f} tokens/s", flush=True)
            saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            saved |= {"schedule": schedule.state_dict(), "step": done, "log": log}
            torch.save(saved, state.with_suffix(".tmp"))
            state.with_suffix(".tmp").replace(state)
    model.save_pretrained(args.out)
    facts = {"parameters": size, "tokens": steps * BATCH * SEQLEN, "epochs": args.epochs, "log": log}
    facts["texts"] = [path.name for path in args.texts]
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    state.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
