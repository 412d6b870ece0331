"""Block-wise reconstruction: each block is tuned to give what the dense block gave, one block in memory."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gossamer.calibrate import Visit
from gossamer.calibrate.stream import Calls
from gossamer.claim import Claim, Experiment
from gossamer.errors import CalibrationError, MethodError
from gossamer.models.walk import run_block
from gossamer.nn.views import is_conv1d
from gossamer.tune.method import TUNERS, Outcome, Tuner
from gossamer.tune.weights import TunedWeight, adamw


@TUNERS.register(
    "blockwise",
    cite="Guo et al. 2024, EBFT: Effective and Block-Wise Fine-Tuning for Sparse LLMs",
)
@dataclass
class Blockwise(Tuner):
    """Minimises, token by token, ||f'(x') - f(x)||² / ||f(x)||²: f the dense block on what it reads in the
    dense model, f' the compressed one on what it reads behind compressed blocks.

    The division is ours: what follows a block norms it, and a few tokens whose hidden states are a hundred
    times as large as others' would otherwise be all that is tuned for. ``epochs`` passes over the windows
    with Adam, a window a step; ``rate``: the largest step of a weight, as a share of the mean size of its
    layer's (scales: a tenth of it), falling to zero by a cosine; ``held_out``: the share of windows, the last
    ones, that are not tuned on and by which the best epoch is kept, the start among them. Windows of
    calibration are drawn at random places: those of a short text share tokens.
    """

    claim = Claim(
        says="Behind Wanda's masks, tuning each block to its dense outputs beats DSnoT's better masks.",
        experiment=Experiment(
            sparsity=0.7,
            against=("wanda",),
            compressed={"blockwise": {"method": "wanda", "tune": "blockwise", "tune_options": {"epochs": 1}}},
        ),
        metric="perplexity",
        than="dsnot",
    )

    epochs: int = 4
    rate: float = 0.01
    held_out: float = 0.125

    def __post_init__(self) -> None:
        if self.epochs < 1 or not 0 < self.rate < 1 or not 0 <= self.held_out < 1:
            raise MethodError(
                "blockwise takes at least one epoch, a rate in (0, 1) and a held-out share in [0, 1), got "
                f"{self.epochs}, {self.rate}, {self.held_out}"
            )

    def tune(self, visit: Visit, weights: dict[str, TunedWeight], seed: int) -> Outcome:
        calls = visit.calls
        if calls is None:
            raise MethodError("blockwise needs a walk that keeps the dense model's hidden states")
        block = _Tunable(visit, weights)
        count = calls.inputs.shape[0]
        held = int(count * self.held_out)
        tuned_on = list(range(count - held))
        judged_on = list(range(count - held, count)) or tuned_on
        optimizer = adamw(group for weight in weights.values() for group in weight.groups(self.rate))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.epochs * len(tuned_on))
        order = torch.Generator().manual_seed(seed)
        before = best = block.loss(calls, judged_on)
        if not math.isfinite(before):
            raise CalibrationError(f"{visit.name}: its outputs are not finite: NaN or infinite activations")
        states = _states(weights)
        for _ in range(self.epochs):
            for i in torch.randperm(len(tuned_on), generator=order).tolist():
                optimizer.zero_grad(set_to_none=True)
                loss = block.of_window(calls, tuned_on[i])
                loss.backward(inputs=parameters)  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
            now = block.loss(calls, judged_on)
            if now < best:  # and not where it is NaN
                best, states = now, _states(weights)
        for name, weight in weights.items():
            weight.load_state_dict(states[name])
        return Outcome(before, best, self.epochs * len(tuned_on) * calls.inputs.shape[1])


class _Tunable:
    """The block of a visit, computing with tuned weights in place of its own."""

    def __init__(self, visit: Visit, weights: dict[str, TunedWeight]) -> None:
        names = {name: f"block.{name.removeprefix(visit.name + '.')}.weight" for name in weights}
        self._call = _Call(visit.module)
        self._weights = {names[name]: weight for name, weight in weights.items()}
        self._transposed = {names[name] for name in weights if is_conv1d(visit.layers[name])}

    def of_window(self, calls: Calls, window: int) -> Tensor:
        """The loss of one window."""
        x, target = calls.inputs.read(window, window + 1), calls.targets.read(window, window + 1).float()
        given = {name: weight().to(x.dtype) for name, weight in self._weights.items()}
        given = {name: w.T if name in self._transposed else w for name, w in given.items()}
        got: Tensor = functional_call(self._call, given, (x, calls.kwargs))
        error = (got.float() - target).square().sum(-1)
        size = target.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)
        mean: Tensor = (error / size).mean()
        return mean

    @torch.no_grad()
    def loss(self, calls: Calls, windows: list[int]) -> float:
        """The mean loss of ``windows``."""
        return float(torch.stack([self.of_window(calls, window) for window in windows]).mean())


class _Call(nn.Module):
    """A block whose output is its hidden states alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return run_block(self.block, hidden, kwargs)


def _states(weights: dict[str, TunedWeight]) -> dict[str, dict[str, Tensor]]:
    return {
        name: {key: value.clone() for key, value in weight.state_dict().items()}
        for name, weight in weights.items()
    }
