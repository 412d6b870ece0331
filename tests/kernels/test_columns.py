"""The layout columns: the bits of dense, whatever share of the inputs is zero."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from kernel_cases import check_product, handle_of, tiers
from kernel_packer import Weight, random_weight
from torch import Tensor

from gossamer import kernels

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

ZEROS = (0.0, 0.3, 0.5, 0.9, 0.99, 1.0)  # on both sides of the gate
each_tier = pytest.mark.parametrize("isa", tiers())


def activations(rows: int, cols: int, zeros: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=generator)
    return x * (torch.rand(rows, cols, generator=generator) >= zeros)


def both(values: str, out: int, cols: int, group: int) -> tuple[Weight, Weight]:
    dense = random_weight("dense", values, out, cols, group)
    return dense, replace(dense, layout="columns")


@each_tier
@pytest.mark.parametrize(("values", "group"), [("int8", 64), ("int8", 32), ("int4", 64), ("int4", 32)])
@pytest.mark.parametrize(("out", "cols"), [(17, 130), (128, 64), (300, 321), (520, 2200)])
def test_integer_products_are_those_of_dense(values: str, group: int, out: int, cols: int, isa: str) -> None:
    dense, columns = (handle_of(w) for w in both(values, out, cols, group))
    for seed, zeros in enumerate(ZEROS):
        for rows in (1, 2, 5, 17):
            x = activations(rows, cols, zeros, seed)
            for given in (x, -x, x * 1e-42, x * 1e36, x.bfloat16()):
                want, got = kernels.matmul(dense, given, isa), kernels.matmul(columns, given, isa)
                bits = torch.int16 if given.dtype == torch.bfloat16 else torch.int32
                same = (got.view(bits) == want.view(bits)) | (got.isnan() & want.isnan())
                assert same.all(), (zeros, rows)


@each_tier
@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_group_without_numbers_reaches_all_outputs(values: str, bad: float, isa: str) -> None:
    dense, columns = (handle_of(w) for w in both(values, 140, 200, 32))
    for zeros in (0.0, 0.9, 1.0):
        x = activations(3, 200, zeros)
        x[1, 70] = bad
        want, got = kernels.matmul(dense, x, isa), kernels.matmul(columns, x, isa)
        assert torch.equal(got.isnan(), want.isnan())
        assert got[1].isnan().all()
        assert torch.equal(got[[0, 2]], want[[0, 2]])


@each_tier
@pytest.mark.parametrize("values", ["bfloat16", "float32"])
@pytest.mark.parametrize(("out", "cols"), [(17, 130), (128, 64), (300, 321)])
def test_float_products_whatever_is_zero(values: str, out: int, cols: int, isa: str) -> None:
    _, w = both(values, out, cols, 64)
    handle = handle_of(w)
    for seed, zeros in enumerate(ZEROS):
        for rows in (1, 3, 20):
            x = activations(rows, cols, zeros, seed)
            y = kernels.matmul(handle, x, isa)
            check_product(w, x, y)
            for row in range(rows):
                assert torch.equal(kernels.matmul(handle, x[row], isa), y[row])
            if zeros == 1:
                assert not y.any()


@each_tier
@pytest.mark.parametrize("values", ["bfloat16", "int4"])
def test_inputs_of_zero_are_not_read(values: str, isa: str) -> None:
    # what their weights are makes no difference: here some of them are changed
    w = both(values, 300, 256, 64)[1]
    x = activations(2, 256, 0.9)
    unused = (x == 0).all(dim=0).numpy()
    other = replace(w, stored=w.stored.copy())
    other.stored[:, unused] = 3
    assert torch.equal(kernels.matmul(handle_of(other), x, isa), kernels.matmul(handle_of(w), x, isa))
    if values == "bfloat16":  # not multiplied by zero: left out
        other.stored[:, unused] = float("inf")
        assert torch.equal(kernels.matmul(handle_of(other), x, isa), kernels.matmul(handle_of(w), x, isa))


@each_tier
@pytest.mark.parametrize("values", ["bfloat16", "int4"])
def test_threads_share_ragged_panels(values: str, isa: str) -> None:
    handle = handle_of(both(values, 1400, 300, 64)[1])
    x = activations(3, 300, 0.5)
    whole = kernels.matmul(handle, x, isa)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        for row in range(3):
            assert torch.equal(kernels.matmul(handle, x[row], isa), whole[row])
