"""One pass through a decoder without its head: last hidden states, and those behind every block."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from gossamer.models.walk import find_parts
from gossamer.nn.listen import listening

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
    with listening(dict(enumerate(blocks))) as heard:
        out = model.base_model(input_ids=ids, attention_mask=attention_mask, use_cache=False)
    return Pass(out.last_hidden_state, [heard[index] for index in range(len(blocks))])
