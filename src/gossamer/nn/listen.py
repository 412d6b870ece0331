"""What modules give while a model runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from torch import Tensor, nn

K = TypeVar("K")


@contextmanager
def listening(modules: Mapping[K, nn.Module]) -> Iterator[dict[K, Tensor]]:
    """The last output of each of ``modules``, of a tuple its first, by the same keys, while the context
    lasts: not when a checkpointed block is run again for its gradients."""
    heard: dict[K, Tensor] = {}

    def hear(key: K) -> Any:
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            heard[key] = out[0] if isinstance(out, tuple) else out

        return hook

    handles = [module.register_forward_hook(hear(key)) for key, module in modules.items()]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()
