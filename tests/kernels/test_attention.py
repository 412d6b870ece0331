"""Block-sparse attention against plain PyTorch, and what it promises besides."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import kernels
from gossamer.errors import KernelError
from gossamer.kernels.attention import BLOCK, MOST_HEAD, block_attention, block_count, reference
from gossamer.kernels.native import native

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

TIERS = kernels.available() if kernels.native_available() else ("portable",)


def made(
    heads: int, kv_heads: int, rows: int, positions: int, dim: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = (heads, rows, dim), (kv_heads, positions, dim), (kv_heads, positions, dim)
    queries, keys, values = (torch.randn(shape, generator=g) for shape in shapes)
    return (2 * queries).to(dtype), keys.to(dtype), values.to(dtype)


def some_blocks(heads: int, rows: int, positions: int, share: float, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.rand((heads, *block_count(rows, positions)), generator=g) < share


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(), isa=st.sampled_from(kernels.available() if kernels.native_available() else ("portable",))
)
def test_it_is_softmax_over_what_is_looked_at(data: Any, isa: str) -> None:
    kv_heads, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    positions = data.draw(st.integers(1, 400))
    rows = data.draw(st.integers(1, positions))
    dim = data.draw(st.sampled_from([2, 16, 20, 64, 80, 256]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    window = data.draw(st.sampled_from([0, 1, 5, 64, 130]))
    heads = kv_heads * group
    q, k, v = made(heads, kv_heads, rows, positions, dim, dtype, data.draw(st.integers(0, 99)))
    share = data.draw(st.sampled_from([None, 0.0, 0.3, 1.0]))
    blocks = None if share is None else some_blocks(heads, rows, positions, share)
    options: dict[str, Any] = {"scaling": dim**-0.5, "blocks": blocks, "window": window}
    got = block_attention(q, k, v, isa=isa, **options)
    want = reference(q, k, v, **options)
    # bfloat16: of weights and outputs, each to 2**-9 of what they are
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    assert got.dtype == dtype
    assert float((got.float() - want.float()).abs().max()) <= bound * float(v.float().abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_blocks_are_dense_attention_bit_for_bit(dtype: torch.dtype) -> None:
    q, k, v = made(6, 2, 300, 700, 64, dtype)
    full = torch.ones((6, *block_count(300, 700)), dtype=torch.bool)
    dense = block_attention(q, k, v, scaling=0.125)
    assert torch.equal(block_attention(q, k, v, scaling=0.125, blocks=full), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_itself_and_what_it_sees_alone(dtype: torch.dtype) -> None:
    q, k, v = made(4, 2, 500, 500, 32, dtype)
    blocks = some_blocks(4, 500, 500, 0.4)
    whole = block_attention(q, k, v, scaling=0.2, blocks=blocks)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert torch.equal(block_attention(q, k, v, scaling=0.2, blocks=blocks), whole)
    finally:
        torch.set_num_threads(before)
    # what comes later is not seen: chunks of a prompt give its rows (by tiles: chunks of more than 16)
    at = 0
    tiles = dtype == torch.bfloat16 and kernels.isa() == "amx"
    for end in (17, 64, 199, 216, 500) if tiles else (1, 63, 64, 200, 500):
        some = blocks[:, at // BLOCK : (end - 1) // BLOCK + 1, : (end - 1) // BLOCK + 1]
        part = block_attention(q[:, at:end], k[:, :end], v[:, :end], scaling=0.2, blocks=some)
        assert torch.equal(part, whole[at:end])
        at = end
    # and what is not looked at has no effect, whatever it is
    k, v = k.clone(), v.clone()
    k[:, 320:384], v[:, 320:384] = torch.nan, torch.inf
    blocks[:, :, 5] = False
    assert block_attention(q, k, v, scaling=0.2, blocks=blocks).isfinite().all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dim", [16, 48, 64, 80])
def test_many_rows_and_few_agree(dtype: torch.dtype, isa: str, dim: int) -> None:
    """The same bits but for bfloat16 by tiles, where few rows add in another order."""
    q, k, v = made(2, 1, 190, 333, dim, dtype)
    blocks = some_blocks(2, 190, 333, 0.6)
    whole = block_attention(q, k, v, scaling=0.2, blocks=blocks, isa=isa)
    for row in (0, 40, 189):
        end = 333 - 190 + row + 1
        of_row = (end - 1) // BLOCK
        one = block_attention(
            q[:, row : row + 1],
            k[:, :end],
            v[:, :end],
            scaling=0.2,
            blocks=blocks[:, of_row - (333 - 190) // BLOCK, : of_row + 1][:, None],
            isa=isa,
        )
        if isa == "amx" and dtype == torch.bfloat16:
            assert float((one[0].float() - whole[row].float()).abs().max()) <= 2e-2 * float(
                v.float().abs().max()
            )
        else:
            assert torch.equal(one[0], whole[row])


def test_python_and_the_kernels_mean_the_same_blocks() -> None:
    assert (native().attention_block, native().most_head) == (BLOCK, MOST_HEAD)


def test_rows_that_see_nothing_are_zeros_and_no_number_stays_none() -> None:
    q, k, v = made(2, 1, 100, 100, 16, torch.float32)
    nothing = torch.zeros((2, *block_count(100, 100)), dtype=torch.bool)
    assert not block_attention(q, k, v, scaling=1.0, blocks=nothing).any()
    k[0, 50, 3] = math.nan
    got = block_attention(q, k, v, scaling=1.0)
    assert got[:50].isfinite().all()
    assert got[50:].isnan().all()


def test_what_does_not_fit_is_refused() -> None:
    q, k, v = made(4, 2, 10, 20, 16, torch.float32)
    wrong: list[tuple[tuple[Tensor, Tensor, Tensor], dict[str, Any], str]] = [
        ((q[0], k, v), {}, "takes"),
        ((q, k, v[:, :5]), {}, "takes"),
        ((q[:3], k, v), {}, "evenly"),
        ((q[:, :0], k, v), {}, "empty"),
        ((q, k[:, :5], v[:, :5]), {}, "more rows"),
        ((q.double(), k.double(), v.double()), {}, "float32 or bfloat16"),
        ((q.bfloat16(), k, v), {}, "throughout"),
        ((q.repeat(1, 1, 32), k.repeat(1, 1, 32), v.repeat(1, 1, 32)), {}, "at most 256"),
        ((q, k, v), {"window": -1}, "window"),
        ((q, k, v.clone().requires_grad_()), {}, "no gradient"),
        ((q, k, v), {"blocks": torch.ones(4, 1, 2, dtype=torch.bool)}, "blocks must be"),
        ((q, k, v), {"blocks": torch.ones(4, 1, 1)}, "blocks must be"),
    ]
    for arrays, options, said in wrong:
        with pytest.raises(KernelError, match=said):
            block_attention(*arrays, scaling=1.0, **options)
