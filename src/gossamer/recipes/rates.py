"""How fast this machine runs, tunes and solves one block of a model: measured in seconds, not assumed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.bench.machine import use_threads
from gossamer.calibrate import Gradient, Gram, fast_dtype
from gossamer.calibrate.statistics import Statistic
from gossamer.matrices.values import Quantized
from gossamer.models.skeleton import materialize, release
from gossamer.models.walk import capture_block_inputs, find_parts, is_conv1d, prunable, run_block, weight_of
from gossamer.prune import Combination, Layer
from gossamer.recipes.prepare import Prepared
from gossamer.tune import TunedWeight

LEAST = 0.05  # seconds: what is faster runs again until it took so long


@dataclass(frozen=True)
class BlockRates:
    """Seconds, all of one block: ``forward`` of one window of ``seqlen`` tokens, ``step`` of tuning on it
    (weights made, forward, backward, Adam)."""

    seqlen: int
    forward: float
    step: float


class Bench:
    """One block of the model in memory, with random weights' worth of work to time; use as a context."""

    def __init__(self, prepared: Prepared) -> None:
        self.model, self.files = prepared.bare, prepared.files
        self.parts = find_parts(self.model)
        self.block = self.parts.blocks[0]
        self.layers = prunable(self.block)
        self.combination = prepared.recipe.compress.combination()
        self._outside = [
            (name, self.model.get_submodule(name))
            for name in (*self.parts.embeddings, *self.parts.norms, *self.parts.others)
        ]

    def __enter__(self) -> Bench:
        for name, module in (*self._outside, (self.block.name, self.block.module)):
            materialize(module, name, self.files, fast_dtype())
        return self

    def __exit__(self, *_: object) -> None:
        for _name, module in (*self._outside, (self.block.name, self.block.module)):
            release(module)

    def rates(self, seqlen: int, windows: int = 1) -> BlockRates:
        """Of ``windows`` windows at once, as one."""
        ids = torch.zeros(windows, seqlen, dtype=torch.int64)
        given = capture_block_inputs(self.model, ids, batch=windows, parts=self.parts)
        hidden, kwargs = torch.randn(given.hidden.shape).to(given.hidden.dtype), given.kwargs[0]
        weights = {name: self._tuned(layer) for name, layer in self.layers.items()}
        adam = torch.optim.Adam([p for weight in weights.values() for p in weight.parameters()], lr=1e-6)

        def step() -> None:
            made = {f"{name}.weight": weights[name]().to(hidden.dtype) for name in weights}
            made = {n: w.T if is_conv1d(self.layers[n[:-7]]) else w for n, w in made.items()}
            out = functional_call(self.block.module, made, (hidden,), kwargs)
            out = out[0] if isinstance(out, tuple) else out
            out.float().square().mean().backward(inputs=[p for g in adam.param_groups for p in g["params"]])
            adam.step()

        with torch.inference_mode():
            forward = seconds_of(lambda: run_block(self.block, hidden, kwargs))
        return BlockRates(seqlen, forward, seconds_of(step))

    def head(self, tokens: int = 256) -> float:
        """Seconds a token of one product with the head's weight."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        width = int(self.model.config.get_text_config().hidden_size)
        weight, x = (torch.randn(rows, width).to(fast_dtype()) for rows in (vocabulary, tokens))
        with torch.inference_mode():
            return seconds_of(lambda: nn.functional.linear(x, weight)) / tokens

    def solve(self) -> float:
        """Seconds in which the pruning method makes a block's layers, on all threads; from the smallest layer
        by one thread, and shapes."""
        method = self.combination.method
        power = 2 if Gram in method.needs else 1
        sizes = {name: weight_of(layer).shape for name, layer in self.layers.items()}
        work = {name: shape[0] * shape[1] ** power for name, shape in sizes.items()}
        name = min(work, key=work.__getitem__)
        features, c = sizes[name][1], self.combination
        with use_threads(1):
            statistics: dict[type[Statistic], Statistic] = {}
            for kind in method.needs:
                if kind is Gradient:
                    out, weight = sizes[name][0], torch.rand(sizes[name])
                    statistics[kind] = Gradient(weight, weight, torch.rand(out))
                    continue
                statistics[kind] = kind(features)
                statistics[kind].update(torch.randn(2 * features, features))
                statistics[kind].finish()
            layer = Layer(name, torch.randn(sizes[name]), statistics)
            start = time.perf_counter()
            method.prune(layer, c.pattern, c.sparsity, c.values, c.group)
            took = time.perf_counter() - start
        return float(took * sum(work.values()) / work[name] / torch.get_num_threads())

    def statistics(self, tokens: int = 512) -> float:
        """Seconds a token of summing up what a block's layers read."""
        kinds = [kind for kind in self.combination.method.needs if kind.passes == "streaming"]
        took = 0.0
        for width in {weight_of(layer).shape[1] for layer in self.layers.values()}:
            x = torch.randn(tokens, width).to(fast_dtype())
            for kind in kinds:
                took += seconds_of(partial(kind(width).update, x))
        return 2 * took / tokens  # q, k and v share an input, o has its own; gate and up share one

    def _tuned(self, layer: nn.Module) -> TunedWeight:
        c: Combination = self.combination
        weight = weight_of(layer).float()
        mask = None if c.sparsity == 0 else torch.rand(weight.shape) >= c.sparsity
        if not c.values.is_integer:
            return TunedWeight(weight, mask)
        groups = -(-weight.shape[1] // c.group)
        scales = torch.full((weight.shape[0], groups), 0.01, dtype=torch.float16)
        codes = torch.zeros(weight.shape, dtype=torch.int8)
        return TunedWeight(weight, mask, Quantized(codes, scales, c.group, c.values.bits))


def seconds_of(work: Callable[[], Any]) -> float:
    """How long ``work`` takes, after a first time that is not counted."""
    work()
    start, count = time.perf_counter(), 0
    while not count or time.perf_counter() - start < LEAST:
        work()
        count += 1
    return (time.perf_counter() - start) / count


def parameters_of(module: nn.Module) -> int:
    """How many numbers the parameters under ``module`` are, tied ones once."""
    found: dict[int, Tensor] = {id(p): p for p in module.parameters()}
    return sum(p.numel() for p in found.values())
