"""A damaged packed weight is refused with a sentence that says what and where, before any kernel runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import PACKED
from kernel_packer import random_weight
from torch import Tensor

from gossamer import kernels
from gossamer.errors import KernelError, MatrixError

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

Sections = dict[str, Tensor]


@pytest.mark.parametrize(("layout", "values", "group"), PACKED)
def test_section_sizes_are_those_of_the_format(layout: str, values: str, group: int) -> None:
    for out, cols in [(1, 1), (17, 130), (48, 320)]:
        sizes = kernels.section_bytes(layout, values, out, cols, group)
        sections = random_weight(layout, values, out, cols, group).sections()
        have = {name: t.numel() * t.element_size() for name, t in sections.items()}
        if "offsets" in sizes:
            assert sizes["values"] is None
            sizes["values"] = have["values"]
        assert sizes == have


def test_native_and_python_agree_on_stored_bytes() -> None:
    from gossamer.kernels.handle import _VALUES, _stored_bytes
    from gossamer.kernels.native import native

    for values, code in _VALUES.items():
        for count in range(1025):
            assert native().stored_bytes(code, count) == _stored_bytes(values, count)


def refused(layout: str, values: str, spoil: Callable[[Sections], object], text: str) -> None:
    sections = {name: t.clone() for name, t in random_weight(layout, values, 40, 200).sections().items()}
    kernels.make_handle(layout, values, 40, 200, 64, sections)
    spoil(sections)
    with pytest.raises(MatrixError, match=text):
        kernels.make_handle(layout, values, 40, 200, 64, sections)


def put(name: str, index: int, value: float) -> Callable[[Sections], object]:
    return lambda sections: sections[name].__setitem__(index, value)


# 40 x 200 has 3 panels (8 outputs in the last) and 4 groups (8 inputs in the last): 12 panel-groups
def test_masks() -> None:
    full, last_input, last_output = 2 * 16, 3 * 16 + 2, (2 * 4 + 1) * 16
    refused("32:64", "int4", put("masks", full, -1), r"keeps 3\d of 64 inputs.*32.*panel 0, group 2")
    refused("bitmap", "int4", put("masks", last_input, 1), "padding in panel 0, group 3")
    refused("bitmap", "int4", put("masks", last_output, 1 << 32), "padding in panel 2, group 1")
    refused("bitmap", "float32", put("masks", 5, 0), "masks of panel 0 call for")


def test_offsets() -> None:
    refused("bitmap", "int8", put("offsets", 0, 1), "first offset is 1")
    refused("bitmap", "int8", put("offsets", 1, -5), "fall from 0 to -5 at panel 0")
    refused("bitmap", "int8", put("offsets", 2, 2**62), "at panel 2")
    refused("bitmap", "int8", put("offsets", 3, 2**62), "end at byte 4611686018427387904")
    refused("bitmap", "int8", put("offsets", 1, 1), "masks of panel 0 call for")
    refused("bitmap", "int8", lambda s: s.update(values=s["values"][:-64].clone()), "values section has")
    refused("bitmap", "int8", lambda s: s.update(values=torch.cat([s["values"], s["values"]])), "section has")


def test_scales_must_be_finite() -> None:
    refused("dense", "int4", put("scales", 70, float("inf")), "scale of panel 1 is infinite")
    refused("columns", "int8", put("scales", 200, float("inf")), "infinite or not a number")
    refused("bitmap", "int3", put("scales", 2, float("nan")), "scale of panel 0 is infinite or not a number")


def test_sizes_names_and_dtypes() -> None:
    refused("dense", "int4", lambda s: s.update(values=s["values"][:-64].clone()), "'values'.*6080 bytes")
    refused("dense", "int4", lambda s: s.pop("scales"), r"has the sections \['scales', 'values'\]")
    refused("columns", "int4", lambda s: s.update(values=s["values"][:-64].clone()), "'values'.*16320 bytes")
    refused("columns", "int4", lambda s: s.update(masks=s["scales"].view(torch.int64)), "has the sections")
    refused("dense", "float32", lambda s: s.update(scales=torch.zeros(1).half()), "has the sections")
    refused("32:64", "int4", lambda s: s.update(masks=s["masks"].int()), "'masks'.*int64, not torch.int32")
    refused("32:64", "int4", lambda s: s.update(masks=s["masks"].reshape(-1, 16)), "flat contiguous")
    refused("32:64", "int4", lambda s: s.update(values=s["values"].repeat_interleave(2)[::2]), "contiguous")


def test_a_handle_of_other_bytes_is_refused() -> None:
    # the sections of dense, said to be columns: 48 outputs are padded to 128
    sections = random_weight("dense", "int4", 40, 200).sections()
    with pytest.raises(MatrixError, match="'values' of a columns int4 weight 40 x 200 has 6144 bytes"):
        kernels.make_handle("columns", "int4", 40, 200, 64, sections)


def test_the_first_damaged_panel_is_named_for_any_thread_count() -> None:
    w = random_weight("bitmap", "int8", 640, 64)
    sections = w.sections()
    sections["masks"][16 * 21] ^= 1
    sections["masks"][16 * 33] ^= 1
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for _ in range(20):
            with pytest.raises(MatrixError, match="panel 21 "):
                kernels.make_handle("bitmap", "int8", 640, 64, 64, sections)


@pytest.mark.parametrize(
    ("layout", "values", "out", "cols", "group"),
    [
        ("csr", "int4", 16, 64, 64),
        ("0:64", "int4", 16, 64, 64),
        ("65:64", "int4", 16, 64, 64),
        ("2:4", "int4", 16, 64, 64),
        ("columns", "int3", 16, 64, 64),
        ("dense", "int5", 16, 64, 64),
        ("dense", "int4", 16, 64, 128),
        ("dense", "int4", 0, 64, 64),
        ("dense", "int4", 16, -1, 64),
    ],
)
def test_what_does_not_exist_is_refused(layout: str, values: str, out: int, cols: int, group: int) -> None:
    with pytest.raises(MatrixError):
        kernels.make_handle(layout, values, out, cols, group, {})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_harmless(data: st.DataObject) -> None:
    """Random bytes in any section: a MatrixError, or a product that touches nothing else and gives numbers of
    the right shape. (Guard pages are the other half of this: test_guard_pages.py.)"""
    layout, values, group = data.draw(st.sampled_from(PACKED))
    out, cols = data.draw(st.sampled_from([(17, 130), (16, 64), (40, 64)]))
    sections = random_weight(layout, values, out, cols, group).sections()
    sections = {name: t.clone() for name, t in sections.items()}
    for _ in range(data.draw(st.integers(1, 4))):
        raw = sections[data.draw(st.sampled_from(sorted(sections)))].view(torch.uint8).numpy()
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        handle = kernels.make_handle(layout, values, out, cols, group, sections)
    except MatrixError:
        return
    for isa in kernels.available():
        for rows in (1, 9):
            assert kernels.matmul(handle, torch.ones(rows, cols), isa).shape == (rows, out)


def test_ids_of_dead_handles_are_refused() -> None:
    w = random_weight("dense", "int8", 16, 64)
    handle = kernels.make_handle("dense", "int8", 16, 64, 64, w.sections())
    number = handle.id
    x = torch.ones(1, 64)
    assert torch.equal(torch.ops.gossamer.packed_matmul(x, number, 16), kernels.matmul(handle, x))
    del handle
    with pytest.raises(KernelError, match="does not exist any more"):
        torch.ops.gossamer.packed_matmul(x, number, 16)
