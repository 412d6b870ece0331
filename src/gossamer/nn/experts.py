"""Experts that a mixture holds fused in one tensor, taken apart: linear layers, which can be made sparse.

transformers stacks the weights of a layer's experts in parameters of three dimensions. Each expert becomes a
module of its own here, ``experts.7.gate_up_proj`` and ``experts.7.down_proj``, that reads the tokens which
the router sends it; activation and gate stay those of the fused module, whatever they are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.nn.replace import replace_module

# how a skeleton notes where a tensor's values lie; here: of one expert of a fused parameter
Note = Callable[[Tensor, Tensor, int, bool], None]

# what transformers' configurations call the number of experts that a token is sent to: nearly all of them,
# Gemma 4's, Aria's
_EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "top_k_experts", "moe_topk")


class Experts(nn.Module):
    """The experts of the fused module ``fused``, one by one; called as that one is, with the same result.

    ``note`` is told of each new parameter which fused one, which expert of it and whether transposed it is.
    """

    def __init__(self, fused: nn.Module, note: Note | None = None) -> None:
        super().__init__()
        self.first = _first(fused)
        self.turned = bool(fused.is_transposed)
        for index, layers in enumerate(experts_of(fused, note)):
            expert = nn.Module()
            for name, layer in zip((self.first, "down_proj"), layers, strict=True):
                setattr(expert, name, layer)
            self.add_module(str(index), expert)
        for name in list(fused._parameters):
            delattr(fused, name)
        self.fused = fused  # what is left of it: how it activates and gates
        self.activate: Callable[[Tensor], Tensor] = fused._apply_gate if fused.has_gate else fused.act_fn  # type: ignore[assignment]
        self.train(fused.training)

    def __len__(self) -> int:
        return sum(name.isdigit() for name in self._modules)

    def parts(self, name: str) -> list[tuple[nn.Module, str]]:
        """Where the members of the fused parameter ``name`` are held: layer and parameter, by expert."""
        layer = name.removesuffix("_bias")
        parameter = "weight" if layer == name else "bias"
        return [(getattr(self._modules[str(index)], layer), parameter) for index in range(len(self))]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """``hidden_states`` (tokens, hidden), the experts ``top_k_index`` (tokens, k) of each and their
        ``top_k_weights``; sums are float32."""
        out = torch.zeros(hidden_states.shape, dtype=torch.float32, device=hidden_states.device)
        chosen, weights = top_k_index.reshape(-1), top_k_weights.reshape(-1, 1)
        rows = torch.argsort(chosen, stable=True)
        ends = torch.bincount(chosen, minlength=len(self)).cumsum(0).tolist()
        for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            if start == end:
                continue
            its = rows[start:end]
            tokens = its // top_k_index.shape[1]
            expert: Any = self._modules[str(index)]
            inner = self.activate(getattr(expert, self.first)(hidden_states[tokens]))
            out.index_add_(0, tokens, expert.down_proj(inner).float() * weights[its])
        return out.to(hidden_states.dtype)


def experts_of(module: nn.Module, note: Note | None = None) -> Iterator[tuple[nn.Module, nn.Module]]:
    """The first and the second linear layer of each expert: of `Experts` its own, of a fused module (see
    `is_fused`) new ones over its values. ``note``: as for `Experts`."""
    if isinstance(module, Experts):
        for index in range(len(module)):
            expert: Any = module._modules[str(index)]
            yield getattr(expert, module.first), expert.down_proj
        return
    first = _first(module)
    stacked: Any = module._parameters[first]
    for index in range(len(stacked)):
        yield _linear(module, first, index, note), _linear(module, "down_proj", index, note)


def expert_weights(fused: nn.Module) -> dict[str, Tensor]:
    """The weights ``(out, in)`` of each expert of the fused module ``fused`` (see `is_fused`), by the names
    that `Experts` gives its layers: views, never copies."""
    return {
        f"{index}.{name}": _weight(fused, name, index)
        for index in range(count_experts(fused))
        for name in (_first(fused), "down_proj")
    }


def count_experts(module: nn.Module) -> int:
    """How many experts ``module`` holds, fused or apart; 0 where it holds none."""
    if isinstance(module, Experts):
        return len(module)
    stacked: Any = module._parameters[_first(module)] if is_fused(module) else ()
    return len(stacked)


def share_of_tokens(module: nn.Module, config: object) -> float:
    """Of the tokens that come to ``module``, the share that each of its experts reads in a model of this
    ``config`` (where layers send them to different numbers of experts, on average); 1 where it holds none, or
    the configuration does not say."""
    count = count_experts(module)
    if not count:
        return 1.0
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    said = [getattr(text, name, None) for name in _EXPERTS_OF_A_TOKEN]
    chosen = next((one for one in said if one is not None), count)
    each = chosen if isinstance(chosen, (list, tuple)) else [chosen]
    return sum(each) / len(each) / count


def _weight(fused: nn.Module, name: str, index: int) -> Tensor:
    weight = fused.get_parameter(name).detach()[index]
    return weight.T if fused.is_transposed else weight


def _linear(fused: nn.Module, name: str, index: int, note: Note | None) -> nn.Linear:
    stack: Any = fused._parameters[name]
    bias = fused._parameters.get(f"{name}_bias")
    turned = bool(fused.is_transposed)
    weight = _weight(fused, name, index)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = _parameter(weight, stack)
    if note is not None:
        note(layer.weight, stack, index, turned)
    if bias is not None:
        layer.bias = _parameter(bias.detach()[index], bias)
        if note is not None:
            note(layer.bias, bias, index, False)
    return layer


def _parameter(value: Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.contiguous(), requires_grad=like.requires_grad)


def _first(fused: nn.Module) -> str:
    return "gate_up_proj" if getattr(fused, "has_gate", False) else "up_proj"


def is_fused(module: nn.Module) -> bool:
    """Whether ``module`` holds experts in the form in which transformers fuses them, and which can be taken
    apart: not where a norm follows each expert."""
    return (
        hasattr(module, "_apply_gate")
        and hasattr(module, "is_transposed")
        and not getattr(module, "has_post_expert_norm", False)
        and all(
            getattr(module._parameters.get(name), "ndim", 0) == 3 for name in (_first(module), "down_proj")
        )
    )


def take_apart(model: nn.Module, keep: Collection[str] = (), note: Note | None = None) -> None:
    """Replaces every fused module of experts in ``model`` by `Experts`, save those of which ``keep`` names a
    parameter."""
    for name, module in list(model.named_modules()):
        if is_fused(module) and not any(f"{name}.{one}" in keep for one in module._parameters):
            replace_module(model, name, Experts(module, note))


def inside_experts(model: nn.Module) -> dict[nn.Module, Experts]:
    """The modules inside experts that were taken apart, of which a token reaches a few only, and what holds
    them."""
    holders = [module for module in model.modules() if isinstance(module, Experts)]
    return {part: holder for holder in holders for part in holder.modules()}
