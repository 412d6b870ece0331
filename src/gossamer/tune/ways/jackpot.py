"""Lottery jackpots: which weights of a dense model to keep is searched for, while none of them moves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.matrices.values import Quantized
from gossamer.sparse import mask_from_scores, parse_pattern
from gossamer.sparse.masks import keep_highest
from gossamer.sparse.patterns import NM, Unstructured
from gossamer.tune.ways.search import MaskSearch
from gossamer.tune.weights import WEIGHTS, check_kept

KEPT, PRUNED = 1.0, 0.99  # where scores start
MOMENTUM = 0.9


@dataclass(frozen=True)
class JackpotOptions:
    """``pattern``: N:M or unstructured (compared within each layer); ``rate``: how far a step takes the score
    of a gradient of the layer's usual size; ``every``: steps between two changes of masks; ``power``: how
    fast changes become fewer over the run; 0: all that scores ask for."""

    pattern: str = "unstructured"
    rate: float = 1e-3
    every: int = 5
    power: float = 4.0

    def __post_init__(self) -> None:
        if not isinstance(parse_pattern(self.pattern), (NM, Unstructured)):
            raise MethodError(f"jackpot searches masks of N:M or unstructured, not {self.pattern}")
        if self.every < 1 or self.power < 0 or not self.rate > 0:
            raise MethodError(
                "jackpot takes a rate above 0, every of at least 1 and a power of at least 0, got "
                f"{self.rate}, {self.every} and {self.power}"
            )


@WEIGHTS.register("jackpot", cite="Zhang et al. 2023, Lottery Jackpots Exist in Pre-trained Models")
class JackpotWeight(MaskSearch):
    """``W = W0 ⊙ mask``: only ``importance`` ``(out, in)`` is trained, on the gradient of the mask itself,
    ``g ⊙ W0`` (STE). It begins at 1 where the start keeps a weight, at 0.99 where it does not, and steps by
    itself, by SGD with momentum at a rate that falls by a cosine, gradients in units of their layer's root
    mean square: Adam would step as far for every weight, and which one has the most to gain counts here.

    The mask wants the highest of them. Of the pairs (one to come, one to go) that this asks for, only the
    share ``(1 - fraction)^power`` with the most to gain is swapped: changes that depend on each other disturb
    the loss, and more so near the end (the paper's short restriction).
    """

    Options: ClassVar[type[Any]] = JackpotOptions
    accepts = "N:M and unstructured, searched"
    claim = Claim(
        says="Masks searched from magnitude's, no weight tuned, reach the dense model (VGG-19 at 90 % on "
        "CIFAR-10; here: a convolutional net on digits, within a hundredth of its accuracy).",
        experiment=Experiment(
            model="digits:cnn",
            sparsity=0.9,
            values="float32",
            against=("magnitude", "wanda", "statistics", "full"),
            start="magnitude",
            tuning={"epochs": 160},
            tuned={
                "jackpot": {"method": "jackpot", "others": False},
                "statistics": {"share": 0.0, "others": False, "epochs": 5},  # those of batch norms alone
                "full": {},
            },
        ),
        metric="accuracy",
        than="dense",
        factor=0.99,
        bound="at_least",
    )
    importance: Tensor
    speed: Tensor
    kept: Tensor
    steps: Tensor

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None,
        quantized: Quantized | None = None,
        options: JackpotOptions | None = None,
    ) -> None:
        super().__init__(weight, mask, quantized, options)
        assert mask is not None
        self.register_buffer("importance", torch.where(mask, KEPT, PRUNED).requires_grad_())
        self.register_buffer("speed", torch.zeros(mask.shape))
        self.register_buffer("kept", mask.clone())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        check_kept(mask, int(self._wanted().sum()), self._pattern)

    @classmethod
    def state_bytes(cls, shape: tuple[int, int], options: JackpotOptions) -> float:
        """The weight and its gradient; importance, its gradient and speed; the mask."""
        return 21 * math.prod(shape)

    def leaf(self) -> Tensor:
        return self.importance

    def dense(self) -> Tensor:
        straight = self.importance - self.importance.detach()
        return self.latent * (self.kept + straight)

    @torch.no_grad()
    def after_step(self, fraction: float) -> None:
        fraction = min(max(fraction, 0.0), 1.0)
        self.steps += 1
        grad, self.importance.grad = self.importance.grad, None
        if grad is not None:
            usual = grad.square().mean().sqrt().clamp_min(torch.finfo(grad.dtype).tiny)
            self.speed.mul_(MOMENTUM).add_(grad / usual)
            factor = 0.5 + 0.5 * math.cos(math.pi * fraction)
            self.importance.sub_(self.speed, alpha=self.options.rate * factor)
        if int(self.steps) % self.options.every:
            return
        share = (1 - fraction) ** self.options.power
        self.kept.copy_(swapped(self.kept, self._wanted(), self.importance, self._group(), share))

    def likeliest(self) -> Tensor:
        return self.kept.clone()

    def _wanted(self) -> Tensor:
        """The mask of the highest scores, of as many as are kept."""
        if isinstance(self._pattern, NM):
            return mask_from_scores(self.importance, self._pattern)
        pruned = self.kept.numel() - int(self.kept.sum())
        return keep_highest(self.importance.reshape(1, -1), pruned).reshape(self.kept.shape)

    def _group(self) -> int:
        """The inputs within which a swap may happen; 0: anywhere."""
        return self._pattern.m if isinstance(self._pattern, NM) else 0


def swapped(mask: Tensor, wanted: Tensor, scores: Tensor, group: int, share: float) -> Tensor:
    """``mask`` bool ``(out, in)`` with a ``share`` of its differences to ``wanted`` made, those pairs of one
    to come and one to go first whose ``scores`` are furthest apart; both of a pair lie in one row and
    ``group`` of inputs (0: anywhere), where both masks keep as many."""
    flat, groups = scores.flatten(), -(-mask.shape[1] // group) if group else 1

    def places(where: Tensor, sign: int) -> Tensor:
        found = where.flatten().nonzero()[:, 0]
        found = found[(sign * flat[found]).argsort()]
        if not group:
            return found
        row, column = found // mask.shape[1], found % mask.shape[1]
        return found[(row * groups + column // group).argsort(stable=True)]

    come, go = places(wanted & ~mask, -1), places(mask & ~wanted, 1)
    count = math.ceil(share * len(come))
    best = (flat[come] - flat[go]).topk(count).indices
    changed = mask.flatten().clone()
    changed[come[best]], changed[go[best]] = True, False
    return changed.reshape(mask.shape)
