"""How fast this machine runs, tunes and solves one block of a model: measured, not assumed.

One thread is measured, in processor time, which other work on the machine hardly changes; several threads
are taken to share that work.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.calibrate import Gradient, Gram, fast_dtype
from gossamer.calibrate.statistics import Statistic
from gossamer.matrices.values import Quantized
from gossamer.models.skeleton import materialize, release
from gossamer.models.walk import capture_block_inputs, find_parts, prunable, run_block, weight_of
from gossamer.nn.views import is_conv1d
from gossamer.prune import Combination, Layer
from gossamer.recipes.layer_shares import Needs
from gossamer.recipes.prepare import Prepared
from gossamer.tune import TunedWeight

RUNS = 5
LONGEST = 2.0  # seconds of one measurement, where a single run does not take longer
SHARED = 0.8  # of the work of a thread that each of several does: they wait for each other and for memory


@dataclass(frozen=True)
class BlockRates:
    """Seconds that one block takes for some windows: to run (``forward``), with gradients (``backward``, the
    forward pass included), and for a step of tuning beside that (``update``: weights made, Adam)."""

    forward: float
    backward: float
    update: float


class Bench:
    """One block of the model in memory, and one thread to time it, while the context lasts. All times are
    seconds of as many threads as there were before."""

    def __init__(self, prepared: Prepared) -> None:
        self.model, self.files = prepared.bare, prepared.files
        self.parts = find_parts(self.model)
        self.block = self.parts.blocks[0]
        self.layers = prunable(self.block)
        self.combination = prepared.recipe.compress.combination()
        if self.combination.prunes and self.combination.sparsity == 0:
            self.combination = replace(self.combination, sparsity=0.5)  # not known yet, and hardly matters
        self.threads = torch.get_num_threads()
        self.team = 1.0 if self.threads == 1 else SHARED * self.threads
        self._outside = [
            (name, self.model.get_submodule(name))
            for name in (*self.parts.embeddings, *self.parts.norms, *self.parts.others)
        ]

    def __enter__(self) -> Bench:
        torch.set_num_threads(1)
        for name, module in (*self._outside, (self.block.name, self.block.module)):
            materialize(module, name, self.files, fast_dtype())
        return self

    def __exit__(self, *_: object) -> None:
        torch.set_num_threads(self.threads)
        for _name, module in (*self._outside, (self.block.name, self.block.module)):
            release(module)

    def rates(self, seqlen: int, windows: int = 1) -> BlockRates:
        """Of ``windows`` windows of ``seqlen`` tokens at once."""
        ids = torch.zeros(windows, seqlen, dtype=torch.int64)
        given = capture_block_inputs(self.model, ids, batch=windows, parts=self.parts)
        hidden, kwargs = torch.randn(given.hidden.shape).to(given.hidden.dtype), given.kwargs[0]
        weights = {name: self._tuned(layer) for name, layer in self.layers.items()}
        adam = torch.optim.Adam([p for weight in weights.values() for p in weight.parameters()], lr=1e-6)
        parameters = [p for group in adam.param_groups for p in group["params"]]

        def gradients(updated: bool) -> None:
            if updated:
                adam.step()
            made = {f"{name}.weight": weights[name](hidden.dtype) for name in weights}
            made = {n: w.T if is_conv1d(self.layers[n[:-7]]) else w for n, w in made.items()}
            out = functional_call(self.block.module, made, (hidden,), kwargs)
            out = out[0] if isinstance(out, tuple) else out
            out.float().square().mean().backward(inputs=parameters)

        with torch.inference_mode():
            forward = seconds_of(lambda: run_block(self.block, hidden, kwargs))
        backward, step = (seconds_of(partial(gradients, updated)) for updated in (False, True))
        return BlockRates(forward / self.team, backward / self.team, max(0.0, step - backward) / self.team)

    def head(self, tokens: int = 256) -> float:
        """Seconds a token of one product with the head's weight."""
        vocabulary = int(self.model.config.get_text_config().vocab_size)
        width = int(self.model.config.get_text_config().hidden_size)
        weight, x = (torch.randn(rows, width).to(fast_dtype()) for rows in (vocabulary, tokens))
        with torch.inference_mode():
            return seconds_of(lambda: nn.functional.linear(x, weight)) / tokens / self.team

    def solve(self) -> float:
        """Seconds in which the pruning method makes a block's layers; from the smallest, and shapes. What is
        derived from a Gram matrix counts once for all layers that share it."""
        method, c = self.combination.method, self.combination
        power = 2 if Gram in method.needs else 1
        sizes = {name: weight_of(layer).shape for name, layer in self.layers.items()}
        work = {name: shape[0] * shape[1] ** power for name, shape in sizes.items()}
        name = min(work, key=work.__getitem__)
        statistics = {kind: _made_up(kind, sizes[name]) for kind in method.needs}
        layer = Layer(name, torch.randn(sizes[name]), statistics)

        def prune() -> None:
            method.prune(layer, c.pattern, c.sparsity, c.values, c.group)

        def derive_and_prune() -> None:
            layer[Gram].forget()
            prune()

        each = seconds_of(prune)
        took = each * sum(work.values()) / work[name]
        if Gram in statistics:
            derived = max(0.0, seconds_of(derive_and_prune) - each)
            took += derived * sum(width**3 for width in input_widths(self.layers)) / sizes[name][1] ** 3
        return float(took / self.team)

    def statistics(self, needs: Needs, tokens: int = 512) -> float:
        """Seconds a token of summing up what a block's layers read."""
        kinds = {kind for kind in needs if kind.passes == "streaming"}
        took = 0.0
        for width in {weight_of(layer).shape[1] for layer in self.layers.values()}:
            x = torch.randn(tokens, width).to(fast_dtype())
            for kind in kinds:
                took += seconds_of(partial(kind(width).update, x))
        # q, k and v share an input, o has its own; gate and up share one
        return 2 * took / tokens / self.team

    def _tuned(self, layer: nn.Module) -> TunedWeight:
        c: Combination = self.combination
        weight = weight_of(layer).float()
        mask = None if c.sparsity == 0 else torch.rand(weight.shape) >= c.sparsity
        if not c.values.is_integer:
            return TunedWeight(weight, mask)
        groups = -(-weight.shape[1] // c.group)
        scales = torch.full((weight.shape[0], groups), 0.01, dtype=torch.float16)
        codes = torch.zeros(weight.shape, dtype=torch.int8)
        return TunedWeight(weight, mask, Quantized(codes, scales, c.group, c.values))


def input_widths(layers: Mapping[str, nn.Module]) -> list[int]:
    """The widths of the inputs of a block's ``layers``. Those of one module that read as many features are
    taken to read the same ones: query, key and value do, and gate and up of every expert."""
    widths = {(name.rpartition(".")[0], weight_of(layer).shape[1]) for name, layer in layers.items()}
    return [width for _, width in sorted(widths)]


def _made_up(kind: type[Statistic], shape: tuple[int, ...]) -> Statistic:
    """A statistic of random inputs of a layer of ``shape``."""
    out, features = shape
    if issubclass(kind, Gradient):
        return Gradient(torch.randn(out, features), torch.rand(out, features), torch.rand(out))
    made = kind(features)
    made.update(torch.randn(2 * features, features))
    made.finish()
    return made


def seconds_of(work: Callable[[], Any]) -> float:
    """The least processor time that ``work`` takes, of RUNS times or as many as fit into LONGEST, after one
    that is not counted."""
    work()
    best, spent, count = math.inf, 0.0, 0
    while not count or (count < RUNS and spent < LONGEST):
        start = time.process_time()
        work()
        took = time.process_time() - start
        best, spent, count = min(best, took), spent + took, count + 1
    return best


def parameters_of(module: nn.Module) -> int:
    """How many numbers the parameters under ``module`` are, tied ones once."""
    found: dict[int, Tensor] = {id(p): p for p in module.parameters()}
    return sum(p.numel() for p in found.values())
