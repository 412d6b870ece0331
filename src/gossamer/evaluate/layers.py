"""The linear layers inside a decoder's blocks, plain or structured: what is counted and compared."""

from __future__ import annotations

from torch import Tensor, nn

from gossamer.errors import EvaluationError, ModelError
from gossamer.models.walk import prunable, weight_of
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


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight ``(out, in)`` of a layer: a view of a plain one, a structured one unpacked."""
    if isinstance(layer, StructuredLinear):
        return layer.matrix.to_dense().detach()
    return weight_of(layer)


def layer_of(model: nn.Module, name: str) -> nn.Module:
    """The layer ``name`` of ``model``; raises EvaluationError where there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise EvaluationError(
            f"{type(model).__name__} has no layer {name}: it is no version of the model it is compared with"
        ) from error
