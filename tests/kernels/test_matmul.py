"""Every kernel gives the product that the reference defines, whatever the layout, values and processor."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from kernel_cases import (
    BITS,
    FORMATS,
    PACKED,
    SKIPPED_BLOCKS,
    VALUES,
    case,
    check_product,
    handle_of,
    same_bits,
    tiers,
)
from kernel_packer import Weight, random_weight, with_mask

from gossamer import kernels
from gossamer.errors import KernelError

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

SHAPES = [(17, 130), (1, 1), (192, 64), (16, 64), (33, 63), (5, 321)]
each_tier = pytest.mark.parametrize("isa", tiers())
each_format = pytest.mark.parametrize(("layout", "values"), FORMATS)
each_packed = pytest.mark.parametrize(("layout", "values", "group"), PACKED)


@each_tier
@each_packed
def test_small_products(layout: str, values: str, group: int, isa: str) -> None:
    for out, cols in SHAPES:
        w, handle = case(layout, values, out, cols, group)
        for rows in (1, 2, 3, 5, 8, 9, 17, 21):
            x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
            y = kernels.matmul(handle, x, isa)
            check_product(w, x, y, isa)
            if isa == "portable" and values in BITS:  # the same operations in the same order
                assert torch.equal(y, w.reference(x))
            check_product(w, x.bfloat16(), kernels.matmul(handle, x.bfloat16(), isa), isa)


@each_tier
@pytest.mark.parametrize(
    ("layout", "values", "out", "cols"),
    [
        ("dense", "int4", 1536, 576),
        ("32:64", "int4", 1536, 576),
        ("bitmap", "int3", 576, 576),
        ("bitmap", "bfloat16", 576, 576),
        ("32:64", "float32", 576, 576),
        ("1:64", "int8", 64, 192),
        ("64:64", "int3", 64, 192),
        ("63:64", "int4", 64, 192),
        ("33:64", "int3", 64, 192),
        ("50:64", "bfloat16", 64, 192),
        ("16x4", "int4", 576, 576),
        ("16x4", "bfloat16", 576, 576),
        ("columns", "int4", 600, 576),
        ("columns", "bfloat16", 300, 576),
    ],
)
def test_products_of_model_size(layout: str, values: str, out: int, cols: int, isa: str) -> None:
    w, handle = case(layout, values, out, cols)
    for rows in (1, 13, 70):
        x = torch.randn(rows, cols, generator=torch.Generator().manual_seed(rows))
        check_product(w, x, kernels.matmul(handle, x, isa), isa)


@each_tier
@each_format
@pytest.mark.parametrize("density", [0.0, 0.02, 1.0])
def test_empty_full_and_nearly_empty(layout: str, values: str, density: float, isa: str) -> None:
    for out, cols in [(40, 200), (16, 64), (3, 3)]:
        w, handle = case(layout, values, out, cols, 64, density)
        for rows in (1, 9):
            x = torch.randn(rows, cols)
            check_product(w, x, kernels.matmul(handle, x, isa), isa)


@each_tier
@pytest.mark.parametrize(("layout", "values"), [f for f in FORMATS if f[1] in BITS])
def test_integer_sums_are_exact(layout: str, values: str, isa: str) -> None:
    # scales of 1 and activations that are their own codes: every result is an integer below 2**24
    w = random_weight(layout, values, 48, 320)
    w.scales = np.ones_like(w.scales)
    codes = np.random.default_rng(1).integers(-127, 128, (11, 320))
    codes[:, ::64] = 127
    y = kernels.matmul(handle_of(w), torch.from_numpy(codes.astype(np.float32)), isa)
    assert np.array_equal(y.numpy(), codes @ w.stored.T)


@each_tier
@each_packed
def test_a_row_depends_on_its_input_only(layout: str, values: str, group: int, isa: str) -> None:
    _, handle = case(layout, values, 200, 200, group)
    x = torch.randn(100, 200, generator=torch.Generator().manual_seed(0))
    whole = kernels.matmul(handle, x, isa)
    alone = torch.cat([kernels.matmul(handle, row[None], isa) for row in x])
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in (*range(1, 18), 64, 100):
            first = (37 * rows) % (101 - rows)
            part = kernels.matmul(handle, x[first : first + rows], isa)
            want = whole if same_bits(handle, isa, rows, 100) else alone
            assert torch.equal(part, want[first : first + rows]), (threads, rows)


@each_tier
@each_format
def test_sums_wait_exactly_between_spans_of_groups(layout: str, values: str, isa: str) -> None:
    # 2,200 inputs: more than many rows take at a time
    w, handle = case(layout, values, 20, 2200)
    x = torch.randn(21, 2200, generator=torch.Generator().manual_seed(0))
    whole = kernels.matmul(handle, x, isa)
    check_product(w, x, whole, isa)
    alone = torch.stack([kernels.matmul(handle, row, isa) for row in x])
    if same_bits(handle, isa, 1, 21):
        assert torch.equal(alone, whole)
    check_product(w, x, alone, isa)


@each_tier
@pytest.mark.parametrize("values", VALUES)
def test_short_last_groups_of_whole_steps(values: str, isa: str) -> None:
    # the last two panel-groups both end within what registers read past the section
    mask = np.zeros((16, 132), bool)
    mask[:, 40:44] = mask[:, 64:72] = mask[:, 128:] = True
    w = with_mask("16x4", values, mask, 64, np.random.default_rng(0))
    for rows in (1, 3, 20):
        x = torch.randn(rows, 132, generator=torch.Generator().manual_seed(rows))
        check_product(w, x, kernels.matmul(handle_of(w), x, isa), isa)


@each_tier
def test_chunks_of_many_rows_agree_with_single_rows(isa: str) -> None:
    _, handle = case("32:64", "int4", 32, 3000)
    x = torch.randn(401, 3000)
    whole = kernels.matmul(handle, x, isa)
    for row in (0, 63, 64, 170, 399, 400):
        assert torch.equal(kernels.matmul(handle, x[row], isa), whole[row])


@each_tier
@each_packed
def test_matrices_of_zeros(layout: str, values: str, group: int, isa: str) -> None:
    w, handle = case(layout, values, 33, 130, group)
    zeros = handle_of(replace(w, stored=np.zeros_like(w.stored)))  # kept, but zero
    for rows in (1, 9):
        x = torch.randn(rows, 130)
        assert not kernels.matmul(zeros, x, isa).any()
        for zero in (0.0, -0.0):
            assert not kernels.matmul(handle, x * zero, isa).any()


@each_tier
@each_packed
def test_an_infinity_or_nan_stays_in_its_row(layout: str, values: str, group: int, isa: str) -> None:
    w, handle = case(layout, values, 33, 130, group)
    for rows in (3, 12):
        x = torch.randn(rows, 130)
        clean = kernels.matmul(handle, x, isa)
        for bad in (float("nan"), float("inf"), -float("inf")):
            for place in (0, 70, 129):
                spoilt = x.clone()
                spoilt[1, place] = bad
                y = kernels.matmul(handle, spoilt, isa)
                others = [0, *range(2, rows)]
                assert torch.equal(y[others], clean[others])
                check_product(w, spoilt, y, isa)
                if layout not in SKIPPED_BLOCKS and (bad != bad or values in BITS):
                    assert y[1].isnan().all()


@each_tier
@pytest.mark.parametrize(("layout", "values"), [f for f in FORMATS if f[1] not in BITS])
def test_infinite_and_nan_weights_stay_in_their_output(layout: str, values: str, isa: str) -> None:
    w = random_weight(layout, values, 33, 130)
    for output, bad in [(3, float("nan")), (20, float("inf")), (32, -float("inf"))]:
        w.stored[output, np.flatnonzero(w.mask[output])[-1]] = bad
    handle = handle_of(w)
    for rows in (1, 12):
        x = torch.randn(rows, 130)
        y = kernels.matmul(handle, x, isa)
        check_product(w, x, y, isa)
        assert (~y.isfinite()).any(0).nonzero().flatten().tolist() == [3, 20, 32]


@each_tier
@each_format
def test_subnormal_huge_and_signed_zero_inputs(layout: str, values: str, isa: str) -> None:
    w, handle = case(layout, values, 33, 130)
    for scale in (0.0, -0.0, 1e-44, 1e-39, 1e-30, 1e30):
        x = torch.randn(4, 130) * scale
        y = kernels.matmul(handle, x, isa)
        check_product(w, x, y, isa)
        if scale == 0:
            assert not y.any()


@each_tier
@pytest.mark.parametrize("values", ["float32", "bfloat16"])
def test_weights_with_signed_zeros_and_subnormals(values: str, isa: str) -> None:
    w = random_weight("bitmap", values, 20, 70)
    w.stored[w.mask] = np.resize(np.array([-0.0, 0.0, 1e-40, -3.0, 1e30], np.float32), w.mask.sum())
    w.stored = torch.from_numpy(w.stored).to(getattr(torch, values)).float().numpy()
    x = torch.randn(3, 70)
    check_product(w, x, kernels.matmul(handle_of(w), x, isa), isa)


def test_activation_codes_round_half_to_even() -> None:
    # one weight a row picks out one activation: its code is the result
    w = with_mask("dense", "int8", np.ones((64, 64), bool), 64, np.random.default_rng(0))
    w.stored = np.eye(64, dtype=np.int64)
    w.scales = np.ones_like(w.scales)
    x = torch.zeros(1, 64)
    x[0, :8] = torch.tensor([127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5])
    for isa in kernels.available():
        y = kernels.matmul(handle_of(w), x, isa)
        assert y[0, :8].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@each_format
def test_the_check_sees_one_wrong_value(layout: str, values: str) -> None:
    w = random_weight(layout, values, 128, 128, density=1.0)
    sections = w.sections()
    sections["values"][70] ^= 0x01 if values == "int8" else 0x10  # one stored value of the first panel-group
    handle = kernels.make_handle(layout, values, 128, 128, 64, sections)
    x = torch.randn(4, 128)
    for isa in kernels.available():
        with pytest.raises(AssertionError, match="results are wrong"):
            check_product(w, x, kernels.matmul(handle, x, isa), isa)


def test_shapes_strides_and_dtypes() -> None:
    w, handle = case("dense", "int4", 17, 130)
    assert kernels.matmul(handle, torch.zeros(2, 3, 130)).shape == (2, 3, 17)
    assert kernels.matmul(handle, torch.zeros(130)).shape == (17,)
    assert kernels.matmul(handle, torch.zeros(0, 130)).shape == (0, 17)
    x = torch.randn(130, 6).T
    check_product(w, x, kernels.matmul(handle, x))
    with pytest.raises(KernelError, match="float64"):
        kernels.matmul(handle, torch.zeros(1, 130).double())
    with pytest.raises(KernelError, match="130 inputs"):
        kernels.matmul(handle, torch.zeros(1, 131))
    with pytest.raises(KernelError, match="CPU"):
        kernels.matmul(handle, torch.zeros(1, 130, device="meta"))
    with pytest.raises(KernelError, match="unknown instruction set"):
        kernels.matmul(handle, torch.zeros(1, 130), "sse9")


def test_weights_are_used_in_place_and_unaligned_ones_copied() -> None:
    w: Weight = random_weight("bitmap", "int4", 40, 200)
    sections = w.sections()
    room = {
        name: torch.zeros(t.numel() * t.element_size() + 128, dtype=torch.uint8)
        for name, t in sections.items()
    }
    for shift in (0, 8, 24):
        moved = {}
        for name, t in sections.items():
            start = -room[name].data_ptr() % 64 + shift
            view = room[name][start : start + t.numel() * t.element_size()].view(t.dtype)
            moved[name] = view.copy_(t)
        handle = kernels.make_handle("bitmap", "int4", 40, 200, 64, moved)
        for name, t in handle.sections.items():
            assert t.data_ptr() % 64 == 0
            assert (t.data_ptr() == moved[name].data_ptr()) == (shift == 0)
        x = torch.randn(2, 200)
        check_product(w, x, kernels.matmul(handle, x))
