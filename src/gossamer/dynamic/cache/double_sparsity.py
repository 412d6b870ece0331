"""Double Sparsity: a few label channels tell which tokens a step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.claim import Claim
from gossamer.dynamic.attention.label_blocks import LabelBlocks
from gossamer.dynamic.attention.plug import Watch
from gossamer.dynamic.cache.method import CACHES, STEPS, CacheMethod, kv_heads
from gossamer.dynamic.cache.parts import Grown, split
from gossamer.dynamic.cache.select import SelectiveLayer
from gossamer.errors import MethodError
from gossamer.kernels import BLOCK


@dataclass(frozen=True)
class State:
    keys: Grown
    values: Grown
    labels: Grown  # the label channels of keys, by themselves: what every step reads whole


@CACHES.register(
    "double_sparsity", cite="Yang et al. 2024, Post-Training Sparse Attention with Double Sparsity"
)
@dataclass(frozen=True, eq=False)
class DoubleSparsity(CacheMethod):
    """The ``tokens`` that the label channels of keys rate highest are read, of a cache that keeps all.

    ``labels``, int64 ``(layers, kv_heads, count)``: the label channels, as `label_channels` finds them; the
    last ``recent`` positions are always among the tokens. Heads that share keys share their tokens: the
    largest of their weights counts. The cache is larger by the labels; what is saved is reading.
    """

    keeps = "all, and labels"
    needs = ("label channels",)

    claim = Claim(
        says="A sixteenth of the channels tells which sixteenth of the tokens to read, with almost no "
        "loss of accuracy.",
        experiment=STEPS,
        metric="perplexity",
        than="dense",
        factor=1.02,
    )

    labels: Tensor | None = None
    tokens: int = 1024
    recent: int = 64

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 1 <= self.recent <= self.tokens:
            raise MethodError(
                f"double_sparsity takes tokens >= 1, of which 1 or more are recent, not {self.tokens}, "
                f"{self.recent}"
            )

    @classmethod
    def calibrated(cls, model: Any, windows: Tensor, **settings: Any) -> DoubleSparsity:
        """``labels``: how many channels of each head of keys are labels."""
        return cls(label_channels(model, windows, settings.pop("labels")), **settings)

    def check(self, model: Any) -> None:
        if self.labels is None:
            raise MethodError("double_sparsity needs label channels: see `label_channels`")
        wanted = (model.config.num_hidden_layers, kv_heads(model))
        if self.labels.ndim != 3 or self.labels.shape[:2] != wanted or not self.labels.shape[2]:
            raise MethodError(f"labels must be {wanted} times a count, not {tuple(self.labels.shape)}")

    def policy(self, model: Any) -> LabelBlocks:
        """The same number of tokens by whole blocks of `BLOCK`, as an attention policy, which both engines
        take. Raises MethodError as `new`."""
        self.check(model)
        assert self.labels is not None
        window = -(-(self.recent - 1) // BLOCK)
        return LabelBlocks(self.labels.tolist(), max(0, self.tokens // BLOCK - window - 1), window)

    def layer(self, model: Any, number: int) -> DoubleSparsityLayer:
        assert self.labels is not None
        return DoubleSparsityLayer(self, self.labels[number])


class DoubleSparsityLayer(SelectiveLayer):
    def __init__(self, method: DoubleSparsity, channels: Tensor) -> None:
        super().__init__()
        self.method = method
        self.channels = channels  # (kv_heads, count)

    def empty(self, keys: Tensor) -> State:
        labels = keys[:, :, :0, : self.channels.shape[1]]
        return State(*(Grown(x.clone()) for x in (keys[:, :, :0], keys[:, :, :0], labels)))

    def keep(self, keys: Tensor, values: Tensor) -> None:
        state, labels = self.state, keys.gather(3, self._index(keys))
        self.state = State(state.keys.append(keys), state.values.append(values), state.labels.append(labels))

    def everything(self) -> tuple[Tensor, Tensor]:
        return self.state.keys.filled, self.state.values.filled

    def choose(self, query: Tensor, scaling: float) -> Tensor | None:
        if self.method.tokens >= self.length:
            return None
        rows, labels = query.shape[3], self.state.labels.filled
        # (batch, kv_heads, group x rows, count) meets (batch, kv_heads, length, count)
        label_query = query.flatten(2, 3).gather(3, self._index(query.flatten(2, 3)))
        scores = split((label_query @ labels.mT).float() * scaling, 2, -1, rows)
        row = torch.arange(self.length - rows, self.length)[:, None]
        position = torch.arange(self.length)
        weights = scores.masked_fill(position > row, -torch.inf).softmax(-1).amax(2)
        weights.masked_fill_((position > row - self.method.recent) & (position <= row), torch.inf)
        best: Tensor = weights.topk(self.method.tokens, -1).indices
        return best.sort(-1).values

    def cut(self, length: int) -> None:
        state = self.state
        self.state = State(state.keys.cut(length), state.values.cut(length), state.labels.cut(length))

    def _index(self, x: Tensor) -> Tensor:
        """The label channels for a gather from ``x (batch, kv_heads, n, dim)``."""
        return self.channels[None, :, None].expand(len(x), -1, x.shape[2], -1)


class _Sizes(Watch):
    """Sums the sizes of queries and keys, channel by channel."""

    def __init__(self) -> None:
        super().__init__()
        self.queries: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}

    def see(
        self, queries: Tensor, keys: Tensor, values: Tensor, *, scaling: float, window: int, layer: int
    ) -> None:
        sizes = queries.float().abs().sum(1), keys.float().abs().sum(1)
        for total, size in zip((self.queries, self.keys), sizes, strict=True):
            total[layer] = total.get(layer, 0) + size


@torch.no_grad()
def label_channels(model: Any, windows: Tensor, count: int) -> Tensor:
    """The ``count`` channels of each head of keys that make the most of scores, int64 ``(layers, kv_heads,
    count)``, the first one most: those of the largest mean ``|q_c k_c|`` over all pairs of a query and a key
    in the calibration ``windows``, int64 ``(windows, n)``, of all heads that share the keys."""
    sizes = _Sizes()
    sizes.read(model, windows)
    found = []
    for number in range(model.config.num_hidden_layers):
        if number not in sizes.keys:
            raise MethodError("this model's layers do not go through the attention interface")
        keys, queries = sizes.keys[number], sizes.queries[number]
        products = split(queries, 0, len(keys), -1).sum(1) * keys
        if not 1 <= count <= products.shape[1]:
            raise MethodError(f"a head has {products.shape[1]} channels; {count} labels are asked for")
        found.append(products.topk(count, -1).indices)
    return torch.stack(found)
