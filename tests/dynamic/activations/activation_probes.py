"""What tests of gates look at: a model's logits, its hooks, and what one of its modules reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def inputs_of(model: nn.Module, name: str, run: Callable[[], object]) -> torch.Tensor:
    """What the module reads during ``run``, after all hooks that were there before."""
    seen: list[torch.Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    run()
    handle.remove()
    return seen[0].detach()
