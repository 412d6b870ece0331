"""Logits of one batch of windows, a few positions at a time: the vocabulary is too wide to hold them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.errors import EvaluationError
from gossamer.nn.modes import evaluating

PROBE = 8  # positions on which "head after body" is compared with the whole model

Rows = Callable[[int, int], Tensor]


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """``model`` in evaluation mode for the length of a ``with`` block, without gradients."""
    with evaluating(model), torch.inference_mode():
        yield


class LogitReader:
    """Reads logits of windows from a causal language model, position range by position range.

    A transformers model is run as body, then head on the positions asked for: 2,048 positions of 49,152
    float32 logits would be 400 MB. Whether the model really is a body with a plain head on top (some scale
    or cap their logits after it) is seen by comparing both ways on the first few tokens, bit for bit; where
    they differ, and for models that are not of transformers, whole logits are computed at once.

    ``remember``: what the body gave for each batch is kept in memory, for a reference that many models are
    held against.
    """

    def __init__(self, model: nn.Module, name: str = "the model", *, remember: bool = False) -> None:
        self.model = model
        self.name = name
        self._seen: dict[tuple[bytes, int], Tensor] | None = {} if remember else None
        self._parts: tuple[nn.Module, nn.Module] | None = None
        self._probed = False

    @property
    def chunked(self) -> bool:
        """Whether the head runs apart from the body (known after the first window)."""
        return self._parts is not None

    def __call__(self, ids: Tensor) -> Rows:
        """Run the body on ``ids``, int64 ``(batch, seqlen)``.

        Returns ``rows(start, stop)``: float32 logits ``(batch, stop - start, vocab)`` of those positions.
        ``rows`` raises EvaluationError where a logit is NaN or infinite.
        """
        if not self._probed:
            self._parts = _split(self.model, ids[:1, :PROBE])
            self._probed = True
        if self._parts is None:
            whole = _forward(self.model, ids)
            return lambda start, stop: self._finite(whole[:, start:stop].float(), start)
        body, head = self._parts
        hidden = self._hidden(body, ids)
        return lambda start, stop: self._finite(head(hidden[:, start:stop]).float(), start)

    def _hidden(self, body: nn.Module, ids: Tensor) -> Tensor:
        key = (ids.numpy().tobytes() if self._seen is not None else b"", len(ids))
        if self._seen is not None and key in self._seen:
            return self._seen[key]
        hidden: Tensor = body(input_ids=ids, use_cache=False).last_hidden_state
        if self._seen is not None:
            self._seen[key] = hidden
        return hidden

    def _finite(self, logits: Tensor, start: int) -> Tensor:
        low, high = logits.aminmax()
        if math.isfinite(low.item()) and math.isfinite(high.item()):
            return logits
        bad = (~torch.isfinite(logits)).any(dim=-1).nonzero()[0]
        raise EvaluationError(
            f"{self.name} gives logits that are NaN or infinite (first at row {int(bad[0])} of the batch, "
            f"position {start + int(bad[1])}): no perplexity exists; look for NaN or infinite weights, "
            "or load it in bfloat16 or float32 in place of float16"
        )


def _split(model: nn.Module, ids: Tensor) -> tuple[nn.Module, nn.Module] | None:
    """Body and head of ``model`` where head(body(ids)) is the model's own result to the bit, else None."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    body = getattr(model, "base_model", None)
    if not isinstance(head, nn.Module) or not isinstance(body, nn.Module) or body is model:
        return None
    hidden = getattr(body(input_ids=ids, use_cache=False), "last_hidden_state", None)
    if hidden is None or hidden.shape[-1] != getattr(head, "in_features", hidden.shape[-1]):
        return None
    apart, whole = head(hidden), _forward(model, ids)
    same = apart.shape == whole.shape and torch.equal(apart.nan_to_num(), whole.nan_to_num())
    return (body, head) if same else None


def _forward(model: nn.Module, ids: Tensor) -> Tensor:
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "config") else {}
    out = model(ids, **options)
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[:2] != ids.shape:
        raise EvaluationError(
            f"{type(model).__name__} does not return logits of shape (batch, seqlen, vocab): "
            "only causal language models can be evaluated here"
        )
    return logits
