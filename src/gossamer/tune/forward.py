"""One pass through a decoder without its head: last hidden states, and those behind every block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from gossamer.models.walk import find_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass
class Pass:
    """``last``: what the head reads, ``(batch, seqlen, width)``; ``states``: what each block gave, where it
    was asked for."""

    last: Tensor
    states: list[Tensor] = field(default_factory=list)


def run(model: PreTrainedModel, ids: Tensor, attention_mask: Tensor | None, *, states: bool) -> Pass:
    """Runs token ids ``(batch, seqlen)`` through ``model``."""
    blocks = [block.module for block in find_parts(model).blocks] if states else []
    with _listening(blocks) as heard:
        out = model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
    return Pass(out.last_hidden_state, [heard[index] for index in range(len(blocks))])


@contextmanager
def _listening(blocks: list[nn.Module]) -> Iterator[dict[int, Tensor]]:
    """What each of ``blocks`` gives while the context lasts: not when it is run again for its gradients."""
    heard: dict[int, Tensor] = {}

    def hear(index: int) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            heard[index] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [block.register_forward_hook(hear(index)) for index, block in enumerate(blocks)]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
