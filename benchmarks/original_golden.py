"""Writes small files of the original code's numbers for the tests (the format: tests/golden/README.md)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

from benchmarks.original_code import Originals, Result
from benchmarks.original_model import block_inputs, feed, linears

OUT, IN, TOKENS = 48, 192, 2000
DEAD_INPUT = 5
SAMPLED_ROWS = 32
FULL_MASKS = ("self_attn.k_proj", "self_attn.v_proj")

Run = Callable[[Originals, Any], Result]
Collect = Callable[[Originals, nn.Linear], Any]


def _cases(bits: int = 4) -> dict[str, tuple[Collect, Run]]:
    """What is asked of the originals, by name; prune counts are of pruned weights, which 2:4 makes equal."""
    half, two_four = 0.5, (2, 4)
    return {
        "wanda_50_row": (Originals.wanda_collector, lambda o, c: o.prune_wanda(c, half)),
        "wanda_2_4": (Originals.wanda_collector, lambda o, c: o.prune_wanda(c, half, two_four)),
        "sparsegpt_50": (Originals.sparsegpt_collector, lambda o, c: o.prune_sparsegpt(c, half)),
        "sparsegpt_2_4": (Originals.sparsegpt_collector, lambda o, c: o.prune_sparsegpt(c, half, two_four)),
        "joint_50_int4_asym": (
            lambda o, layer: o.joint_collector(layer, bits, False),
            lambda o, c: o.prune_joint(c, half),
        ),
        "joint_50_int4_sym": (
            lambda o, layer: o.joint_collector(layer, bits, True),
            lambda o, c: o.prune_joint(c, half),
        ),
        "gptq_int4_g64_asym": (
            lambda o, layer: o.gptq_collector(layer, bits, False),
            lambda o, c: o.quantize_gptq(c, 64),
        ),
        "gptq_int4_g64_sym": (
            lambda o, layer: o.gptq_collector(layer, bits, True),
            lambda o, c: o.quantize_gptq(c, 64),
        ),
        "gptq_int4_g64_sym_block64": (
            lambda o, layer: o.gptq_collector(layer, bits, True),
            lambda o, c: o.quantize_gptq(c, 64, block=64),
        ),
    }


def pack_mask(mask: torch.Tensor) -> torch.Tensor:
    """uint8 [rows, ceil(columns / 8)]; bit j % 8 of byte j // 8 is column j, 1 = kept."""
    return torch.from_numpy(np.packbits(mask.numpy(), axis=1, bitorder="little"))


def relative_error(weight: torch.Tensor, changed: torch.Tensor, gram: torch.Tensor) -> float:
    """||(W - W') X||² / ||W X||², from gram = X Xᵀ [in, in], in float64."""
    W, D, G = weight.double(), weight.double() - changed.double(), gram.double()
    return (((D @ G) * D).sum() / ((W @ G) * W).sum()).item()


