"""Activation sparsity at run time: tokens a second of our decoder after 512 tokens, beside our dense layouts.

SmolLM2 with the gates of the part `quality` (calibrated on text, kept under `--work`), and random weights of
the shape of Llama-3.2-1B at an imposed sparsity: at every linear layer the same random share of inputs is
dropped from each token. Layers whose gate drops past the break-even of `columns` lie so, all others dense.
`int4 32:64` are weights pruned by magnitude: gated, their columns hold the pruned ones as zeros. All
contenders of one cell live in one process; a round is `--steps` tokens of each in turn, from the same 512
tokens on, in an order that shifts by one. Ratios are medians of the rounds' ratios to the dense layout of the
same values. Cells that a result file holds are not measured again (`--again`). Rivals: `benchmarks.decode`.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import protocol
from benchmarks.activation_sparse import weight
from benchmarks.decode_files import folder_of
from benchmarks.decode_protocol import SUBJECTS, prompt_ids
from benchmarks.dynamic.gated import (
    VALUES,
    Layouts,
    add_gate_arguments,
    all_gates,
    key_of,
    linears,
    packed_model,
    skipped,
)
from gossamer.dynamic.activations import Gate, Gates
from gossamer.engine import Decoder, NativeSession
from gossamer.matrices import Packed
from gossamer.models.skeleton import empty_model
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module

PROMPT = 512
SMALL, LARGE = "SmolLM2-135M", "Llama-3.2-1B"
SPARSE = "int4 32:64"
HEAD = ["", "skipped", "in columns", "prompt, tokens/s", "tokens/s", "beside dense"]


def parse() -> argparse.Namespace:
    parser = protocol.parser("dynamic speed", __doc__)
    add_gate_arguments(parser)
    parser.add_argument("--levels", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6])
    parser.add_argument("--imposed", nargs="+", type=float, default=[0.25, 0.4, 0.5, 0.6, 0.75, 0.9])
    parser.add_argument("--subjects", nargs="+", default=[SMALL, LARGE], choices=[SMALL, LARGE])
    parser.add_argument("--values", nargs="+", default=list(VALUES), choices=VALUES)
    parser.add_argument("--steps", type=int, default=16, help="tokens of a turn (default 16)")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--again", action="store_true", help="measure cells that are there already")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_speed.json", metavar="FILE")
    return parser.parse_args()


@dataclass
class Contender:
    """One decoder, a sequence of PROMPT tokens in it, and what it took."""

    decoder: Decoder
    modules: dict[str, Any]
    columns: float
    prompt_seconds: float = 0.0
    step_seconds: list[float] = field(default_factory=list)

    def begin(self, vocabulary: int) -> None:
        self.session = NativeSession(self.decoder)
        ids = torch.tensor(prompt_ids(PROMPT, vocabulary))
        start = time.perf_counter()
        self.token = int(self.session.prompt(ids).argmax())
        self.prompt_seconds = time.perf_counter() - start

    def turn(self, steps: int) -> None:
        """``steps`` tokens after the prompt; the median is a round's figure."""
        self.session.truncate(PROMPT)
        token, times = self.token, []
        for _ in range(steps + 1):  # the first wakes threads
            start = time.perf_counter()
            token = int(self.session.step(token).argmax())
            times.append(time.perf_counter() - start)
        self.step_seconds.append(statistics.median(times[1:]))


def contender(layouts: Layouts, gates: Gates | None = None, columns: bool | None = None) -> Contender:
    decoder = layouts.decoder(gates, columns)
    lying = sum(w.layout == "columns" for part in decoder.weights.values() for w, _ in part)
    return Contender(decoder, layouts.modules, lying / len(layouts.modules))


def small(args: argparse.Namespace, values: str) -> dict[str, Contender]:
    """SmolLM2: the dense layout first."""
    layouts = Layouts(packed_model(args.model, values))
    found = {"dense": contender(layouts), "all in columns, no gates": contender(layouts, columns=True)}
    sparse = Layouts(packed_model(args.model, SPARSE)) if values == "int4" else None
    if sparse:
        found["32:64"] = contender(sparse)
    for name, allocation, level, gates in all_gates(args, args.levels):
        key = key_of(name, allocation, level)
        found[key] = contender(layouts, gates)
        if sparse and (name, allocation) == (args.methods[0], args.allocations[0]):
            found[f"32:64, {key}"] = contender(sparse, gates)
    return found


