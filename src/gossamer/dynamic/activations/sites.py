"""Where activations are gated: at the inputs of linear layers, or at the outputs of activation functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gossamer.errors import ModelError
from gossamer.models.walk import find_parts, is_router, weight_of
from gossamer.nn import StructuredLinear
from gossamer.nn.experts import inside_experts
from gossamer.nn.modes import evaluating
from gossamer.nn.views import is_conv1d


@dataclass(frozen=True)
class Site:
    """One place of a model, by the full ``name`` of its module: where that is a linear layer, what it reads
    is gated, else what it gives.

    ``features``: activations of a token. ``bytes``: of the weights that are read where all are active; one
    inactive activation skips ``bytes / features`` of them. ``partner``: the linear layer whose outputs the
    site's activations are multiplied with (the up projection of a gated MLP).
    """

    name: str
    module: nn.Module
    features: int
    bytes: float
    partner: nn.Module | None = None


def is_linear(module: nn.Module) -> bool:
    """Whether ``module`` multiplies by a weight: ``nn.Linear``, ``StructuredLinear``, GPT-2's ``Conv1D``."""
    return isinstance(module, (nn.Linear, StructuredLinear)) or is_conv1d(module)


def dense_weight(module: nn.Module) -> Tensor:
    """The weight of a linear layer, float32 ``(out_features, in_features)``."""
    if isinstance(module, StructuredLinear):
        return module.matrix.to_dense().detach().float()
    return weight_of(module).float()


def linear_sites(model: nn.Module) -> dict[str, Site]:
    """The inputs of all linear layers in the blocks of a decoder, by full names; not of routers, nor of
    experts, which calibration may reach by few tokens or none."""
    found = {}
    for block in find_parts(model).blocks:
        experts = inside_experts(block.module)
        for inner, module in block.module.named_modules():
            if is_linear(module) and module not in experts and not is_router(inner):
                name = f"{block.name}.{inner}"
                found[name] = Site(name, module, shape_of(module)[1], weight_bytes(module))
    if not found:
        raise ModelError(f"the blocks of {type(model).__name__} have no linear layer that could be gated")
    return found


def shape_of(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer."""
    if isinstance(module, StructuredLinear):
        return module.matrix.shape
    out, inputs = weight_of(module).shape
    return out, inputs


def weight_bytes(module: nn.Module) -> float:
    """Bytes of a linear layer's weight as it is stored."""
    if isinstance(module, StructuredLinear):
        out, inputs = module.matrix.shape
        return module.matrix.bits_per_weight * out * inputs / 8
    weight = weight_of(module)
    return float(weight.numel() * weight.element_size())


def tap(module: nn.Module, see: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Shows ``see`` the activations of a site whenever ``module`` runs, ``(..., features)``: what a linear
    layer reads, what any other module gives. A tensor that it returns takes their place."""
    if not is_linear(module):
        return module.register_forward_hook(lambda _, args, output: see(output))

    def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        changed = see(args[0])
        return None if changed is None else (changed, *args[1:])

    return module.register_forward_pre_hook(before)


def run_body(model: nn.Module, windows: Tensor, batch: int = 1) -> None:
    """Runs ``model``, its head apart, on token ids ``(n, seqlen)``, ``batch`` windows at a time."""
    body = getattr(model, "base_model", model)
    options: dict[str, Any] = {"use_cache": False} if hasattr(model, "config") else {}
    with evaluating(model), torch.no_grad():
        for ids in torch.split(windows, batch):
            body(ids, **options)
