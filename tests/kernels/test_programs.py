"""Programs of several packed weights: what they compute, for any rows and threads, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import BITS, PACKED, any_rows, check_same, handle_of, tiers
from kernel_packer import Weight, random_weight
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gossamer import kernels
from gossamer.errors import KernelError, MatrixError
from gossamer.kernels import Program, Term, make_program, reference

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

Terms = list[tuple[Weight, int, int]]  # weight, blocks, source


def random_stages(rng: np.random.Generator, width: int, kinds: list[tuple[str, str, int]]) -> list[Terms]:
    """One to four stages whose terms see the activations or any stage before; some are block-diagonal."""
    widths = [width]
    stages: list[Terms] = []
    for _ in range(rng.integers(1, 5)):
        out = int(rng.choice([1, 15, 16, 17, 32, 48, 50, 96, 130, 256]))
        terms: Terms = []
        for _ in range(rng.integers(1, 4)):
            source = int(rng.integers(-1, len(stages)))
            cols = widths[source + 1]
            layout, values, group = kinds[rng.integers(len(kinds))]
            unit = 128 if layout == "columns" else 16
            fitting = [n for n in (1, 2, 3) if cols % n == 0 and (n == 1 or out % (unit * n) == 0)]
            blocks = int(rng.choice(fitting))
            density = float(rng.choice([0.05, 0.5, 1.0]))
            seed = int(rng.integers(2**32))
            w = random_weight(layout, values, out, cols // blocks, group, density, seed)
            terms.append((w, blocks, source))
        stages.append(terms)
        widths.append(out)
    return stages


def program_of(stages: list[Terms]) -> Program:
    return make_program([[Term(handle_of(w), blocks, source) for w, blocks, source in s] for s in stages])


def rows_of(w: Weight, begin: int, end: int) -> Weight:
    scales = None if w.scales is None else w.scales[begin:end]
    return replace(w, mask=w.mask[begin:end], stored=w.stored[begin:end], scales=scales)


def one_by_one(stages: list[Terms], x: Tensor, isa: str) -> Tensor:
    """The same products and sums, each weight (and each block) in a call of its own, in float32."""
    sums: list[Tensor] = []
    for stage in stages:
        total = None
        for w, blocks, source in stage:
            inputs = (x if source < 0 else sums[source]).chunk(blocks, dim=1)
            high = len(w.mask) // blocks
            parts = [handle_of(rows_of(w, b * high, (b + 1) * high)) for b in range(blocks)]
            y = torch.cat([kernels.matmul(p, i, isa) for p, i in zip(parts, inputs, strict=True)], dim=1)
            total = y if total is None else total + y
        assert total is not None
        sums.append(total)
    return sums[-1]


def plain(w: Weight) -> reference.Weight:
    if w.scales is None:
        dtype = torch.bfloat16 if w.values == "bfloat16" else torch.float32
        return reference.Weight(torch.from_numpy(w.stored).to(dtype))
    return reference.Weight(torch.from_numpy(w.stored), torch.from_numpy(w.scales), w.group)


ROWS = st.sampled_from([1, 2, 3, 4, 5, 8, 9, 16, 17, 64]) | st.integers(1, 64)
WIDTHS = st.sampled_from([1, 4, 63, 64, 66, 128, 192]) | st.integers(1, 200)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(width=WIDTHS, rows=ROWS, seed=st.integers(0, 2**32 - 1))
def test_any_program_is_its_weights_one_by_one(width: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stages = random_stages(rng, width, PACKED)
    program, x = program_of(stages), any_rows(rows, width, rng)
    for isa in tiers():
        y = kernels.matmul(program, x, isa)
        check_same(y, one_by_one(stages, x, isa), "not the sum of its terms in order")
        narrow = x.bfloat16()
        wide = kernels.matmul(program, narrow.float(), isa)
        check_same(kernels.matmul(program, narrow, isa), wide.bfloat16(), "rounded more than once")


@settings(max_examples=100, deadline=None)
@given(width=WIDTHS, rows=ROWS, seed=st.integers(0, 2**32 - 1))
def test_any_program_of_integers_is_the_reference_to_the_bit(width: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stages = random_stages(rng, width, [kind for kind in PACKED if kind[1] in BITS])
    x = torch.from_numpy(rng.standard_normal((rows, width)).astype(np.float32))
    want = reference.run_program([[(plain(w), b, s) for w, b, s in stage] for stage in stages], x)
    check_same(kernels.matmul(program_of(stages), x, "portable"), want, "other bits than the reference's")


@settings(max_examples=60, deadline=None)
@given(width=WIDTHS, rows=ROWS, seed=st.integers(0, 2**32 - 1))
def test_any_program_of_floats_is_close_to_the_reference(width: int, rows: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    stages = random_stages(rng, width, [kind for kind in PACKED if kind[1] == "float32"])
    x = torch.from_numpy(rng.standard_normal((rows, width)).astype(np.float32))
    want = reference.run_program([[(plain(w), b, s) for w, b, s in stage] for stage in stages], x)
    lost = 1e-3 + 1e-6 * float(
        want.abs().max()
    )  # stages multiply: a small result is a difference of large ones
    for isa in tiers():
        torch.testing.assert_close(kernels.matmul(program_of(stages), x, isa), want, rtol=1e-3, atol=lost)


@pytest.mark.parametrize("isa", tiers())
def test_a_row_depends_on_its_input_only(isa: str) -> None:
    rng = np.random.default_rng(3)
    w = {
        "down": random_weight("dense", "bfloat16", 96, 1024, 64, 1.0, 1),
        "up": random_weight("16x4", "int8", 512, 96, 32, 0.7, 2),
        "core": random_weight("32:64", "int4", 512, 1024, 64, 1.0, 3),
        "blocks": random_weight("dense", "int8", 512, 64, 64, 1.0, 4),
    }
    stages = [
        [(w["down"], 1, -1)],
        [(w["up"], 1, 0), (w["core"], 1, -1)],
        [(w["blocks"], 8, 1), (w["core"], 1, -1)],
    ]
    program, x = program_of(stages), any_rows(100, 1024, rng)
    torch.set_num_threads(1)
    whole = kernels.matmul(program, x, isa)
    narrow = kernels.matmul(program, x.bfloat16(), isa)
    few, few_narrow = whole, narrow
    if isa == "amx":  # with tiles few rows have bits of their own
        few = torch.cat([kernels.matmul(program, row[None], isa) for row in x])
        few_narrow = torch.cat([kernels.matmul(program, row[None].bfloat16(), isa) for row in x])
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for rows in (*range(1, 18), 64, 100):
            first = (37 * rows) % (101 - rows)
            part = x[first : first + rows]
            what = f"{rows} rows on {threads} threads"
            want, want_narrow = (whole, narrow) if rows > 16 else (few, few_narrow)
            check_same(kernels.matmul(program, part, isa), want[first : first + rows], what)
            check_same(kernels.matmul(program, part.bfloat16(), isa), want_narrow[first : first + rows], what)


def test_prompts_of_several_chunks() -> None:
    # activations of a stage past what is made ready at a time
    wide = random_weight("dense", "float32", 16, 4096, 64, 1.0, 1)
    back = random_weight("dense", "int8", 4096, 16, 64, 1.0, 2)
    stages = [[(wide, 1, -1)], [(back, 1, 0)], [(wide, 1, 1), (wide, 1, -1)]]
    program, x = program_of(stages), torch.randn(1500, 4096)
    whole = kernels.matmul(program, x)
    for row in (0, 63, 64, 700, 1499):
        assert torch.equal(kernels.matmul(program, x[row]), whole[row])
    assert torch.equal(kernels.matmul(program, x[:0]), whole[:0])


# ---- as an op


def small_program() -> Program:
    a, b = random_weight("dense", "bfloat16", 17, 20), random_weight("32:64", "int4", 20, 130)
    return program_of([[(b, 1, -1)], [(a, 1, 0)]])


def test_the_op_takes_programs() -> None:
    program = small_program()
    x = torch.randn(2, 3, 130)
    torch.library.opcheck(
        torch.ops.gossamer.packed_matmul.default,
        (x, program.id, 17),
        test_utils=("test_schema", "test_faketensor"),
    )
    with FakeTensorMode():
        assert kernels.matmul(program, torch.empty(4, 5, 130)).shape == (4, 5, 17)
    compiled = torch.compile(lambda x: kernels.matmul(program, x) + 1, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(x), kernels.matmul(program, x) + 1)
    with pytest.raises(KernelError, match="no gradient"):
        kernels.matmul(program, x.requires_grad_()).sum().backward()
    with pytest.raises(KernelError, match=r"130 inputs of Program\(2 weights, 17 x 130\)"):
        kernels.matmul(program, torch.randn(2, 131))


def test_a_program_keeps_its_weights_and_ends_with_them() -> None:
    program = small_program()  # nothing else holds its handles
    x = torch.randn(1, 130)
    assert torch.equal(kernels.matmul(program, x), kernels.matmul(program, x))
    number = program.id
    del program
    with pytest.raises(KernelError, match="does not exist any more"):
        torch.ops.gossamer.packed_matmul(x, number, 17)


# ---- what is refused


def test_programs_that_do_not_fit_are_refused() -> None:
    def leaf(out: int, cols: int) -> kernels.Handle:
        return handle_of(random_weight("dense", "int8", out, cols))

    def refused(stages: list[list[Term]], text: str) -> None:
        with pytest.raises(MatrixError, match=text):
            make_program(stages)

    make_program([[Term(leaf(20, 30))], [Term(leaf(5, 20), source=0), Term(leaf(5, 30))]])
    refused([], "has no stage")
    refused([[]], "stage 0 has no terms")
    refused([[Term(leaf(20, 30))], []], "stage 1 has no terms")
    refused(
        [[Term(leaf(20, 30))], [Term(leaf(5, 21), source=0)]],
        "term 0 of stage 1 takes 1 x 21 inputs where there are 20",
    )
    refused([[Term(leaf(20, 30)), Term(leaf(20, 31))]], "term 1 of stage 0 takes 1 x 31 .* there are 30")
    refused([[Term(leaf(20, 30)), Term(leaf(21, 30))]], "gives 21 outputs, the first one 20")
    refused([[Term(leaf(20, 20), source=0)]], "multiplies stage 0, which does not come before")
    refused([[Term(leaf(20, 20), source=1)], [Term(leaf(20, 20))]], "multiplies stage 1")
    refused([[Term(leaf(20, 20), source=-2)]], "multiplies stage -2")
    make_program([[Term(leaf(32, 20), 2), Term(leaf(32, 40))]])
    refused([[Term(leaf(32, 20), 4)]], "32 outputs, which are not 4 blocks of a multiple of 16")
    refused([[Term(leaf(20, 20), 2)]], "not 2 blocks")
    columns = handle_of(random_weight("columns", "int8", 192, 20))
    refused([[Term(columns, 2)]], "192 outputs, which are not 2 blocks of a multiple of 128")
    refused([[Term(leaf(32, 20), 0)]], "not 0 blocks")
    refused([[Term(leaf(32, 20), -1)]], "not -1 blocks")
    refused([[Term(leaf(32, 20)), Term(leaf(32, 20), 2)]], "takes 2 x 20 inputs where there are 20")
