"""Losses of logits a few tokens at a time: the logits of a whole batch are never in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.nn import StructuredLinear
from gossamer.tune.losses import LogitLoss

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK = 128  # tokens whose logits are made at once


@dataclass(frozen=True)
class LogitHead:
    """How a model makes logits of its last hidden states: ``cap tanh(scale (W h + b) / cap)``.

    ``weight``: ``(vocabulary, width)``, not trained.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float = 1.0
    cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, dtype: torch.dtype) -> LogitHead:
        """The head of ``model``, its weight in ``dtype``; raises ModelError where the model makes its logits
        in another way."""
        module = model.get_output_embeddings()
        if module is None:
            raise ModelError(f"{type(model).__name__} has no head that gives logits")
        weight = module.matrix.to_dense() if isinstance(module, StructuredLinear) else module.weight.detach()
        bias = None if module.bias is None else module.bias.detach().to(dtype)
        config = model.config
        scale = float(getattr(config, "logit_scale", None) or 1.0)
        scale /= float(getattr(config, "logits_scaling", None) or 1.0)
        head = cls(weight.to(dtype), bias, scale, getattr(config, "final_logit_softcapping", None))
        head._check(model)
        return head

    def logits(self, hidden: Tensor) -> Tensor:
        """float32 ``(tokens, vocabulary)`` of hidden states ``(tokens, width)``."""
        z = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias).float()
        z = z if self.scale == 1.0 else z * self.scale
        return z if self.cap is None else self.cap * torch.tanh(z / self.cap)

    @torch.no_grad()
    def _check(self, model: PreTrainedModel) -> None:
        ids = torch.arange(4)[None] % self.weight.shape[0]
        want = model(input_ids=ids, use_cache=False).logits.float()
        got = self.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        if not bool(want.isfinite().all()):
            raise ModelError(f"the logits of {type(model).__name__} are not finite: NaN in its weights")
        if want.shape != got.shape or not (got - want).norm() <= 0.05 * want.norm():
            raise ModelError(
                f"{type(model).__name__} does not make its logits by its head alone: it cannot be tuned yet"
            )


class LogitLosses(torch.autograd.Function):
    """The weighted sum of losses, means over tokens, and each one's mean ``(losses,)`` for reports.

    The gradient of the hidden states is made on the way, while a chunk's logits are there: nothing of the
    size of the vocabulary is kept, and no logits are made twice.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        labels: Tensor,
        teacher_hidden: Tensor | None,
        head: LogitHead,
        teacher_head: LogitHead | None,
        losses: Sequence[tuple[LogitLoss, float]],
        grads: bool,
    ) -> tuple[Tensor, Tensor]:
        """``hidden``: ``(tokens, width)``; ``labels``: ``(tokens,)``; ``grads``: whether backward follows."""
        sums = torch.zeros(len(losses))
        gradient = torch.empty_like(hidden) if grads else None
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            teacher = None
            if teacher_hidden is not None and teacher_head is not None:
                teacher = teacher_head.logits(teacher_hidden[part])
            with torch.set_grad_enabled(grads):
                given = hidden[part].detach().requires_grad_(grads)
                logits = head.logits(given)
                each = [loss.of(logits, teacher, labels[part]).sum() for loss, _ in losses]
                total = sum(weight * value for (_, weight), value in zip(losses, each, strict=True))
            sums += torch.stack([value.detach() for value in each])
            if gradient is not None and isinstance(total, Tensor):
                (gradient[part],) = torch.autograd.grad(total, given)
        ctx.gradient = None if gradient is None else gradient / len(labels)
        means = sums / len(labels)
        ctx.mark_non_differentiable(means)
        return (means * torch.tensor([weight for _, weight in losses])).sum(), means

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        return ctx.gradient * grads[0].to(ctx.gradient.dtype), None, None, None, None, None, None
