"""The packed leaf: products against the reference, rows, gradients, and what moving and loading do to it."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import torch
from torch import Tensor

from gossamer import kernels
from gossamer.errors import MatrixError
from gossamer.kernels import reference
from gossamer.matrices import (
    VALUES,
    Dense,
    Packed,
    Sparse,
    Sum,
    fit_error,
    from_description,
    pack,
    quantize,
    value_type,
)

INTEGERS = ("int8", "int4", "int3", "nl4", "nl3")
LAYOUTS = ("dense", "columns", "bitmap", "32:64")
NO_COLUMNS = ("int3", "nl4", "nl3")
FORMATS = [(n, layout) for layout in LAYOUTS for n in VALUES if layout != "columns" or n not in NO_COLUMNS]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def masked(out: int, width: int, seed: int = 0) -> Tensor:
    return Sparse.fit(random(out, width, seed=seed), pattern="32:64").mask


def make(name: str, layout: str, out: int = 50, width: int = 200, group: int = 64, seed: int = 0) -> Packed:
    mask = None if layout in ("dense", "columns") else masked(out, width, seed)
    return pack(random(out, width, seed=seed), name, layout, group, mask)


def expected(packed: Packed, x: Tensor) -> Tensor:
    plain = packed.unpack()
    if plain.scales is None:
        return reference.matmul_float(plain.weight, x)
    return reference.matmul_int(plain.weight, plain.scales, x, packed.group)


@pytest.fixture(params=["native", "reference"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        monkeypatch.setattr(kernels, "native_available", lambda: False)
    elif not kernels.native_available():
        pytest.skip("the native kernels are not built")
    return str(request.param)


@pytest.mark.parametrize(("name", "layout"), FORMATS)
@pytest.mark.parametrize("group", [32, 64])
def test_matmul_is_the_reference(engine: str, name: str, layout: str, group: int) -> None:
    packed = make(name, layout, group=group)
    for shape in ((200,), (1, 200), (2, 9, 200), (0, 200)):
        x = random(*shape, seed=1)
        y = packed(x)
        assert y.shape == (*shape[:-1], 50)
        assert y.dtype == x.dtype
        wanted = expected(packed, x.reshape(-1, 200)).reshape(y.shape)
        torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-4)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        y = packed(random(3, 200, seed=1).to(dtype))
        wanted = expected(packed, random(3, 200, seed=1).to(dtype).float())
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), wanted, rtol=1e-2, atol=1e-2)
    with pytest.raises(MatrixError, match=r"\(..., 200\)"):
        packed(random(3, 199))


@pytest.mark.parametrize(("name", "layout"), FORMATS)
@pytest.mark.parametrize("group", [32, 64])
@pytest.mark.parametrize("width", [3, 64, 100, 200])
def test_rows(name: str, layout: str, group: int, width: int) -> None:
    packed = make(name, layout, out=37, width=width, group=group)
    whole = packed.to_dense()
    index = torch.tensor([[0, 36, 16], [5, 5, 31]])
    rows = packed.rows(index)
    assert rows.shape == (2, 3, width)
    assert torch.equal(rows, whole[index])
    assert packed.rows(index[:0]).shape == (0, 3, width)


def test_rows_out_of_range() -> None:
    packed = make("int8", "dense", out=37)
    for bad in (37, -1, 48):
        with pytest.raises(MatrixError, match=f"row {bad} is asked for, but there are 37"):
            packed.rows(torch.tensor([0, bad]))


def test_gradients_reach_the_activations(engine: str) -> None:
    packed = make("int4", "bitmap")
    x, weights = random(4, 200, seed=1).requires_grad_(), random(4, 50, seed=2)
    (packed(x) * weights).sum().backward()
    torch.testing.assert_close(x.grad, weights @ packed.to_dense())
    assert not list(packed.parameters())
    with torch.no_grad():
        assert torch.equal(packed(x), packed(x.detach()))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_floats_are_exact(layout: str) -> None:
    w, mask = random(50, 200), None if layout in ("dense", "columns") else masked(50, 200)
    plain = w if mask is None else w * mask
    assert torch.equal(pack(w, "float32", layout, mask=mask).to_dense(), plain)
    assert torch.equal(pack(w, "bf16", layout, mask=mask).to_dense(), plain.bfloat16().float())


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("group", [32, 64])
def test_codes_are_exact(name: str, group: int) -> None:
    w, mask = random(50, 200), masked(50, 200)
    codes = quantize(w, value_type(name), group, mask)
    packed = pack(codes, mask=mask)
    assert (packed.values_name, packed.group, packed.layout) == (name, group, "32:64")
    again = packed.quantized()
    assert torch.equal(again.q, codes.q)
    assert torch.equal(again.scales, codes.scales)
    assert torch.equal(packed.mask(), mask)
    assert torch.equal(packed.to_dense(), codes.to_dense())
    assert torch.equal(packed.to_dense(), pack(w, name, group=group, mask=mask).to_dense())


def test_kept_zeros_stay_kept() -> None:
    mask = masked(20, 128)
    packed = pack(torch.zeros(20, 128), "int4", mask=mask)
    assert torch.equal(packed.mask(), mask)
    assert packed.kept == int(mask.sum()) == 20 * 64
    assert pack(random(20, 128), "int4").kept == 20 * 128
    assert pack(random(20, 128), "int4").mask().all()


def test_leaves_bring_their_masks() -> None:
    w, mask = random(20, 128), masked(20, 128)
    assert pack(Sparse(mask, w), "int8").layout == "32:64"
    assert torch.equal(pack(Sparse(mask, w), "float32").mask(), mask)
    assert pack(Dense(w)).values_name == "int4"
    again = pack(pack(w, "float32", mask=mask), "int8")
    assert torch.equal(again.to_dense(), pack(w, "int8", mask=mask).to_dense())


def test_importance_lowers_the_error_that_outputs_see() -> None:
    w = random(32, 128)
    gram = torch.diag(
        torch.logspace(-2, 2, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(0))]
    )
    for name in INTEGERS:
        plain, weighted = Packed.fit(w, values=name), Packed.fit(w, gram, values=name)
        assert fit_error(w, weighted.to_dense(), gram) < 0.99 * fit_error(w, plain.to_dense(), gram)


@pytest.mark.parametrize(
    ("name", "layout", "group", "bits"),
    [
        ("int4", "dense", 64, 4.25),
        ("int4", "32:64", 64, 3.25),
        ("int8", "dense", 64, 8.25),
        ("int3", "dense", 64, 3.25),
        ("int4", "dense", 32, 4.5),
    ],
)
def test_bits_per_weight(name: str, layout: str, group: int, bits: float) -> None:
    packed = make(name, layout, out=64, width=128, group=group)
    assert packed.bits_per_weight == bits
    assert packed.nbytes * 8 == bits * 64 * 128


def test_description_says_what_was_clamped() -> None:
    packed = pack(torch.full((16, 64), 1e-6), "int4")
    assert packed.describe()["clamped"] == 16
    again = from_description(packed.describe(), packed.tensors())
    assert isinstance(again, Packed)
    assert again.clamped == 16
    assert "group" not in pack(random(4, 4), "float32").describe()


# --- as a module ------------------------------------------------------------------------------------------


def test_moving_leaves_the_bytes_alone(engine: str) -> None:
    packed, x = make("int4", "bitmap"), random(2, 200, seed=1)
    y = packed(x)
    before = {name: section.clone() for name, section in packed.state_dict().items()}
    for move in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half(),
        lambda m: m.double(),
        lambda m: m.to("cpu"),
    ):
        moved = move(packed)
        assert moved is packed
        for name, section in packed.state_dict().items():
            assert section.dtype == before[name].dtype
            assert torch.equal(section, before[name])
        assert torch.equal(packed(x), y)


@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state_is_seen_by_the_product(engine: str, assign: bool) -> None:
    first, second = make("int4", "32:64", seed=0), make("int4", "32:64", seed=1)
    x = random(2, 200, seed=1)
    wanted = second(x)
    assert not torch.equal(first(x), wanted)
    first.load_state_dict(second.state_dict(), assign=assign)
    assert torch.equal(first(x), wanted)
    damaged = {name: section.clone() for name, section in second.state_dict().items()}
    damaged["masks"].fill_(-1)
    with pytest.raises(MatrixError, match="has room for 32"):
        first.load_state_dict(damaged)


def test_deepcopy_is_independent(engine: str) -> None:
    packed, x = make("int4", "dense"), random(2, 200, seed=1)
    y = packed(x)
    copied = copy.deepcopy(packed)
    assert torch.equal(copied(x), y)
    assert copied.values.data_ptr() != packed.values.data_ptr()
    copied.load_state_dict(make("int4", "dense", seed=1).state_dict())
    assert torch.equal(packed(x), y)


def test_sections_start_where_kernels_want_them() -> None:
    for name in VALUES:
        for section in make(name, "bitmap").tensors().values():
            assert section.data_ptr() % 64 == 0


def test_repr_names_the_format() -> None:
    text = repr(make("int4", "32:64", out=64, width=128))
    assert text == "Packed(64x128, 3.25 bits/weight, 32:64, int4, group 64)"


# --- what is refused --------------------------------------------------------------------------------------


def test_bad_input() -> None:
    w = random(16, 64)
    with pytest.raises(MatrixError, match="NaN"):
        pack(w * float("nan"), "float32")
    with pytest.raises(MatrixError, match="use pack_tree"):
        Packed.pack(Sum(Dense(w), Dense(w)))
    with pytest.raises(MatrixError, match="a sum has no one mask"):
        pack(Sum(Dense(w), Dense(w)), mask=w > 0)
    with pytest.raises(MatrixError, match="overrides are for"):
        pack(w, overrides={"0": {"values": "int8"}})
    with pytest.raises(MatrixError, match="unknown values"):
        pack(w, "int5")
    with pytest.raises(MatrixError, match="64 or 32"):
        pack(w, "int4", group=16)
    with pytest.raises(MatrixError, match="codes are int4 in groups of 64, but int8"):
        pack(quantize(w, value_type("int4")), "int8")
    with pytest.raises(MatrixError, match="but int4 in groups of 32"):
        pack(quantize(w, value_type("int4")), group=32)
    with pytest.raises(MatrixError, match="no codes"):
        pack(w, "float32").quantized()
    with pytest.raises(MatrixError, match="mask"):
        pack(w, "float32", mask=torch.ones(16, 63, dtype=torch.bool))
    with pytest.raises(MatrixError, match="room for 1"):
        pack(w, "float32", "1:64")
    sections = pack(w, "int4").tensors()
    with pytest.raises(MatrixError, match="values holds"):
        Packed(sections, layout="dense", values="int4", shape=(17, 64))


@pytest.mark.parametrize(
    ("name", "layout", "other"),
    [
        (name, layout, other)
        for (name, layout), other in product(FORMATS, LAYOUTS)
        if (name, other) in FORMATS and (layout in ("bitmap", "32:64") or other != "32:64")
    ],
)
def test_repacking_is_exact(name: str, layout: str, other: str) -> None:
    packed = make(name, "bitmap", group=32 if name.startswith("int") else 64).repack(layout)
    again = packed.repack(other)
    assert (again.layout, again.values_name, again.group) == (other, name, packed.group)
    before, after = packed.unpack(), again.unpack()
    if not value_type(name).is_integer:
        patterns = torch.int32 if name == "float32" else torch.int16
        assert torch.equal(after.weight.view(patterns), before.weight.view(patterns))
    else:
        assert torch.equal(after.weight, before.weight)
        assert before.scales is not None
        assert after.scales is not None
        assert torch.equal(after.scales, before.scales)
        x = random(7, 200)
        assert torch.equal(again.matmul(x), packed.matmul(x))
        assert torch.equal(again.matmul(x[:1]), packed.matmul(x[:1]))
    if {layout, other} <= {"bitmap", "32:64"}:
        assert torch.equal(again.mask(), packed.mask())
    if other in ("dense", "columns"):
        assert after.mask is None


def test_repacking_keeps_odd_floats_and_the_count_of_clamped_scales() -> None:
    weight = torch.tensor([[-0.0, 1e-40, -1.5, 0.0] * 16] * 3)
    mask = torch.tensor([[True, True, True, False] * 16] * 3)
    again = pack(weight, "float32", "bitmap", mask=mask).repack("48:64")
    assert torch.equal(again.unpack().weight.view(torch.int32), weight.view(torch.int32))
    tiny = pack(torch.full((3, 64), 1e-7), "int4", "dense")
    assert tiny.clamped == 3
    assert tiny.repack("bitmap").clamped == 3


def test_a_layout_without_room_for_the_mask_is_refused() -> None:
    packed = make("int4", "32:64")
    assert packed.most_kept == 32
    assert make("int4", "dense").most_kept == 64
    for weight, layout in ((packed, "31:64"), (packed.repack("dense"), "32:64")):
        with pytest.raises(MatrixError, match=f"room for {layout[:2]}"):
            weight.repack(layout)


def test_whole_steps_are_counted_without_their_padding_and_repacked() -> None:
    steps = torch.zeros(27, 101, dtype=torch.bool)
    steps[:16, 4:8] = steps[16:, 96:] = steps[16:, 64:68] = True
    packed = Packed.pack(random(27, 101, seed=0), "bfloat16", "16x4", mask=steps)
    assert (packed.layout, packed.kept, packed.most_kept) == ("16x4", int(steps.sum()), 9)
    assert torch.equal(packed.mask(), steps)
    bitmap = packed.repack("bitmap")
    assert (bitmap.kept, bitmap.most_kept) == (packed.kept, packed.most_kept)
    assert torch.equal(bitmap.repack("16x4").values, packed.values)
    with pytest.raises(MatrixError, match="whole steps"):
        Packed.pack(random(27, 101, seed=0), "int4", "16x4", mask=~steps | (torch.arange(101) == 5))


def test_lazily_negated_activations_are_negated() -> None:
    packed = Packed.pack(random(32, 64), "float32")
    x = random(2, 64, seed=1)
    assert torch.equal(packed(torch._neg_view(x)), packed(-x))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_activations_that_are_no_floats_are_refused(dtype: torch.dtype) -> None:
    packed = Packed.pack(random(32, 64), "int8")
    with pytest.raises(MatrixError, match="activations are floats"):
        packed(torch.ones(2, 64, dtype=dtype))


def test_finite_weights_do_not_become_infinite() -> None:
    with pytest.raises(MatrixError, match="too large for bfloat16"):
        Packed.pack(torch.full((4, 4), 3.4e38), "bfloat16")
