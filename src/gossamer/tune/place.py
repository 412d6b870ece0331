"""Puts weights under tuning where a model has packed ones, and packed ones back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.errors import GossamerError, ModelError
from gossamer.matrices import Dense, Matrix, Sparse
from gossamer.models.walk import find_parts, weight_of
from gossamer.nn import StructuredLinear, replace_module
from gossamer.nn.views import is_conv1d
from gossamer.tune.beside import Beside
from gossamer.tune.weights import TunedWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Make = Callable[[str, Matrix, Tensor | None], TunedWeight]


class TunedLinear(nn.Module):
    """``y = x Wᵀ + bias`` with W under tuning, in the dtype of ``x``, and what is tuned ``beside`` it."""

    bias: Tensor | None

    def __init__(self, weight: TunedWeight, bias: Tensor | None, beside: Beside | None = None) -> None:
        super().__init__()
        self.tuned, self.beside = weight, beside
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        y = nn.functional.linear(x, self.tuned(x.dtype), bias)
        return y if self.beside is None else y + self.beside(x)


class Stored(nn.Module):
    """A float32 parameter as it will be stored in ``dtype``, gradients passing straight through."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, value: Tensor) -> Tensor:
        return value.to(self.dtype)


def make_weights(
    model: PreTrainedModel, make: Make, masks: Mapping[str, Tensor | None] | None = None
) -> dict[str, TunedWeight]:
    """What ``make`` gives for every packed linear layer in the blocks of ``model``, and every ``nn.Linear``
    among ``masks``, from its name, matrix and mask, by the names of the layers. The model stays as it is.

    ``masks``: by name (None: of a plain layer all is kept, of a packed one what its layout keeps). Raises
    ModelError where there is nothing to tune, and for masks of what cannot be tuned.
    """
    masks = dict(masks or {})
    found: dict[str, TunedWeight] = {}
    for block in find_parts(model).blocks:
        for inner, module in block.module.named_modules():
            name = f"{block.name}.{inner}"
            packed = isinstance(module, StructuredLinear)
            if not packed and not (name in masks and isinstance(module, nn.Linear)):
                continue
            mask = masks.pop(name, None)
            try:
                found[name] = make(name, module.matrix if packed else _plain(module.weight, mask), mask)
            except GossamerError as error:
                raise type(error)(f"{name}: {error}") from error
    if masks:
        raise ModelError(_why_not(model, next(iter(masks))))
    if not found:
        raise ModelError(
            "the blocks of the model have no packed linear layers: give a Gossamer checkpoint, or masks of "
            "nn.Linear layers"
        )
    return found


def _plain(weight: Tensor, mask: Tensor | None) -> Matrix:
    return Dense(weight.detach()) if mask is None else Sparse(mask, weight.detach())


def _why_not(model: PreTrainedModel, name: str) -> str:
    """Why the layer ``name`` is not tuned under a mask."""
    module = dict(model.named_modules()).get(name)
    if module is None:
        return f"masks: the model has no layer {name!r}"
    if not name.startswith(f"{find_parts(model).blocks_name}."):
        return f"masks: {name} lies outside of the blocks and is not tuned: leave its mask out"
    return (
        f"masks: {name} is a {type(module).__name__}, and what is tuned here is nn.Linear and packed layers "
        "(other weights: ModuleTuning)"
    )


def place_weights(
    model: PreTrainedModel, weights: Mapping[str, TunedWeight], beside: Mapping[str, Beside]
) -> None:
    """Puts ``weights``, and what some have ``beside`` them, in the place of those of the layers that they are
    named by."""
    for name, weight in weights.items():
        bias = model.get_submodule(name).bias
        replace_module(model, name, TunedLinear(weight, bias, beside.get(name)))


@torch.no_grad()
def dense_weight(layer: nn.Module) -> Tensor | None:
    """The weight ``(out, in)`` of a linear layer, packed or not; None for anything else."""
    if isinstance(layer, StructuredLinear):
        return layer.matrix.to_dense()
    return weight_of(layer) if isinstance(layer, nn.Linear) or is_conv1d(layer) else None


def remove_weights(model: PreTrainedModel, matrices: Mapping[str, Matrix]) -> None:
    """Puts ``matrices`` in the place of the layers that `place_weights` made, by name: as StructuredLinear
    where they are packed or made of others, else as ``nn.Linear``."""
    for name, matrix in matrices.items():
        bias = model.get_submodule(name).bias
        bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        if not isinstance(matrix, (Dense, Sparse)):
            replace_module(model, name, StructuredLinear(matrix, bias))
            continue
        linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
        weight = matrix.to_dense().detach().to(model.dtype)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", bias)
        replace_module(model, name, linear)


def place_norms(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """Makes float32 parameters of the norm weights and biases in the blocks of ``model`` and of its last
    norm, by name; forward passes see them as they are stored."""
    parts = find_parts(model)
    inside = tuple(f"{name}." for name in (parts.blocks_name, *parts.norms))
    found: dict[str, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        if parameter.dim() != 1 or not name.startswith(inside):
            continue
        module_name, _, last = name.rpartition(".")
        module = model.get_submodule(module_name)
        setattr(module, last, nn.Parameter(parameter.detach().float().clone()))
        parametrize.register_parametrization(module, last, Stored(parameter.dtype), unsafe=True)
        made = getattr(module.parametrizations, last).original
        assert isinstance(made, nn.Parameter)
        found[name] = made
    return found


def remove_norms(model: PreTrainedModel, names: Iterable[str]) -> dict[str, Tensor]:
    """Puts plain parameters back where `place_norms` made others; their values as stored, by name."""
    found = {}
    for name in names:
        module_name, _, last = name.rpartition(".")
        module = model.get_submodule(module_name)
        found[name] = getattr(module, last).detach().clone()
        parametrize.remove_parametrizations(module, last, leave_parametrized=False)
        setattr(module, last, nn.Parameter(found[name], requires_grad=False))
    return found
