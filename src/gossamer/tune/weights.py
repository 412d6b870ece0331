"""A weight under tuning: its mask holds at every step, and integers are rounded as they will be stored."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.matrices.values import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    Quantized,
    ValueType,
    nearest_,
    quantize_codes,
)
from gossamer.registry import Registry, with_options

WEIGHTS: Registry[TunedWeight] = Registry(
    "way to tune weights",
    {
        "full": "gossamer.tune.weights",
        "lora": "gossamer.tune.ways.lora",
        "ast": "gossamer.tune.ways.ast",
        "maskllm": "gossamer.tune.ways.maskllm",
        "jackpot": "gossamer.tune.ways.jackpot",
        "scales": "gossamer.tune.ways.scales",
    },
)
WAYS = Experiment(
    pattern="32:64",
    sparsity=None,
    values="int4",
    against=("obs",),
    tuning={"tokens": 65_536, "seqlen": 256, "losses": {"kl": 1}},
    tuned={"full": {}, "lora": {"method": "lora"}},
)
# of the mean size of a layer's weights: a step, where no rate is given; floats follow every step, codes only
# those that reach the next one
SHARE, FLOAT_SHARE = 0.01, 0.001
_CHUNK = 1 << 16  # weights finished at once: they and two temporaries stay in a core's cache


@dataclass(frozen=True)
class NoOptions:
    """A way to tune weights that leaves nothing to choose."""


@WEIGHTS.register("full", cite="Bengio et al. 2013; Esser et al. 2020, Learned Step Size Quantization")
class TunedWeight(nn.Module):
    """What a layer multiplies by while all that is kept of ``latent`` ``(out, in)`` is tuned, in float32.

    ``mask``: bool ``(out, in)``, True = kept, or None; ``quantized``: the codes to begin with where values
    are integers. Then ``scales`` ``(out, groups)`` are tuned too (LSQ, Esser et al. 2020), and the forward
    pass sees ``scale * clamp(round(latent / scale))``, gradients passing straight through the rounding
    (Bengio et al. 2013). Scales are rounded to float16 as they are stored, so that tuning sees the finished
    weight. ``options``: of a subclass, an instance of its ``Options``.
    """

    name: ClassVar[str] = ""
    accepts: ClassVar[str] = "any, and dense"  # masks, in a word, for lists of methods
    takes: ClassVar[Literal["any", "integers", "floats"]] = "any"
    needs_masks: ClassVar[bool] = False  # else dense weights are tuned too
    frees_masks: ClassVar[bool] = False  # the layout that a mask began in may not hold the one it ends as
    claim: ClassVar[Claim | None] = Claim(
        says="Weights and scales tuned through their rounding, masks kept, win back what one shot lost.",
        experiment=WAYS,
        metric="perplexity",
        than="obs",
        factor=0.9,
    )
    Options: ClassVar[type[Any]] = NoOptions
    latent: Tensor
    mask: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None,
        quantized: Quantized | None = None,
        options: Any = None,
    ) -> None:
        super().__init__()
        self.options = self.Options() if options is None else options
        self.latent = nn.Parameter(weight.detach().float().clone())
        self.register_buffer("mask", mask, persistent=False)
        self.values: ValueType | None = None
        self.scales: nn.Parameter | None = None
        if quantized is not None:
            self.values, self.group = quantized.values, quantized.group
            self.scales = nn.Parameter(quantized.scales.float())
        self.defers = False
        self.passes = 1  # backward passes of a step where they do not defer
        self._kept: tuple[tuple[Any, ...], Tensor] | None = None
        self._pending: Tensor | None = None

    @classmethod
    def chosen(cls, options: Mapping[str, Any]) -> Any:
        """``options`` as an instance of ``Options``; raises MethodError for one that is not there."""
        return with_options(cls.Options, options, f"tuning by {cls.name}")

    @classmethod
    def has_pattern(cls) -> bool:
        """Whether masks move within a ``pattern``, one of the options."""
        return any(field.name == "pattern" for field in fields(cls.Options))

    @classmethod
    def within(cls, pattern: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options`` with the ``pattern`` of the masks to begin with, for a method that has that option."""
        known = pattern is not None and cls.has_pattern()
        return {**({"pattern": pattern} if known else {}), **options}

    @classmethod
    def state_bytes(cls, shape: tuple[int, int], options: Any) -> float:
        """What tuning keeps in memory of a weight ``shape`` from step to step, the finished weight apart:
        here what is tuned, its gradient and AdamW's two moments, in float32, and the mask."""
        return 17 * math.prod(shape)

    @classmethod
    def brings_back(cls, options: Any) -> bool:
        """Whether pruned weights may come back as the dense model's, which `fill` must give then."""
        return False

    def freeze(self) -> Tensor:
        """Takes ``latent`` from what is tuned, for a method that tunes something else; gives it."""
        first = self.latent.detach()
        del self.latent
        self.register_buffer("latent", first, persistent=False)
        return first

    def dense(self) -> Tensor:
        """The weight before it is masked and rounded, float32 ``(out, in)``."""
        return self.latent

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as it will be multiplied, ``(out, in)``: zero wherever it was pruned.

        Where ``defers`` is set it is made once for all calls until `settle`, and backward passes leave its
        gradient here, which `settle` takes further: once a step, however many passes a step has.
        """
        if not self.defers:
            self._kept = None  # an optimizer that nobody tells of steps behind this pass
        source = self.leaf() if self.defers else self.dense()
        given: Tensor = _Finish.apply(source, self.scales, self, dtype)  # type: ignore[no-untyped-call]
        return given

    def leaf(self) -> Tensor:
        """A tensor that gradients end at, which tells autograd to come back here."""
        return next(self.parameters())

    @torch.no_grad()
    def settle(self) -> None:
        """Gradients of the parameters from those that deferred passes left; an optimizer steps next."""
        self._kept = None
        if self._pending is None:
            return
        to_dense, to_scales = self.gradients(self._pending, self.dense().detach())
        self._pending = None
        with torch.enable_grad():
            self.dense().backward(to_dense)  # type: ignore[no-untyped-call]
        if self.scales is not None and to_scales is not None:
            self.scales.grad = to_scales if self.scales.grad is None else self.scales.grad + to_scales

    def leave(self, grad: Tensor) -> None:
        """Adds a gradient of the finished weight to those that `settle` takes further."""
        if self._pending is None:
            self._pending = grad.float() if grad.dtype != torch.float32 else grad.clone()
        else:
            self._pending.add_(grad)

    def size(self) -> float:
        """Of what is tuned, in its own unit: the mean size of the weights that are kept. Learning rates are
        shares of it where nobody gives another."""
        kept = self.latent.detach() if self.mask is None else self.latent.detach()[self.mask]
        return float(kept.abs().mean()) if kept.numel() else 0.0

    def share(self) -> float:
        """How far a step goes where no rate is given: a share of `size`."""
        return FLOAT_SHARE if self.values is None else SHARE

    def groups(self, share: float, scale_rate: float = 0.1, decay: float = 0.0) -> list[dict[str, Any]]:
        """For an optimizer: what is trained at the rate ``share`` of its `size`, and scales at ``share``
        times ``scale_rate`` of theirs."""
        found: list[dict[str, Any]] = [
            {"params": self.trained(), "lr": share * self.size(), "weight_decay": decay}
        ]
        if self.scales is not None:
            size = float(self.scales.detach().abs().mean())
            found.append({"params": [self.scales], "lr": share * scale_rate * size})
        return found

    def trained(self) -> list[nn.Parameter]:
        """What is trained, scales apart."""
        return [p for name, p in self.named_parameters() if name != "scales" and p.requires_grad]

    def fill(self, dense: Tensor) -> None:
        """Tells a method that may bring back pruned weights what the dense ones are, ``(out, in)``."""

    def final_mask(self) -> Tensor | None:
        """The mask of the `finished` weight."""
        return self.mask

    def added(self, number: float) -> float:
        """What `gradients` may add of a number that counts once a step."""
        return number if self.defers else number / self.passes

    def before_step(self, fraction: float) -> None:
        """Tells a method, before gradients settle, that ``fraction`` of the whole budget is done."""

    def after_step(self, fraction: float) -> None:
        """What a method does behind an optimizer's step; ``fraction`` of the whole budget is done."""

    @torch.no_grad()
    def finished(self) -> tuple[Tensor, Quantized | None]:
        """The tuned weight, and its codes where values are integers."""
        weight = self._finish(self.dense().detach(), torch.float32)
        if self.scales is None or self.values is None:
            return weight, None
        scales, kept = stored_scales(self.scales).half(), self.dense().detach()
        kept = kept if self.mask is None else kept * self.mask
        codes = torch.empty(weight.shape, dtype=torch.int8)
        for index, start in enumerate(range(0, weight.shape[1], self.group)):
            part = slice(start, start + self.group)
            codes[:, part] = quantize_codes(kept[:, part], scales[:, index], self.values)
        return weight, Quantized(codes, scales, self.group, self.values)

    def made(self, dtype: torch.dtype) -> Tensor:
        """The finished weight, kept until `settle` where passes defer."""
        if not self.defers:
            return self._finish(self.dense().detach(), dtype)
        # versions alone would not do: fused optimizers do not count them up
        sources = [*self.parameters(), *self.buffers()]
        now = (dtype, *((id(tensor), tensor._version) for tensor in sources))
        if self._kept is None or self._kept[0] != now:
            self._kept = now, self._finish(self.dense().detach(), dtype)
        return self._kept[1]

    def _finish(self, latent: Tensor, dtype: torch.dtype) -> Tensor:
        out = torch.empty(latent.shape, dtype=dtype)
        for rows in _chunks(latent):
            kept = latent[rows] if self.mask is None else latent[rows] * self.mask[rows]
            if self.scales is not None and self.values is not None:
                scales = self._spread(self.scales[rows])
                kept = nearest_(kept.div(scales), self.values).mul_(scales)
            out[rows] = kept
        return out

    def gradients(self, grad: Tensor, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of `dense` and of the scales, from the gradient ``(out, in)`` of the finished weight.

        With ``r = latent / scale``: of a latent weight the gradient itself where ``round(r)`` lies between
        the least and the greatest integer, else none; of a scale the sum over its group of the gradient times
        ``code - r`` there, else ``code``.
        """
        to_latent = torch.empty_like(latent)
        to_scales = None if self.scales is None else torch.empty_like(self.scales)
        for rows in _chunks(latent):
            given = to_latent[rows].copy_(grad[rows])
            if self.mask is not None:
                given.mul_(self.mask[rows])
            if self.scales is not None and self.values is not None and to_scales is not None:
                ratio = latent[rows] / self._spread(self.scales[rows])
                rounded = ratio.round()
                limited = rounded.clamp(self.values.qmin, self.values.qmax)
                # 1 inside the range of codes, else 0: arithmetic, since comparisons take ten times as long
                inside = rounded.sub_(limited).abs_().clamp_(max=1).neg_().add_(1)
                codes = nearest_(ratio.clone(), self.values) if self.values.levels else limited
                error = codes.sub_(ratio.mul_(inside))
                to_scales[rows] = self._group_sums(error.mul_(given))
                given.mul_(inside)
        return to_latent, to_scales

    def _spread(self, scales: Tensor) -> Tensor:
        """Every weight's scale as it is stored."""
        return stored_scales(scales).repeat_interleave(self.group, dim=1)[:, : self.latent.shape[1]]

    def _group_sums(self, x: Tensor) -> Tensor:
        ragged = -x.shape[1] % self.group
        x = nn.functional.pad(x, (0, ragged)) if ragged else x
        return x.reshape(x.shape[0], -1, self.group).sum(2)


class _Finish(torch.autograd.Function):
    """The finished weight of a latent one, and the gradients straight through the rounding."""

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, scales: Tensor | None, weight: TunedWeight, dtype: torch.dtype
    ) -> Tensor:
        ctx.weight, ctx.defers = weight, weight.defers
        ctx.save_for_backward(latent, scales, weight.mask)
        return weight.made(dtype).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        latent, _, _ = ctx.saved_tensors  # all three are seen to be unchanged
        if ctx.defers:
            ctx.weight.leave(grads[0])
            return None, None, None, None
        return *ctx.weight.gradients(grads[0], latent), None, None


