"""Sirius: tokens a second, agreement with dense greedy decoding, and how far a correction advances.

SmolLM2 with gates of the part `quality` (calibrated on text, kept under `--work`). Parts of the measured text
are continued dense, gated without corrections, and by Sirius, in an order that shifts by one. *agreement* is
the share of the tokens up to the first that is not dense's; *same* that of all tokens at their places. The
dense model reads the dense layout, the gated one columns where they pay, so such weights lie in memory twice.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import protocol
from benchmarks.dynamic.gated import VALUES, Layouts, add_gate_arguments, all_gates, key_of, packed_model
from gossamer.dynamic.activations import Gates, Sirius
from gossamer.engine import Decoder, NativeSession

HEAD = ["", "tokens/s", "beside dense", "agreement", "same", "advance"]


def parse() -> argparse.Namespace:
    parser = protocol.parser("dynamic sirius", __doc__)
    add_gate_arguments(parser)
    parser.set_defaults(methods=["teal"], allocations=["uniform"])
    parser.add_argument("--levels", nargs="+", type=float, default=[0.4, 0.6])
    parser.add_argument("--values", default="int4", choices=VALUES)
    parser.add_argument("--periods", nargs="+", type=int, default=[8, 16])
    parser.add_argument("--prompts", type=int, default=8, help="parts of the text (default 8)")
    parser.add_argument("--prompt", type=int, default=256, help="tokens of a prompt (default 256)")
    parser.add_argument("--tokens", type=int, default=128, help="after each prompt (default 128)")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_sirius.json", metavar="FILE")
    return parser.parse_args()


def greedy(decoder: Decoder, ids: list[int], count: int) -> tuple[list[int], float, float]:
    """Tokens, seconds of those after the first, and the advance of one."""
    session = NativeSession(decoder)
    tokens = [int(session.prompt(torch.tensor(ids)).argmax())]
    start = time.perf_counter()
    while len(tokens) < count:
        tokens.append(int(session.step(tokens[-1]).argmax()))
    return tokens, time.perf_counter() - start, 1.0


def corrected(
    dense: Decoder, sparse: Decoder, sirius: Sirius, ids: list[int], count: int
) -> tuple[list[int], float, float]:
    session = Timed(dense)
    made = sirius.generate(session, session.beside(sparse), ids, count)
    return list(made.tokens), time.perf_counter() - session.began, made.mean_advance


class Timed(NativeSession):
    """Knows when its prompt was read."""

    began = 0.0

    def prompt(self, ids: torch.Tensor) -> torch.Tensor:
        logits = super().prompt(ids)
        self.began = time.perf_counter()
        return logits


def contenders(args: argparse.Namespace, dense: Decoder, layouts: Layouts) -> dict[str, Any]:
    """How each continues a prompt, dense first."""
    found: dict[str, Any] = {"dense": lambda ids: greedy(dense, ids, args.tokens)}

    def add(key: str, gates: Gates) -> None:
        sparse = layouts.decoder(gates)
        found[key] = lambda ids: greedy(sparse, ids, args.tokens)
        for period in args.periods:
            sirius = Sirius(period)
            found[f"{key}, Sirius {period}"] = lambda ids, sirius=sirius: corrected(
                dense, sparse, sirius, ids, args.tokens
            )

    for name, allocation, level, gates in all_gates(args, args.levels):
        add(key_of(name, allocation, level), gates)
    return found


def main() -> None:
    args = parse()
    protocol.data_folder(args.data)
    protocol.set_threads(args.threads)
    tokenizer = protocol.load_tokenizer(args.model)
    prompts = protocol.measured_windows(tokenizer, args.data, args.prompts, args.prompt).tolist()
    layouts = Layouts(packed_model(args.model, args.values))
    players = contenders(args, layouts.decoder(), layouts)
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in players}
    for turn, ids in enumerate(prompts):
        wanted, seconds, _ = players["dense"](ids)  # also warms up
        names = list(players)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            tokens, seconds, advance = players[name](ids)
            same = [a == b for a, b in zip(wanted, tokens, strict=True)]
            first = same.index(False) if False in same else len(same)
            runs[name].append(
                {"seconds": seconds, "agreement": first / len(same), "same": statistics.mean(same),
                 "advance": advance}
            )  # fmt: skip
    found, rows = {}, []
    for name, series in runs.items():
        ratio = statistics.median(
            a["seconds"] / b["seconds"] for a, b in zip(runs["dense"], series, strict=True)
        )
        mean = {key: statistics.mean(run[key] for run in series) for key in ("agreement", "same", "advance")}
        speed = (args.tokens - 1) / statistics.median(run["seconds"] for run in series)
        found[name] = {"tokens_per_second": round(speed, 1), "ratio": round(ratio, 3)}
        found[name] |= {key: round(value, 4) for key, value in mean.items()}
        rows.append([name, f"{speed:.1f}", f"{ratio:.2f}x", f"{mean['agreement']:.0%}",
                     f"{mean['same']:.0%}", f"{mean['advance']:.1f}"])  # fmt: skip
    facts = {"command": "python -m benchmarks.dynamic sirius --model DIR", "machine": protocol.machine()}
    protocol.update_json(args.out, {**facts, "runs": {f"{args.values} t{args.threads}": found}})
    protocol.print_table(HEAD, rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
