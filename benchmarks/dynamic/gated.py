"""What the parts on activation sparsity share: gates of every choice, kept between runs; packed models."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import protocol
from gossamer.dynamic.activations import Gates, calibrate, greedy, linear_sites, method, settle
from gossamer.engine import Decoder
from gossamer.matrices import Packed
from gossamer.models.checkpoint import load_checkpoint
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module
from gossamer.recipes.gate import past_break_even
from gossamer.sparse import mask_from_scores, parse_pattern

METHODS = ("teal", "wina", "chess", "topk")
ALLOCATIONS = ("uniform", "greedy")
LEVELS = (0.15, 0.25, 0.4, 0.5, 0.6)
VALUES = ("bfloat16", "int8", "int4")


def add_gate_arguments(parser: Any) -> None:
    """Options of both parts: which gates, and how they are calibrated."""
    protocol.add_model_arguments(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--allocations", nargs="+", default=list(ALLOCATIONS), choices=ALLOCATIONS)
    parser.add_argument("--windows", type=int, default=4, help="calibration windows of 1,024 (default 4)")
    parser.add_argument(
        "--greedy-tokens", type=int, default=256, help="of the first window, for the greedy search"
    )
    parser.add_argument("--work", type=Path, default=Path("dynamic.work"), help="where gates are kept")


def all_gates(args: Any, levels: list[float]) -> Iterator[tuple[str, str, float, Gates]]:
    """Method, allocation, level and gates, calibrated on the dense model in float32, and kept under
    ``--work``. A level is the share of the bytes of all linear layers in the blocks that is skipped: a method
    that leaves some of them dense drops more at the others."""
    model: Any = None
    for name in args.methods:
        calibrated: Any = None
        for allocation in args.allocations:
            found: dict[str, float] | None = None  # the last, smaller level's shares
            for level in sorted(levels):
                folder = args.work / f"{name}-{allocation}-{round(100 * level)}-{args.windows}"
                if (folder / "activations.json").exists():
                    gates = Gates.load(folder)
                    found = {site: gate.sparsity for site, gate in gates.gates.items()}
                    yield name, allocation, level, gates
                    continue
                if calibrated is None:
                    model = protocol.load_model(args.model) if model is None else model
                    tokenizer = protocol.load_tokenizer(args.model)
                    text = protocol.calibration_windows(tokenizer, args.data, args.windows)
                    calibrated = calibrate(model, method(name), text)
                    total = sum(site.bytes for site in linear_sites(model).values())
                    share = total / sum(site.bytes for site in calibrated.sites.values())
                if level * share > 0.98:
                    print(f"{name} cannot skip {level:.0%} of all bytes: it leaves too much dense")
                    continue
                shares: Any = level * share
                if allocation == "greedy":
                    found = greedy(
                        model, calibrated, level * share, text[:1, : args.greedy_tokens], start=found
                    )
                    shares = found
                gates = settle(model, calibrated.gates(shares), text)
                folder.mkdir(parents=True, exist_ok=True)
                gates.save(folder)
                print(f"calibrated {key_of(name, allocation, level)}", flush=True)
                yield name, allocation, level, gates


def key_of(name: str, allocation: str, level: float) -> str:
    """The name of one choice of gates in result files."""
    return f"{name} {allocation} {100 * level:.0f} %"


def packed_model(model_dir: str, values: str) -> Any:
    """The model with its blocks' linear layers dense in ``values`` (``int4 32:64``: pruned by magnitude, laid
    out so), embedding and head in int8, or bfloat16 beside it. A folder of a checkpoint: that checkpoint."""
    if Path(values).is_dir():
        return load_checkpoint(Path(values))
    model = protocol.load_model(model_dir, "bfloat16")
    number, _, pattern = values.partition(" ")
    embedding = model.get_input_embeddings()
    edges = "bfloat16" if number == "bfloat16" else "int8"
    rows = Packed.pack(embedding.weight.detach().float(), edges, "dense")
    tied = model.lm_head.weight is embedding.weight
    for name, module in linears(model).items():
        weight = module.weight.detach().float()
        mask = mask_from_scores(weight.abs(), parse_pattern(pattern)) if pattern else None
        matrix = Packed.pack(weight, number, pattern or "dense", mask=mask)
        replace_module(model, name, StructuredLinear(matrix, module.bias))
    head = rows if tied else Packed.pack(model.lm_head.weight.detach().float(), edges, "dense")
    replace_module(model, "lm_head", StructuredLinear(head, model.lm_head.bias))
    replace_module(model, "model.embed_tokens", StructuredEmbedding.from_embedding(embedding, rows))
    return model


def linears(model: nn.Module) -> dict[str, Any]:
    """The linear layers of the blocks, by their full names."""
    return {name: site.module for name, site in linear_sites(model).items()}


class Layouts:
    """One packed model, each weight of whose blocks lies as it was, or as columns: decoders over any mixture
    share both forms."""

    def __init__(self, model: Any, repack: Callable[[Packed], Packed] | None = None) -> None:
        self.model = model
        self.modules = linears(model)
        self.repack = repack or (lambda packed: packed.repack("columns"))
        self.dense: Mapping[str, Packed] = {name: m.matrix for name, m in self.modules.items()}
        self.columns: dict[str, Packed] = {}

    def decoder(self, gates: Gates | None = None, columns: bool | None = None) -> Decoder:
        """A decoder with ``gates``; ``columns``: all weights, none (False), or those that it pays for."""
        wanted = set(self.modules) if columns else set()
        if columns is None and gates is not None:
            wanted = past_break_even(gates)
        for name, module in self.modules.items():
            if name in wanted and name not in self.columns:
                self.columns[name] = self.repack(self.dense[name])
            module.matrix = self.columns[name] if name in wanted else self.dense[name]
        made = Decoder(self.model, None if gates is None else gates.gates)
        for name, module in self.modules.items():
            module.matrix = self.dense[name]
        return made


def skipped(decoder: Decoder, modules: Mapping[str, Any]) -> float:
    """The share of the linear layers' bytes in the blocks that met dropped activations only, so far, in this
    decoder (an activated gate's: those of the down projection alone, whose columns are not read)."""
    achieved = decoder.achieved()
    sizes = {name: module.matrix.bits_per_weight * module.matrix.shape[0] * module.matrix.shape[1] / 8
             for name, module in modules.items()}  # fmt: skip
    shares = {name.replace("act_fn", "down_proj"): share for name, share in achieved.items()}
    return sum(share * sizes[name] for name, share in shares.items()) / sum(sizes.values())


def log_probabilities(logits: Tensor) -> Tensor:
    """Float32 log-probabilities, in place of the logits."""
    return torch.sub(logits, logits.logsumexp(-1, keepdim=True), out=logits)
