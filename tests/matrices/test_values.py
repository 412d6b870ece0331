"""Scales and codes against brute force, and what clamping, masks and importances mean."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.errors import MatrixError
from gossamer.matrices.values import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    VALUES,
    ValueType,
    choose_scales,
    nearest_,
    quantize,
    quantize_codes,
    value_type,
)

INTEGERS = ("int8", "int4", "int3", "nl4", "nl3")


def nearest(x: np.ndarray, values: ValueType) -> np.ndarray:
    """The integers of ``values`` next to ``x``, by trying each."""
    if not values.levels:
        return np.clip(np.rint(x), values.qmin, values.qmax)
    levels = np.array(values.levels, float)
    return levels[np.abs(x[..., None] - levels).argmin(-1)]


def measured_error(w: Tensor, scale: Tensor, values: ValueType, weigh: Tensor) -> np.ndarray:
    """Weighted squared error of each row, by numpy in float64."""
    s = scale.double().numpy()[:, None]
    x = w.double().numpy()
    q = nearest(x / s, values)
    return np.asarray((weigh.double().numpy() * (x - s * q) ** 2).sum(axis=1))


def exhaustive_error(w: Tensor, values: ValueType, weigh: Tensor) -> np.ndarray:
    """Least error over 800 scales, each also refined once by its closed form."""
    x, imp = w.double().numpy(), weigh.double().numpy()
    peak = x[np.arange(len(x)), np.abs(x).argmax(axis=1)]
    best = np.full(len(x), np.inf)
    for sign in (1, -1):
        for fraction in np.linspace(0.25, 1.3, 400):
            scale = torch.tensor(sign * peak * fraction / values.qmax).half()
            best = np.minimum(best, measured_error(w, scale, values, weigh))
            q = nearest(x / scale.double().numpy()[:, None], values)
            above, below = (imp * x * q).sum(axis=1), (imp * q * q).sum(axis=1)
            refined = torch.tensor(np.where(below > 0, above / np.maximum(below, 1e-30), scale)).half()
            best = np.minimum(best, measured_error(w, refined, values, weigh))
    return best


def samples() -> dict[str, tuple[Tensor, Tensor | None]]:
    generator = torch.Generator().manual_seed(0)
    gauss = torch.randn(500, 64, generator=generator) * 0.05
    skew = torch.rand(64, generator=generator).pow(4) * 10 + 0.01  # three decades
    pruned = gauss * (gauss.abs() >= gauss.abs().median(dim=1, keepdim=True).values)
    tails = gauss / torch.rand(500, 1, generator=generator).sqrt() * (1 + 3 * (gauss.abs() > 0.12))
    return {
        "gauss": (gauss, None),
        "weighted": (gauss, skew),
        "pruned": (pruned, None),
        "tails": (tails, None),
    }


@pytest.mark.parametrize(
    ("name", "bound"), [("int8", 1.2), ("int4", 1.01), ("int3", 1.005), ("nl4", 1.02), ("nl3", 1.01)]
)
@pytest.mark.parametrize(
    "kind", ["gauss", "weighted", "pruned", pytest.param("tails", marks=pytest.mark.slow)]
)
def test_scales_near_the_exhaustive_optimum(name: str, bound: float, kind: str) -> None:
    values = value_type(name)
    w, importance = samples()[kind]
    if name in ("int8", "nl4", "nl3"):
        w = w[:200]
    weigh = torch.ones(64) if importance is None else importance
    scales, clamped = choose_scales(w, values, importance=importance)
    got = measured_error(w, scales, values, weigh).mean()
    best = exhaustive_error(w, values, weigh).mean()
    assert clamped == 0
    assert scales.dtype == torch.float16
    assert got <= bound * best


@pytest.mark.parametrize("name", INTEGERS)
@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(1, 64), kept=st.floats(0.0, 1.0), power=st.floats(-3, 3))
def test_never_worse_than_absmax(name: str, seed: int, n: int, kept: float, power: float) -> None:
    values = value_type(name)
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(16, n, generator=generator) * 10.0**power
    mask = torch.rand(16, n, generator=generator) < kept
    importance = torch.rand(16, n, generator=generator)
    scales, _ = choose_scales(w, values, mask, importance)
    weigh = importance * mask
    absmax = (w * mask).abs().amax(dim=1) / values.qmax
    absmax = absmax.clamp(SMALLEST_SCALE, LARGEST_SCALE).half()
    if values.levels:  # their two ends differ by more than a step: which of them the peak meets matters
        peak = (w * mask).gather(1, (w * mask).abs().argmax(1, keepdim=True))[:, 0]
        absmax = torch.copysign(absmax, peak)
    got = measured_error(w, scales, values, weigh)
    plain = measured_error(w, absmax, values, weigh)
    assert (got <= plain * (1 + 1e-4) + 1e-12 * 10.0 ** (2 * power)).all()


def test_negative_scale_uses_the_longer_side() -> None:
    # 8 is reached only below zero: a scale of -1 holds all three exactly, a positive one cannot
    w = torch.tensor([[8.0, -7.0, 1.0]])
    scales, _ = choose_scales(w, value_type("int4"))
    assert scales.tolist() == [-1.0]
    assert quantize_codes(w, scales, value_type("int4")).tolist() == [[-8, 7, -1]]


def test_codes_round_half_to_even_with_the_rounded_scale() -> None:
    codes = quantize_codes(torch.tensor([[0.5, 1.5, 2.5, -0.5, 99.0, -99.0]]), torch.tensor([1.0]).half(),
                           value_type("int3"))  # fmt: skip
    assert codes.tolist() == [[0, 2, 2, 0, 3, -4]]
    # 0.1 in float16 is 0.0999756: 0.35 / that is 3.5009, though 0.35 / 0.1 rounds to an even 3.5 -> 4
    third = torch.tensor([0.1]).half()
    assert float(third) < 0.1
    assert quantize_codes(torch.tensor([[0.25]]), third, value_type("int4")).tolist() == [[3]]


def test_pruned_weights_and_unimportant_ones_do_not_move_the_scale() -> None:
    values = value_type("int4")
    w = torch.tensor([[8.0, -2.0, 3.3, 1000.0]])
    mask = torch.tensor([[True, True, True, False]])
    scales, _ = choose_scales(w, values, mask)
    alone, _ = choose_scales(w[:, :3], values)
    assert torch.equal(scales, alone)
    weighted, _ = choose_scales(w[:, :3], values, importance=torch.tensor([1.0, 1.0, 0.0]))
    assert weighted.tolist() == [-1.0]  # exact for 8 and -2, whatever happens to 3.3


def test_clamping_is_counted() -> None:
    values = value_type("int4")
    w = torch.tensor([[0.0, 0.0], [1e-6, -1e-6], [-1e7, 3.0], [0.5, 0.5], [5.0, 5.0]])
    mask = torch.ones_like(w, dtype=torch.bool)
    mask[4] = False
    scales, clamped = choose_scales(w, values, mask)
    assert clamped == 2  # the tiny group and the huge one; nothing is lost in zeros or in a pruned group
    assert scales[0] == scales[4] == SMALLEST_SCALE
    assert abs(float(scales[1])) == SMALLEST_SCALE
    assert abs(float(scales[2])) == LARGEST_SCALE
    whole = quantize(w, values, mask=mask)
    assert whole.clamped == 2
    assert torch.isfinite(whole.to_dense()).all()
    assert whole.q[4].tolist() == [0, 0]
    assert choose_scales(torch.full((1, 4), 3e38), values)[1] == 1


@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("name", INTEGERS)
def test_quantize_goes_group_by_group(name: str, group: int) -> None:
    values = value_type(name)
    generator = torch.Generator().manual_seed(1)
    w = torch.randn(5, 150, generator=generator)
    mask = torch.rand(5, 150, generator=generator) < 0.6
    diagonal = torch.rand(150, generator=generator)
    whole = quantize(w, values, group, mask, diagonal)
    assert whole.q.shape == (5, 150)
    assert whole.scales.shape == (5, -(-150 // group))
    assert not whole.q[~mask].any()
    for index in range(whole.scales.shape[1]):
        part = slice(index * group, (index + 1) * group)
        scales, _ = choose_scales(w[:, part], values, mask[:, part], diagonal[part])
        assert torch.equal(scales, whole.scales[:, index])
        codes = quantize_codes(w[:, part], scales, values) * mask[:, part]
        assert torch.equal(codes, whole.q[:, part])
        expected = whole.q[:, part].float() * scales.float()[:, None]
        assert torch.equal(whole.to_dense()[:, part], expected)


def test_chunks_do_not_show() -> None:
    w = torch.randn(1100, 33, generator=torch.Generator().manual_seed(2))
    importance = torch.rand(1100, 33, generator=torch.Generator().manual_seed(3))
    together, _ = choose_scales(w, value_type("int4"), importance=importance)
    apart = [choose_scales(w[i : i + 1], value_type("int4"), importance=importance[i : i + 1])[0] for i in
             (0, 511, 512, 1024, 1099)]  # fmt: skip
    assert torch.equal(together[[0, 511, 512, 1024, 1099]], torch.cat(apart))


def test_importance_scale_does_not_matter() -> None:
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(4))
    importance = torch.rand(64, generator=torch.Generator().manual_seed(5))
    small, _ = choose_scales(w, value_type("int4"), importance=importance * 2.0**-100)
    large, _ = choose_scales(w, value_type("int4"), importance=importance * 2.0**100)
    assert torch.equal(small, large)
    none, _ = choose_scales(w, value_type("int4"), importance=torch.zeros(64))
    assert torch.equal(none, choose_scales(w, value_type("int4"))[0])


def test_bad_input() -> None:
    values = value_type("int4")
    w = torch.ones(2, 4)
    for bad in (float("nan"), float("inf")):
        broken = w.clone()
        broken[1, 2] = bad
        with pytest.raises(MatrixError, match="NaN or infinity"):
            choose_scales(broken, values)
        with pytest.raises(MatrixError, match="NaN or infinity"):
            quantize(broken, values)
    with pytest.raises(MatrixError, match="at least 0"):
        choose_scales(w, values, importance=torch.tensor([1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(MatrixError, match="importances are"):
        choose_scales(w, values, importance=torch.ones(3))
    with pytest.raises(MatrixError, match="mask"):
        choose_scales(w, values, mask=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(MatrixError, match="int8, int4, int3, nl4 or nl3"):
        choose_scales(w, value_type("float32"))
    with pytest.raises(MatrixError, match="64 or 32"):
        quantize(w, values, group=48)
    with pytest.raises(MatrixError, match="float32, bfloat16, int8, int4, int3"):
        value_type("int5")


def test_levels_beat_uniform_steps_where_weights_are_many_near_zero() -> None:
    w, _ = samples()["gauss"]
    pruned, _ = samples()["pruned"]
    mask = pruned != 0

    def error(w: Tensor, name: str, mask: Tensor | None = None) -> float:
        return float((quantize(w, value_type(name), 64, mask).to_dense() - w).square().sum())

    assert error(w, "nl4") < 0.88 * error(w, "int4")
    assert error(w, "nl3") < 0.93 * error(w, "int3")
    assert error(pruned, "nl3", mask) > error(pruned, "int3", mask)  # a mask has pruned just those


def test_without_a_zero_pruned_weights_are_zero_and_kept_ones_are_not() -> None:
    gap = ValueType("gap", 3, True, (-30, -19, -12, -6, 5, 11, 17, 23))
    assert not gap.has_zero
    w, mask = torch.randn(20, 128), torch.rand(20, 128) < 0.5
    codes = quantize(w, gap, 64, mask)
    assert torch.equal(codes.q != 0, mask)
    assert set(codes.q[mask].tolist()) <= set(gap.levels)
    moved = quantize(torch.where(mask, w, 1e3), gap, 64, mask)  # what is pruned has no say
    assert torch.equal(moved.q, codes.q)
    assert torch.equal(moved.scales, codes.scales)


@pytest.mark.parametrize("name", INTEGERS)
def test_the_nearest_integer_of_any_number(name: str) -> None:
    values = value_type(name)
    halves = torch.arange(-300, 301) / 2  # ties among them, and numbers beyond both ends
    apart = torch.cat([torch.nextafter(halves, torch.tensor(end)) for end in (-1e9, 1e9)])
    x = torch.cat([halves, apart, torch.tensor([1e30, -1e30, float("inf"), float("-inf"), 1e-40, -0.0])])
    got = nearest_(x.clone(), values)
    assert np.array_equal(got.numpy(), nearest(x.clamp(-1e6, 1e6).double().numpy(), values))
    narrow = x[:480].clone().reshape(8, 60)[:, 3:50]  # rows that do not lie behind each other
    assert torch.equal(nearest_(narrow, values), got[:480].reshape(8, 60)[:, 3:50])
    broken = nearest_(torch.tensor([float("nan")]), values)
    assert torch.equal(broken, torch.tensor([float(values.qmax)])) or broken.isnan().all()


def test_tables_fit_what_multiplies_them() -> None:
    for value in VALUES.values():
        if value.levels:
            assert len(value.levels) == 2**value.bits
            assert sorted(set(value.levels)) == list(value.levels)
            assert min(value.levels) >= -64  # 64 above them: seven bits
            assert max(value.levels) <= 63
            assert torch.equal(value.integers(value.codes(torch.tensor(value.levels))).long(),
                               torch.tensor(value.levels))  # fmt: skip


def test_formats() -> None:
    assert {name: value.bits for name, value in VALUES.items()} == {
        "float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int3": 3, "nl4": 4, "nl3": 3,
    }  # fmt: skip
    assert (VALUES["int3"].qmin, VALUES["int3"].qmax, VALUES["int3"].zero_code) == (-4, 3, 4)
    assert value_type("bf16").dtype == torch.bfloat16
    with pytest.raises(MatrixError):
        _ = value_type("float32").qmin
