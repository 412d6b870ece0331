"""Putting one module in another's place, by its dotted name."""

from __future__ import annotations

from torch import nn

from gossamer.errors import ModelError


def replace_module(model: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Puts ``module`` at the dotted ``name`` in ``model``, as ``named_modules`` spells it, and returns what
    stood there. Raises ModelError where nothing does."""
    path, _, last = name.rpartition(".")
    try:
        parent = model.get_submodule(path)
        old = parent.get_submodule(last) if last else None
    except AttributeError:
        old = None
    if old is None or not last:
        raise ModelError(f"the model {type(model).__name__} has no module {name!r}")
    parent._modules[last] = module  # setattr fails on the numeric names of lists
    return old
