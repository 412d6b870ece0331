"""Bases of low-rank keys: found on the text itself, on its beginning, on another one, or by heads.

A window of a novel (8,064 tokens, from its 20,001st on) goes through the model twice: as it is, and with all
keys before rotation put onto ``rank`` directions of their layer, of which the numbers of one token's keys in
all heads have kv_heads x head_dim. *lost*: the share of the keys' squares, the mean of layers; KL a token of
the last 256 to the model as it is. Bases by heads have rank / kv_heads directions each. Nothing is timed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import kl_div

from benchmarks import protocol
from benchmarks.dynamic.contenders import MEASURED, SEARCHED, tokens_of

FIRST = 1024
LAST = 256


class Keys:
    """What the key projections give, remembered, and replaced where there are projections for them."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.found: list[Tensor] = []
        self.onto: list[Tensor] = []
        for number, layer in enumerate(model.model.layers):
            layer.self_attn.k_proj.register_forward_hook(self._hook(number))

    def _hook(self, number: int) -> Any:
        def hook(module: Any, inputs: Any, out: Tensor) -> Tensor | None:
            if self.onto:
                return (out.float() @ self.onto[number]).to(out.dtype)
            self.found.append(out[0].float())
            return None

        return hook

    def read(self, ids: Tensor, onto: list[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """Log-probabilities of the last tokens, and keys by layers."""
        self.found, self.onto = [], onto or []
        hidden = self.model.model(ids[None], use_cache=False).last_hidden_state[:, -LAST:]
        return self.model.lm_head(hidden).float().log_softmax(-1)[0], self.found


def directions(keys: Tensor, rank: int, heads: int) -> Tensor:
    """The projection of ``keys (n, heads x dim)`` onto the ``rank`` best directions of each head's part."""
    parts = []
    for part in keys.chunk(heads, -1):
        best = torch.linalg.eigh(part.mT @ part).eigenvectors[:, -rank:]
        parts.append(best @ best.mT)
    return torch.block_diag(*parts)


def main() -> None:
    parser = protocol.parser("dynamic bases", __doc__)
    protocol.add_model_arguments(parser)
    parser.add_argument("--tokens", type=int, default=8064)
    parser.add_argument("--ranks", type=int, nargs="+", default=[48, 96, 144])
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_bases.json")
    measure(parser.parse_args())


@torch.no_grad()
def measure(args: argparse.Namespace) -> None:
    protocol.set_threads(args.threads)
    tokenizer, model = protocol.load_tokenizer(args.model), protocol.load_model(args.model, "bfloat16")
    keys, heads = Keys(model), model.config.num_key_value_heads
    text, other = (tokens_of(tokenizer, args.data, name)[: args.tokens] for name in (MEASURED, SEARCHED))
    _, others = keys.read(other)
    want, own = keys.read(text)
    sources = {
        "the text itself": (own, 1),
        f"its first {FIRST:,} tokens": ([one[:FIRST] for one in own], 1),
        "another novel": (others, 1),
        "the text itself, by heads": (own, heads),
    }
    rows, runs = [], {}
    for rank in args.ranks:
        for name, (source, parts) in sources.items():
            onto = [directions(one, rank // parts, parts) for one in source]
            pairs = list(zip(own, onto, strict=True))
            lost = sum(float((k - k @ p).square().sum() / k.square().sum()) for k, p in pairs) / len(pairs)
            got, _ = keys.read(text, onto)
            kl = kl_div(got, want, log_target=True, reduction="sum").item() / LAST
            runs[f"{rank}, {name}"] = {"lost": lost, "kl": kl}
            rows.append([str(rank), name, f"{100 * lost:.2f}%", f"{kl:.3f}"])
            print(rows[-1], flush=True)
    protocol.print_table(["rank", "found on", "lost", "KL"], rows)
    command = "python -m benchmarks.dynamic bases --model DIR"
    protocol.update_json(args.out, {"command": command, "tokens": args.tokens, "runs": runs})


if __name__ == "__main__":
    main()
