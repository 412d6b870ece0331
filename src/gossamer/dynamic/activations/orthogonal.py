"""WINA's preparation: a model rotated so that the columns of some weights are orthogonal."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.models.walk import find_parts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

M = TypeVar("M", bound="PreTrainedModel")

# a norm, the linear layers that read it, and the one of them whose columns become orthogonal
READERS = {
    "input_layernorm": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.k_proj"),
    "post_attention_layernorm": (("mlp.gate_proj", "mlp.up_proj"), "mlp.gate_proj"),
}


class RotatedNorm(nn.Module):
    """``norm(x) Q``: what the layers behind a norm read, in the coordinates in which they are gated."""

    def __init__(self, norm: nn.Module, rotation: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("rotation", rotation)

    def forward(self, x: Tensor) -> Tensor:
        rotated: Tensor = self.norm(x) @ self.rotation
        return rotated


def orthogonal_columns(model: M) -> M:
    """A copy of ``model`` that computes the same, and in each of whose blocks the columns of the key and gate
    projections are orthogonal.

    Chen et al. 2025, WINA, and its code: with ``W = U S Vᵀ`` (of the key, or gate, projection) all readers of
    the same norm become ``W V`` and read ``Vᵀ x``; WINA's error then is the least that dropping so many
    activations of that layer can give. The paper moves V into the weights before it and keeps a matrix on
    each residual connection; here it stands behind the norm, which gives the same activations for as many
    products: hidden_size² a norm, which no gate can skip. Raises ModelError for models without Llama's names.
    """
    prepared = copy.deepcopy(model)
    for block in find_parts(prepared).blocks:
        for norm_name, (readers, chosen) in READERS.items():
            try:
                norm = block.module.get_submodule(norm_name)
                layers: dict[str, Any] = {name: block.module.get_submodule(name) for name in readers}
            except AttributeError:
                raise ModelError(
                    f"{type(model).__name__} has no {norm_name} that {' and '.join(readers)} read: columns "
                    "cannot be made orthogonal"
                ) from None
            weight = layers[chosen].weight
            rotation = torch.linalg.svd(weight.detach().double(), full_matrices=True).Vh.T
            with torch.no_grad():
                for layer in layers.values():
                    layer.weight.copy_((layer.weight.double() @ rotation).to(layer.weight.dtype))
            setattr(block.module, norm_name, RotatedNorm(norm, rotation.to(weight.dtype)))
    return prepared
