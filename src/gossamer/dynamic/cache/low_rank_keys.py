"""Low-rank keys: ShadowKV's keys before rotation in few numbers, and landmarks that tell which to rebuild."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gossamer.claim import Claim
from gossamer.dynamic.cache.method import CACHES, STEPS, CacheMethod, head_dim, kv_heads
from gossamer.dynamic.cache.parts import split
from gossamer.dynamic.cache.quantize import Quantized, of_values
from gossamer.dynamic.cache.rotation import Rotation
from gossamer.dynamic.cache.select import SelectiveLayer
from gossamer.errors import MethodError

AGAIN = 512  # positions in the buffer that are worth compressing anew


@dataclass(frozen=True)
class Prompt:
    """Positions [0, n) of a layer, n a multiple of the chunk."""

    left: Tensor  # (batch, n, rank)
    right: Tensor  # (batch, kv_heads, rank, dim): left right are the keys before rotation
    landmarks: Tensor  # (batch, kv_heads, chunks, dim): mean keys
    outliers: Tensor  # int64 (batch, kv_heads, count): chunks that no mean stands for
    outlier_keys: Tensor  # (batch, kv_heads, count, chunk, dim), as they were
    values: Quantized | Tensor


@dataclass(frozen=True)
class State:
    prompt: Prompt | None
    keys: Tensor  # positions after the prompt, as they are
    values: Tensor


@CACHES.register("low_rank_keys", cite="Sun et al. 2024, ShadowKV: KV Cache in Shadows")
@dataclass(frozen=True)
class LowRankKeys(CacheMethod):
    """Keys of the prompt as ``rank`` numbers a token for all heads; steps rebuild the likeliest chunks.

    ``tokens``: read by a step, in chunks of ``chunk`` positions, chosen by mean keys; besides them the
    ``outliers`` chunks whose keys are least like their mean, which stay as they are, and the positions behind
    the last whole ``local`` chunks of the prompt. Values in ``value_bits`` (16: as they are; the paper moves
    them to the CPU's memory). A step rebuilds the keys that it reads. Once there are 512 more positions they
    are compressed too, the older keys once more with them.
    """

    keeps = "keys in low rank"

    claim = Claim(
        says="Keys in low rank, of which steps rebuild the likeliest, take a sixth of the memory with "
        "no loss of accuracy.",
        experiment=STEPS,
        metric="perplexity",
        than="dense",
        factor=1.01,
    )

    rank: int = 96
    tokens: int = 1024
    chunk: int = 8
    outliers: int = 48
    local: int = 4
    value_bits: int = 8

    def __post_init__(self) -> None:
        if min(self.rank, self.chunk, self.local) < 1 or self.tokens < self.chunk or self.outliers < 0:
            raise MethodError("low_rank_keys takes rank, chunk, local >= 1, tokens >= chunk, outliers >= 0")
        if self.value_bits not in (2, 4, 8, 16):
            raise MethodError(f"low_rank_keys keeps values in 2, 4, 8 or 16 bits, not {self.value_bits}")

    def check(self, model: Any) -> None:
        Rotation.of(model, 0)
        most = kv_heads(model) * head_dim(model)
        if self.rank > most:
            raise MethodError(f"the keys of a token are {most} numbers: no rank of {self.rank}")
        if head_dim(model) % max(1, 8 // self.value_bits):
            raise MethodError(
                f"heads of {head_dim(model)} numbers do not fill bytes of {self.value_bits} bits"
            )

    def layer(self, model: Any, number: int) -> LowRankLayer:
        return LowRankLayer(self, Rotation.of(model, number))

    def compress(self, keys: Tensor, values: Tensor, rotation: Rotation) -> Prompt:
        """``keys`` and ``values (batch, kv_heads, n, dim)`` of positions [0, n): whole chunks."""
        heads, dtype = keys.shape[1], keys.dtype
        plain = rotation.undo(keys.float(), torch.arange(keys.shape[2]))
        rows = plain.transpose(1, 2).flatten(2)  # (batch, n, kv_heads x dim)
        # the leading eigenvectors of the Gram matrix are the right singular vectors
        vectors = torch.linalg.eigh(rows.mT @ rows).eigenvectors[..., -self.rank :]
        right = split(vectors.mT, 2, heads, -1).transpose(1, 2)
        chunks = split(keys, 2, -1, self.chunk)
        landmarks = chunks.float().mean(3)
        alike = cosine_similarity(landmarks[:, :, :, None], chunks.float(), dim=-1).amin(-1)
        outliers = alike.topk(min(self.outliers, alike.shape[2]), -1, largest=False).indices
        kept = chunks.gather(2, outliers[..., None, None].expand(-1, -1, -1, *chunks.shape[3:]))
        return Prompt(
            (rows @ vectors).to(dtype),
            right.to(dtype).contiguous(),
            landmarks.to(dtype),
            outliers,
            kept,
            values.clone() if self.value_bits == 16 else of_values(values, self.value_bits),
        )


class LowRankLayer(SelectiveLayer):
    def __init__(self, method: LowRankKeys, rotation: Rotation) -> None:
        super().__init__()
        self.method, self.rotation = method, rotation

    def empty(self, keys: Tensor) -> State:
        return State(None, keys[:, :, :0], keys[:, :, :0])

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.length == keys.shape[2]:  # a prompt attends to itself as it is
            self.keep(keys, values)
            return keys, values
        return super().append(keys, values)

    def keep(self, keys: Tensor, values: Tensor) -> None:
        state, method = self.state, self.method
        recent = torch.cat([state.keys, keys], 2), torch.cat([state.values, values], 2)
        self.state = State(state.prompt, *recent)
        begun = self.length - recent[0].shape[2]
        new = keys.shape[2]
        # every row reads its own and the latest keys as they are, so that the first one bounds what is
        # compressed, save in a prompt, which attends densely
        whole = self.length if new == self.length else self.length - new + 1
        due = (whole // method.chunk - method.local) * method.chunk
        if due - begun >= (AGAIN if begun or new == 1 else method.rank):
            k, v = self.everything()
            prompt = method.compress(k[:, :, :due], v[:, :, :due], self.rotation)
            self.state = State(prompt, k[:, :, due:].clone(), v[:, :, due:].clone())

    def everything(self) -> tuple[Tensor, Tensor]:
        state = self.state
        if state.prompt is None:
            return state.keys, state.values
        prompt = state.prompt
        keys = self._rebuilt(prompt.left[:, None] @ prompt.right, torch.arange(prompt.left.shape[1]))
        chunks = split(keys, 2, -1, self.method.chunk)
        index = prompt.outliers[..., None, None].expand(-1, -1, -1, *chunks.shape[3:])
        keys = chunks.scatter(2, index, prompt.outlier_keys).flatten(2, 3)
        return torch.cat([keys, state.keys], 2), torch.cat([self._values(), state.values], 2)

    def choose(self, query: Tensor, scaling: float) -> Tensor | None:
        prompt, chunk = self.state.prompt, self.method.chunk
        count = self.method.tokens // chunk
        if prompt is None or count + prompt.outliers.shape[2] >= prompt.landmarks.shape[2]:
            return None
        rows = query.shape[3]
        scores = split((query.flatten(2, 3) @ prompt.landmarks.mT).float() * scaling, 2, -1, rows)
        is_outlier = torch.zeros_like(scores[:, :, 0, 0]).scatter_(2, prompt.outliers, 1).bool()
        weights = scores.masked_fill(is_outlier[:, :, None, None], -torch.inf).softmax(-1).amax(2)
        best = weights.topk(count, -1).indices
        chunks = torch.cat([best, prompt.outliers[:, :, None].expand(-1, -1, rows, -1)], 3)
        old = (chunks[..., None] * chunk + torch.arange(chunk)).flatten(3)
        recent = torch.arange(prompt.left.shape[1], self.length).expand(*old.shape[:3], -1)
        return torch.cat([old, recent], 3)

    def gather(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """Of what `choose` gave: chunks by the landmarks, outliers, and all later positions."""
        state, prompt = self.state, self.state.prompt
        positions = chosen[:, :, : chosen.shape[2] - state.keys.shape[2]]
        rebuilt = positions[:, :, : positions.shape[2] - prompt.outlier_keys.shape[2] * self.method.chunk]
        rows = torch.arange(len(chosen))[:, None, None]
        keys = self._rebuilt(prompt.left[rows, rebuilt] @ prompt.right, rebuilt)
        return (
            torch.cat([keys, prompt.outlier_keys.flatten(2, 3), state.keys], 2),
            torch.cat([self._values(positions), state.values], 2),
        )

    def cut(self, length: int) -> None:
        """What is cut through is kept from then on as compression left it."""
        state = self.state
        if state.prompt is None or length >= state.prompt.left.shape[1]:
            begun = 0 if state.prompt is None else state.prompt.left.shape[1]
            keys, values = state.keys[:, :, : length - begun], state.values[:, :, : length - begun]
            self.state = State(state.prompt, keys.clone(), values.clone())
        else:
            keys, values = (x[:, :, :length].clone() for x in self.everything())
            self.state = State(None, keys, values)

    def _rebuilt(self, plain: Tensor, positions: Tensor) -> Tensor:
        return self.rotation.apply(plain.float(), positions).to(plain.dtype)

    def _values(self, positions: Tensor | None = None) -> Tensor:
        """Of the prompt, or of the positions ``(batch, kv_heads, count)`` in it."""
        values = self.state.prompt.values

        def some(x: Tensor) -> Tensor:
            if positions is None:
                return x
            return x.gather(2, positions[..., None].expand(-1, -1, -1, x.shape[3]))

        if isinstance(values, Tensor):
            return some(values)
        codes = Quantized(some(values.codes), some(values.scale), some(values.low), values.bits)
        return codes.expand().to(self.dtype)
