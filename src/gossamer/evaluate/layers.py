"""The linear layers inside a decoder's blocks, plain or structured: what is counted."""

from __future__ import annotations

from torch import nn

from gossamer.errors import ModelError
from gossamer.models.walk import prunable
from gossamer.nn import StructuredLinear


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers by full name: plain ones that could be pruned, and structured ones.

    Those inside the repeated blocks only: no head, no embedding, no projection outside them, and no router of
    a mixture of experts.
    """
    try:
        found = prunable(model)
    except ModelError:  # all of them are structured
        found = {}
    found |= {name: module for name, module in model.named_modules() if isinstance(module, StructuredLinear)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    return {
        name: found[name]
        for name in sorted(found, key=order.__getitem__)
        if found[name] is not head and any(part.isdigit() for part in name.split("."))
    }