def synthetic_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight float16 [48, 192] and correlated activations int8 [2000, 192]: their Gram matrix is exact."""
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(OUT, IN, generator=generator) * 0.05).to(torch.float16)
    latent = torch.randn(TOKENS, IN // 4, generator=generator)
    mixing = torch.randn(IN // 4, IN, generator=generator) / (IN // 4) ** 0.5
    spread = torch.exp(0.7 * torch.randn(IN, generator=generator))
    x = (latent @ mixing + 0.5 * torch.randn(TOKENS, IN, generator=generator)) * spread * 8
    return weight, x.round().clamp(-127, 127).to(torch.int8)


def _layer(weight: torch.Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = weight.float().clone()
    return layer


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()


@torch.no_grad()
def synthetic(originals: Originals, folder: Path) -> list[list[Any]]:
    """synthetic.safetensors and synthetic.json: every case on the made-up layer, whole."""
    weight, x = synthetic_inputs()
    gram = (x.double().T @ x.double()).round().to(torch.int32)
    rows, columns = torch.triu_indices(IN, IN)
    tensors = {"weight": weight, "gram_upper": gram[rows, columns].contiguous()}
    cases: dict[str, Any] = {}

    def run(name: str, collect: Collect, decide: Run, inputs: torch.Tensor, G: torch.Tensor) -> None:
        layer = _layer(weight)
        collector = collect(originals, layer)
        collector.add_batch(inputs[None].float(), torch.empty(0))
        result = decide(originals, collector)
        if not bool(result.mask.all()):
            tensors[f"{name}.mask"] = pack_mask(result.mask)
        if result.codes is not None and result.scales is not None and result.zeros is not None:
            tensors[f"{name}.codes"] = result.codes.contiguous()
            step = 64 if name.startswith("gptq") else IN
            tensors[f"{name}.scales"] = result.scales[:, ::step].contiguous()
            tensors[f"{name}.zeros"] = result.zeros[:, ::step].to(torch.uint8).contiguous()
        elif name.startswith("sparsegpt"):
            tensors[f"{name}.weight"] = result.weight.to(torch.float16).contiguous()
        cases[name] = {
            "kept": int(result.mask.sum()),
            "relative_error": relative_error(weight, result.weight, G),
        }

    for name, (collect, decide) in _cases().items():
        run(name, collect, decide, x, gram)
    dead, dead_gram = x.clone(), gram.clone()
    dead[:, DEAD_INPUT] = 0
    dead_gram[DEAD_INPUT] = dead_gram[:, DEAD_INPUT] = 0
    collect, decide = _cases()["sparsegpt_50"]
    run("sparsegpt_50_dead", collect, decide, dead, dead_gram)

    save_file(tensors, folder / "synthetic.safetensors")
    about = {"shape": [OUT, IN], "tokens": TOKENS, "dead_input": DEAD_INPUT, "cases": cases}
    (folder / "synthetic.json").write_text(json.dumps(about, indent=2) + "\n")
    return [[name, case["kept"], f"{case['relative_error']:.6f}"] for name, case in cases.items()]


@torch.no_grad()
def block0(originals: Originals, model: Any, windows: torch.Tensor, folder: Path) -> list[list[Any]]:
    """block0.safetensors and block0.json: every case on each linear of the first block of a real model.

    Forward in float32, since only that is the same everywhere; how far bfloat16 forward passes alone move the
    original's own masks and errors is noted beside each case.
    """
    block = model.model.layers[0]
    states, arguments = block_inputs(model, windows)
    dense = {name: layer.weight.data.clone() for name, layer in linears(block).items()}
    grams = _grams(block, states, arguments)
    tensors = {"token_ids": windows.to(torch.int32)}
    layers: dict[str, Any] = {
        name: {"shape": list(weight.shape), "sha256": _digest(weight), "cases": {}}
        for name, weight in dense.items()
    }
    table: list[list[Any]] = []
    for case, (collect, decide) in _cases().items():
        results: dict[bool, dict[str, Result]] = {}
        for bf16 in (False, True):
            collectors = {name: collect(originals, layer) for name, layer in linears(block).items()}
            feed(block, collectors, states, arguments, bf16)
            results[bf16] = {name: decide(originals, collector) for name, collector in collectors.items()}
            for name, layer in linears(block).items():
                layer.weight.data = dense[name].clone()
        for name, result in results[False].items():
            step = 1 if name in FULL_MASKS else result.mask.shape[0] // SAMPLED_ROWS
            pruned = not bool(result.mask.all())
            if pruned and not case.endswith("_asym"):
                tensors[f"{name}.{case}.mask"] = pack_mask(result.mask[::step])
            other = results[True][name]
            figures = {
                "kept": int(result.mask.sum()),
                "relative_error": relative_error(dense[name], result.weight, grams[name]),
                "bf16_relative_error": relative_error(dense[name], other.weight, grams[name]),
                "bf16_mask_agreement": (result.mask == other.mask).double().mean().item(),
            }
            layers[name]["mask_row_step"] = step
            layers[name]["cases"][case] = figures
            table.append([case, name, *(f"{value:.6g}" for value in figures.values())])
    save_file(tensors, folder / "block0.safetensors")
    about = {"model": "SmolLM2-135M-Instruct", "windows": list(windows.shape), "layers": layers}
    (folder / "block0.json").write_text(json.dumps(about, indent=2) + "\n")
    return table


def _grams(
    block: nn.Module, states: list[torch.Tensor], arguments: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Sum of x xᵀ over all tokens of each linear's inputs, float64."""

    class Sum:
        def __init__(self, layer: nn.Linear) -> None:
            self.gram = torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64)

        def add_batch(self, x: torch.Tensor, _output: torch.Tensor) -> None:
            x = x.reshape(-1, x.shape[-1]).double()
            self.gram += x.T @ x

    sums = {name: Sum(layer) for name, layer in linears(block).items()}
    feed(block, sums, states, arguments, bf16=False)
    return {name: total.gram for name, total in sums.items()}
