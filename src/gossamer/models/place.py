"""Puts structured matrices where a transformers model has the weights of layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.matrices import Matrix
from gossamer.models.walk import ModelParts, prunable
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module
from gossamer.nn.views import is_conv1d

_LINEAR_TWINS = frozenset({"FalconLinear"})  # spell out the product of nn.Linear


def takes_matrix(module: nn.Module) -> bool:
    """Whether a layer computes ``x Wᵀ + b``, or looks up (and scales) rows of W, so that a structured matrix
    can stand in for its weight. Subclasses that compute something of their own do not."""
    if is_conv1d(module) or type(module).__name__ in _LINEAR_TWINS:
        return True
    if isinstance(module, nn.Embedding):
        own = type(module).forward is not nn.Embedding.forward
        return module.max_norm is None and (not own or hasattr(module, "embed_scale"))
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward


def check_layers(parts: ModelParts) -> None:
    """Raises ModelError where a structured matrix could not stand in for the weight of a layer in a block."""
    for block in parts.blocks:
        for name, module in prunable(block).items():
            if not takes_matrix(module):
                raise ModelError(
                    f"{block.name}.{name} is a {type(module).__name__} with a forward of its own: "
                    "a structured matrix cannot stand in for its weight"
                )


def place_matrix(model: nn.Module, name: str, matrix: Matrix, dtype: torch.dtype) -> None:
    """Puts ``matrix`` in the place of the parameter ``name`` (``….weight`` of a linear layer, a Conv1D of
    GPT-2, or an embedding), keeping the layer's bias. ``dtype``: what an embedding gives out.

    Raises ModelError where `takes_matrix` says no, or the shape differs.
    """
    layer, _, parameter = name.rpartition(".")
    module = model.get_submodule(layer)
    weight = module.weight
    if parameter != "weight" or not isinstance(weight, Tensor) or not takes_matrix(module):
        raise ModelError(f"a {type(module).__name__} cannot have a structured matrix as its {parameter}")
    shape = tuple(weight.shape[::-1] if is_conv1d(module) else weight.shape)
    if matrix.shape != shape:
        raise ModelError(f"it is {list(matrix.shape)}, but the model's layer is {list(shape)}")
    if isinstance(module, nn.Embedding):
        embedding = StructuredEmbedding.from_embedding(module, matrix)
        embedding.dtype = dtype
        replace_module(model, layer, embedding)
    else:
        bias = module.bias if isinstance(module.bias, Tensor) else None
        replace_module(model, layer, StructuredLinear(matrix, bias).train(module.training))
