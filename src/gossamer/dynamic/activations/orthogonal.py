"""WINA's preparation: a model rotated so that the columns of some weights are orthogonal."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from gossamer.claim import Unclaimed
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

_PARTS = {"self_attn", "mlp", *READERS}  # a block that has more reads its norms elsewhere
UNCLAIMED = Unclaimed(
    name="WINA's orthogonal columns",
    cite="Chen et al. 2025, WINA: Weight Informed Neuron Activation",
    figures="Dropped activations",
    why="It makes another model to gate, which no setting of an experiment does and the decoder does not "
    "run.",
)


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

    Chen et al. 2025, WINA, and its code: a norm's weight g goes into its readers, ``W diag(g)``; with ``W
    diag(g) = U S Vᵀ`` (of the key, or gate, projection) all of them become ``W diag(g) V`` and read ``Vᵀ x``,
    x being what the norm gives without its weight; WINA's error then is the least that dropping so many
    activations of that layer can give. The code moves V into the weights before it and keeps a matrix on each
    residual connection, and takes the mean from the rows of the embedding, which changes the model; here V
    stands behind the norm, which gives the same activations for as many products: hidden_size² a norm, which
    no gate can skip. Raises ModelError for models without Llama's names, with more norms than Llama, or whose
    layers are packed.
    """
    list(_norms(model))  # refused before it is copied
    prepared = copy.deepcopy(model)
    for block, norm_name, layers, chosen in _norms(prepared):
        norm = block.get_submodule(norm_name)
        _fold(norm, layers.values())
        weight = layers[chosen].weight
        rotation = torch.linalg.svd(weight.detach().double(), full_matrices=True).Vh.T
        with torch.no_grad():
            for layer in layers.values():
                layer.weight.copy_((layer.weight.double() @ rotation).to(layer.weight.dtype))
        setattr(block, norm_name, RotatedNorm(norm, rotation.to(weight.dtype)))
    return prepared


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, str, dict[str, Any], str]]:
    """Each block with the name of a norm in it, the layers that read it by name, and the name of the one
    whose columns become orthogonal. Raises ModelError as `orthogonal_columns`."""
    for block in find_parts(model).blocks:
        for norm_name, (readers, chosen) in READERS.items():
            try:
                block.module.get_submodule(norm_name)
                layers = {name: block.module.get_submodule(name) for name in readers}
            except AttributeError:
                raise ModelError(
                    f"{type(model).__name__} has no {norm_name} that {' and '.join(readers)} read: columns "
                    "cannot be made orthogonal"
                ) from None
            if others := {name.partition(".")[0] for name, _ in block.module.named_parameters()} - _PARTS:
                raise ModelError(
                    f"{type(model).__name__} has {min(others)}: columns cannot be made orthogonal"
                )
            for name, layer in layers.items():
                if not isinstance(layer, nn.Linear):
                    raise ModelError(
                        f"{block.name}.{name} is a {type(layer).__name__}: only plain weights can be made "
                        "orthogonal"
                    )
            yield block.module, norm_name, layers, chosen


@torch.no_grad()
def _fold(norm: Any, readers: Iterable[Any]) -> None:
    """Moves what ``norm`` multiplies by and adds into the linear layers that read it."""
    plain = _plain_weight(norm)
    scale = norm.weight.double() + (1 - plain)
    shift = getattr(norm, "bias", None)
    for layer in readers:
        weight = layer.weight.double()
        if shift is not None:
            own = 0 if layer.bias is None else layer.bias.double()
            layer.bias = nn.Parameter((own + weight @ shift.double()).to(layer.weight.dtype))
        layer.weight.copy_((weight * scale).to(layer.weight.dtype))
    norm.weight.fill_(plain)
    if shift is not None:
        shift.zero_()


def _plain_weight(norm: Any) -> float:
    """The weight with which ``norm`` multiplies by 1: it is 0 where one is added to it, as in Gemma."""
    bare = copy.deepcopy(norm)
    for parameter in bare.parameters():
        parameter.zero_()
    x = torch.arange(bare.weight.numel(), dtype=bare.weight.dtype, device=bare.weight.device)
    return 0.0 if bool(bare(x[None]).any()) else 1.0
