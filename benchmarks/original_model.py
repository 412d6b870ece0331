"""Prunes a whole decoder with the original layer code: float32 solver, forward passes in the model's dtype.

The walk is the one of the original drivers: the statistics of all linears of a block come from the block as
it was, then all are pruned, then the block runs again to give the next block its inputs. Written anew, since
the original drivers ask for GPUs and for long gone versions of transformers.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.original_code import Originals


@dataclass(frozen=True)
class Config:
    """One row of the comparison; prune = (pruned, of) as the originals count, (0, 0) for unstructured."""

    method: str  # dense, magnitude, wanda, sparsegpt, joint
    sparsity: float = 0.0
    prune: tuple[int, int] = (0, 0)
    windows: int = 0
    bits: int = 16
    elsewhere: float | None = None  # perplexity measured earlier on another machine

    @property
    def repository(self) -> str:
        return {"dense": "", "joint": "IST-DASLab/sparsegpt"}.get(self.method, "locuslab/wanda")


CONFIGS = {
    "dense": Config("dense", elsewhere=20.98),
    "magnitude_50": Config("magnitude", 0.5, elsewhere=638.9),
    "wanda_2_4": Config("wanda", 0.5, (2, 4), 32, elsewhere=150.0),
    "sparsegpt_2_4": Config("sparsegpt", 0.5, (2, 4), 32, elsewhere=63.24),
    "sparsegpt_70": Config("sparsegpt", 0.7, windows=32, elsewhere=155.6),
    "joint_50_int4": Config("joint", 0.5, windows=32, bits=4, elsewhere=55.55),
    "sparsegpt_50": Config("sparsegpt", 0.5, windows=128, elsewhere=36.27),
}


class _StopError(Exception):
    """Raised by the first block, whose inputs were all that was wanted."""


def linears(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a decoder block by name."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def block_inputs(model: Any, windows: torch.Tensor) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """What reaches the first block: hidden states [1, seqlen, hidden] of each window, and other arguments."""
    states: list[torch.Tensor] = []
    arguments: dict[str, Any] = {}

    def catch(_module: nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, Any]) -> None:
        states.append(args[0] if args else kwargs["hidden_states"])
        arguments.update({key: value for key, value in kwargs.items() if key != "hidden_states"})
        raise _StopError

    hook = model.model.layers[0].register_forward_pre_hook(catch, with_kwargs=True)
    for ids in windows:
        try:
            model(ids[None], use_cache=False)
        except _StopError:
            continue
    hook.remove()
    return states, arguments


def run_block(block: nn.Module, states: torch.Tensor, arguments: dict[str, Any], bf16: bool) -> torch.Tensor:
    """One forward pass; with bf16, multiplications take bfloat16 (the rotary angles are made before)."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        output = block(states, **arguments)
    return output[0] if isinstance(output, tuple) else output


def feed(
    block: nn.Module,
    collectors: dict[str, Any],
    states: list[torch.Tensor],
    arguments: dict[str, Any],
    bf16: bool,
) -> None:
    """Run the block on all windows while the collectors see each linear's inputs."""

    def add_batch(collector: Any) -> Any:
        # Outside autocast, else the collector's own product x xᵀ would be made in bfloat16, and then the
        # damped matrix of o_proj is not even positive definite.
        def hook(_module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            with torch.autocast("cpu", enabled=False):
                collector.add_batch(inputs[0].data, output.data)

        return hook

    hooks = [
        linears(block)[name].register_forward_hook(add_batch(collector))
        for name, collector in collectors.items()
    ]
    for window in states:
        run_block(block, window, arguments, bf16)
    for hook in hooks:
        hook.remove()


def _collector(originals: Originals, config: Config, layer: nn.Linear) -> Any:
    if config.method == "wanda":
        return originals.wanda_collector(layer)
    if config.method == "joint":
        return originals.joint_collector(layer, config.bits, sym=False)
    return originals.sparsegpt_collector(layer)


def _decide(originals: Originals, config: Config, collector: Any) -> None:
    decide = {
        "wanda": originals.prune_wanda,
        "sparsegpt": originals.prune_sparsegpt,
        "joint": originals.prune_joint,
    }[config.method]
    decide(collector, config.sparsity, config.prune)


@torch.no_grad()
def compress(
    model: Any, originals: Originals, config: Config, windows: torch.Tensor | None
) -> dict[str, float]:
    """Prune `model` in place; gives the achieved sparsity of the blocks' linears and the wall seconds."""
    start = time.perf_counter()
    blocks = model.model.layers
    if config.method == "magnitude":
        for block in blocks:
            for layer in linears(block).values():
                originals.prune_magnitude(layer, config.sparsity, config.prune)
    elif config.method != "dense":
        assert windows is not None
        states, arguments = block_inputs(model, windows)
        for index, block in enumerate(blocks):
            collectors = {n: _collector(originals, config, layer) for n, layer in linears(block).items()}
            feed(block, collectors, states, arguments, bf16=False)
            for collector in collectors.values():
                _decide(originals, config, collector)
            del collectors
            states = [run_block(block, window, arguments, bf16=False) for window in states]
            print(f"block {index + 1}/{len(blocks)}  {time.perf_counter() - start:.0f} s", flush=True)
    weights = [layer.weight for block in blocks for layer in linears(block).values()]
    zeros = sum(int((weight == 0).sum()) for weight in weights)
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "zeros": round(zeros / sum(weight.numel() for weight in weights), 6),
    }