def adamw(groups: Iterable[dict[str, Any]]) -> torch.optim.AdamW:
    """The optimizer of ``groups``; each one's own rate stays in it as ``initial_lr``, for schedules."""
    groups = [{**group, "initial_lr": group["lr"]} for group in groups if group["params"]]
    groups = groups or [{"params": [], "lr": 0.0, "initial_lr": 0.0}]  # a method may step by itself
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


def check_warmup(warmup: float) -> None:
    """Raises MethodError unless ``warmup`` is a share that leaves some of a run."""
    if not 0 <= warmup < 1:
        raise MethodError(f"the warmup is a share of the run in [0, 1), got {warmup}")


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Each group's rate: ``factor`` times its own."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor


def seed_of(weight: Tensor) -> int:
    """A seed drawn from ``weight`` itself, so that a layer's start depends on no other."""
    return zlib.crc32(weight.contiguous().numpy().data)


def check_kept(mask: Tensor, count: int, pattern: object) -> None:
    """Raises MethodError where a mask to begin with keeps another number of weights than the ``count`` of its
    ``pattern``: pruning would be undone unasked."""
    if int(mask.sum()) != count:
        raise MethodError(f"the mask keeps {int(mask.sum()):,} weights, but {pattern} keeps {count:,}")


def _chunks(weight: Tensor) -> Iterator[slice]:
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], rows):
        yield slice(start, start + rows)


def stored_scales(scales: Tensor) -> Tensor:
    """Scales as float16 holds them, in its normal range, their sign kept."""
    size = scales.detach().abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)
    return torch.copysign(size, scales.detach()).half().float()