def large(args: argparse.Namespace, values: str) -> dict[str, Contender]:
    """Random weights of the shape of Llama-3.2-1B: the dense layout first."""
    forms: dict[tuple[tuple[int, int], str], Packed] = {}

    def copy(shape: tuple[int, int], layout: str) -> Packed:
        if (shape, layout) not in forms:
            forms[shape, layout] = weight(shape, values).repack(layout)
        one = forms[shape, layout]
        sections = {name: section.clone() for name, section in one.tensors().items()}
        return Packed(sections, layout=layout, values=values, shape=shape, group=one.group)

    with tempfile.TemporaryDirectory() as folder:
        config = SUBJECTS[LARGE].config
        assert config is not None
        model: Any = empty_model(folder_of(config, Path(folder)))
    for name, module in linears(model).items():
        shape = (module.out_features, module.in_features)
        replace_module(model, name, StructuredLinear(copy(shape, "dense"), module.bias))
    embedding = model.get_input_embeddings()
    rows = weight((embedding.num_embeddings, embedding.embedding_dim), "int8")
    replace_module(model, "lm_head", StructuredLinear(rows, model.lm_head.bias))
    replace_module(model, "model.embed_tokens", StructuredEmbedding.from_embedding(embedding, rows))
    for module in model.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.weight = nn.Parameter(torch.ones(module.weight.shape), requires_grad=False)
    layouts = Layouts(model, lambda packed: copy(packed.shape, "columns"))
    found = {"dense": contender(layouts), "all in columns, no gates": contender(layouts, columns=True)}
    for level in args.imposed:
        found[f"imposed {100 * level:.0f} %"] = contender(layouts, imposed(layouts, level))
    return found


def imposed(layouts: Layouts, level: float) -> Gates:
    """Gates that drop a random share ``level`` of what every linear layer reads, the same of each token."""
    draw = torch.Generator().manual_seed(0)
    gates = {}
    for name, matrix in layouts.dense.items():
        width = matrix.shape[1]
        kept = torch.ones(width)
        kept[torch.randperm(width, generator=draw)[: round(level * width)]] = 0
        gates[name] = Gate(width, level, 0.0, tuple(kept.tolist()))
    return Gates("imposed", gates)


def measure(args: argparse.Namespace, subject: str, values: str) -> dict[str, Any]:
    """One cell: figures of every contender."""
    players = small(args, values) if subject == SMALL else large(args, values)
    for one in players.values():
        one.begin(one.decoder.vocabulary)
    names = list(players)
    for turn in range(args.rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            players[name].turn(args.steps)
    dense = players["dense"].step_seconds
    found = {}
    for name, one in players.items():
        ratios = [a / b for a, b in zip(dense, one.step_seconds, strict=True)]
        found[name] = {
            "tokens_per_second": round(1 / statistics.median(one.step_seconds), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "prompt_tokens_per_second": round(PROMPT / one.prompt_seconds, 1),
            "skipped": round(skipped(one.decoder, one.modules), 4),
            "in_columns": round(one.columns, 3),
        }
    return found


def main() -> None:
    args = parse()
    protocol.data_folder(args.data)
    protocol.set_threads(args.threads)
    facts = {"command": "python -m benchmarks.dynamic speed --model DIR", "machine": protocol.machine()}
    protocol.update_json(args.out, facts)
    for subject in args.subjects:
        for values in args.values:
            key = f"{subject} {values} t{args.threads}"
            if args.again or key not in protocol.read_json(args.out).get("runs", {}):
                protocol.update_json(args.out, {"runs": {key: measure(args, subject, values)}})
            print(f"\n{key}")
            rows = [
                [name, f"{r['skipped']:.1%}", f"{r['in_columns']:.0%}", r["prompt_tokens_per_second"],
                 r["tokens_per_second"], f"{r['ratio']:.2f}x"]
                for name, r in protocol.read_json(args.out)["runs"][key].items()
            ]  # fmt: skip
            protocol.print_table(HEAD, rows)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
