"""What every method of caching is: layers of its own in a transformers cache, checked before work starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer

from gossamer.claim import Claim, Experiment
from gossamer.dynamic.cache.parts import mapped, nbytes
from gossamer.errors import MethodError
from gossamer.registry import Registry


class KeptLayer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer, all that is kept of them in ``state`` (tensors with the batch first)."""

    is_sliding = False
    is_croppable = False  # what was compressed does not come back as it was
    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.length = 0  # positions
        self.state: Any = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Keeps new positions ``(batch, kv_heads, n, dim)`` and gives what attention reads: all positions."""
        if self.state is None:
            self.lazy_initialization(key_states, value_states)
        self.length += key_states.shape[2]
        return self.append(key_states, value_states)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self.kv_heads = key_states.shape[1]
        self.state = self.empty(key_states)

    @abstractmethod
    def empty(self, keys: Tensor) -> Any:
        """The state of no positions, for keys like these."""

    @abstractmethod
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def cut(self, length: int) -> None:
        """Forget all but the first ``length`` positions."""

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets ``-tokens_to_remove`` positions at the end, as transformers counts them."""
        if tokens_to_remove > 0:
            raise MethodError("a cache is cropped by minus the number of positions to forget")
        if self.state is not None and tokens_to_remove:
            length = max(0, self.length + tokens_to_remove)
            self.cut(length)
            self.length = length

    @property
    def nbytes(self) -> int:
        """Bytes of memory, room for later positions included."""
        return nbytes(self.state)

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(lambda x: x[indices])

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        self.state = mapped(self.state, change)


class KeptCache(Cache):  # type: ignore[misc]
    """A transformers cache that says how large it is; layers with a sliding window are transformers' own."""

    @property
    def nbytes(self) -> int:
        """Bytes of all layers."""
        return sum(
            layer.nbytes if isinstance(layer, KeptLayer) else nbytes([layer.keys, layer.values])
            for layer in self.layers
        )


class CacheMethod(ABC):
    """How keys and values are kept: `new` makes an empty cache, for ``past_key_values=`` of a model."""

    name: ClassVar[str]
    claim: ClassVar[Claim | None] = None
    keeps: ClassVar[str]  # in a word, for lists of methods
    reads: ClassVar[str] = "step"  # within what positions compete to be read
    needs: ClassVar[tuple[str, ...]] = ()  # what is calibrated beforehand

    @classmethod
    def calibrated(cls, model: Any, windows: Tensor, **settings: Any) -> CacheMethod:
        """The method with plain ``settings``, what it needs besides found on ``windows``, int64
        ``(windows, n)``, of the transformers ``model``."""
        return cls(**settings)

    @abstractmethod
    def layer(self, model: Any, number: int) -> KeptLayer:
        """An empty cache of layer ``number``."""

    @abstractmethod
    def check(self, model: Any) -> None:
        """Raises MethodError where ``model`` does not suit the method."""

    def new(self, model: Any) -> KeptCache:
        """An empty cache for the transformers ``model``. Raises MethodError where it does not suit."""
        with torch.no_grad():
            self.check(model)
            plain = DynamicCache(config=model.config).layers
            if not any(type(layer) is DynamicLayer for layer in plain):
                raise MethodError(
                    f"{self.name} is for layers that see all positions, and this model has none"
                )
            return KeptCache(
                layers=[
                    self.layer(model, number) if type(layer) is DynamicLayer else layer
                    for number, layer in enumerate(plain)
                ]
            )


STEPS = Experiment(
    windows=4,
    seqlen=1024,
    length=8064,
    first=7552,
    caching={
        "gear": {"bits": 2},
        "kivi": {"method": "gear", "bits": 2, "rank": 0, "later_rank": 0, "outliers": 0},
        "low_rank_keys": {"rank": 48, "tokens": 1024},
        "double_sparsity": {"labels": 4, "tokens": 504},
    },
    against=(),
)
"""The last 512 of 8,064 tokens, which read a cache of what went before."""

CACHES: Registry[CacheMethod] = Registry(
    "cache",
    {
        "double_sparsity": "gossamer.dynamic.cache.double_sparsity",
        "gear": "gossamer.dynamic.cache.gear",
        "low_rank_keys": "gossamer.dynamic.cache.low_rank_keys",
    },
)


def head_dim(model: Any) -> int:
    """Numbers of a head of keys."""
    config = model.config
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def kv_heads(model: Any) -> int:
    """Heads of keys."""
    config = model.config
    return int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
