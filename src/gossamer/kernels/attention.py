"""Causal attention that looks at some blocks of keys only."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.errors import KernelError
from gossamer.kernels.native import native, native_available, tier

BLOCK = 64  # positions of a block, of queries and of keys
MOST_HEAD = 256  # numbers of a head
_DTYPES = {torch.float32: 0, torch.bfloat16: 1}


def block_count(rows: int, positions: int) -> tuple[int, int]:
    """Blocks of queries, and of keys, of ``rows`` queries that stand at the end of ``positions`` keys.

    Blocks begin at multiples of `BLOCK` positions, so the first one of the queries may be a part of one.
    """
    return (positions - 1) // BLOCK - (positions - rows) // BLOCK + 1, (positions - 1) // BLOCK + 1


def block_attention(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    blocks: Tensor | None = None,
    window: int = 0,
    isa: str | None = None,
) -> Tensor:
    """Softmax attention of ``queries (heads, rows, dim)`` to ``keys`` and ``values (kv_heads, positions,
    dim)``; gives ``(rows, heads, dim)`` in their dtype, float32 or bfloat16 (sums are float32).

    Row r stands at position ``positions - rows + r`` and sees no later one, and with ``window`` only the last
    so many, its own among them. ``blocks``, bool ``(heads, query blocks, key blocks)`` of `block_count`:
    which blocks of keys each block of queries looks at (None: all). A row that sees nothing becomes zeros. A
    block costs what it costs in dense attention, and one that is left out nothing; with all blocks set the
    result is that of None bit for bit, and a row's result depends on nothing but itself and what it sees.

    ``isa`` forces an instruction set. Raises KernelError for shapes and dtypes that do not fit.
    """
    _check(queries, keys, values, blocks, window)
    if not native_available():
        return reference(queries, keys, values, scaling=scaling, blocks=blocks, window=window)
    heads, rows, dim = queries.shape
    kv_heads, positions, _ = keys.shape
    queries, keys, values = queries.contiguous(), keys.contiguous(), values.contiguous()
    outputs = queries.new_empty((rows, heads, dim))
    offsets = indices = None
    if blocks is not None:
        counts = blocks.sum(-1, dtype=torch.int64).reshape(-1)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        indices = blocks.nonzero()[:, 2].to(torch.int32).contiguous()
    native().attend_blocks(
        [heads, kv_heads, rows, positions, dim],
        tier(isa),
        _DTYPES[queries.dtype],
        [one.data_ptr() for one in (queries, keys, values, outputs)],
        scaling,
        window,
        0 if offsets is None else offsets.data_ptr(),
        0 if indices is None else indices.data_ptr(),
        torch.get_num_threads(),
    )
    return outputs


def reference(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    scaling: float,
    blocks: Tensor | None = None,
    window: int = 0,
) -> Tensor:
    """`block_attention` in plain PyTorch, by a mask over all scores."""
    group = len(queries) // len(keys)
    seen = visible(queries.shape[1], keys.shape[1], blocks, window).expand(len(queries), -1, -1)
    k, v = (one.float().repeat_interleave(group, 0) for one in (keys, values))
    scores = (queries.float() @ k.mT * scaling).masked_fill(~seen, -torch.inf)
    weights = scores.softmax(-1).masked_fill(~seen.any(-1, keepdim=True), 0.0)
    return (weights @ v).transpose(0, 1).to(queries.dtype)


def visible(rows: int, positions: int, blocks: Tensor | None = None, window: int = 0) -> Tensor:
    """Which position each row sees: bool ``(1 or heads, rows, positions)``."""
    row = torch.arange(positions - rows, positions)[:, None]
    column = torch.arange(positions)
    seen = (column <= row)[None]
    if window:
        seen = seen & (column > row - window)
    if blocks is not None:
        of_rows = row[:, 0] // BLOCK - (positions - rows) // BLOCK
        seen = seen & blocks[:, of_rows][:, :, column // BLOCK]
    return seen


def _check(queries: Tensor, keys: Tensor, values: Tensor, blocks: Tensor | None, window: int) -> None:
    shapes = f"queries {tuple(queries.shape)}, keys {tuple(keys.shape)}, values {tuple(values.shape)}"
    if queries.ndim != 3 or keys.ndim != 3 or keys.shape != values.shape or queries.shape[2] != keys.shape[2]:
        raise KernelError(
            f"attention takes (heads, rows, dim) and twice (kv_heads, positions, dim), not {shapes}"
        )
    if 0 in queries.shape or 0 in keys.shape or len(queries) % len(keys):
        raise KernelError(f"heads of queries must share heads of keys evenly, none of them empty: {shapes}")
    if queries.shape[1] > keys.shape[1]:
        raise KernelError(f"there are more rows than positions: {shapes}")
    if queries.shape[2] > MOST_HEAD:
        raise KernelError(f"heads have at most {MOST_HEAD} numbers: {shapes}")
    if queries.dtype not in _DTYPES or {keys.dtype, values.dtype} != {queries.dtype}:
        raise KernelError(
            f"attention takes float32 or bfloat16 throughout, not {queries.dtype}, {keys.dtype} and "
            f"{values.dtype}"
        )
    if any(not one.is_cpu for one in (queries, keys, values)):
        raise KernelError("attention runs on the CPU")
    if torch.is_grad_enabled() and any(one.requires_grad for one in (queries, keys, values)):
        raise KernelError("this attention has no gradient: call it under torch.no_grad()")
    if window < 0:
        raise KernelError(f"a window has at least one position (0: no window), not {window}")
    if blocks is not None:
        wanted = (len(queries), *block_count(queries.shape[1], keys.shape[1]))
        if blocks.dtype != torch.bool or tuple(blocks.shape) != wanted:
            raise KernelError(f"blocks must be bool {wanted}, not {blocks.dtype} {tuple(blocks.shape)}")
