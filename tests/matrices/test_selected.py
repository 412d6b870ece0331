"""Matrices that read some of the inputs: packed, multiplied, stored, and refused where they disagree."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import kernels
from gossamer.errors import MatrixError
from gossamer.kernels import reference
from gossamer.matrices import (
    BlockDiagonal,
    Dense,
    Matrix,
    Packed,
    Product,
    Selected,
    Sparse,
    Sum,
    compile_matrix,
    from_description,
    pack,
    stages_of,
)

needs_kernels = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some(width: int, count: int, seed: int = 0) -> Tensor:
    order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return torch.zeros(width, dtype=torch.bool).index_fill_(0, order[:count], True)


def apart(weight: Tensor, outliers: Tensor, values: str = "int8") -> Sum:
    """Outlier columns in bfloat16, all others in ``values``."""
    rest = Packed.pack(weight[:, ~outliers].contiguous(), values)
    own = Packed.pack(weight[:, outliers].contiguous(), "bfloat16", "16x4")
    return Sum(Selected(rest, ~outliers), Selected(own, outliers))


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 40),
    st.sampled_from([2, 63, 64, 65, 130]),
    st.sampled_from(["int8", "int4", "int3", "nl4", "float32"]),
    st.integers(0, 99),
)
def test_it_is_its_columns_and_comes_back_from_disk(out: int, width: int, values: str, seed: int) -> None:
    outliers = some(width, 1 + seed % (width - 1), seed)
    matrix = apart(random(out, width, seed=seed), outliers, values)
    rest, own = list(matrix)
    dense = matrix.to_dense()
    assert torch.equal(dense[:, outliers], random(out, width, seed=seed)[:, outliers].bfloat16().float())
    assert isinstance(rest, Selected)
    assert torch.equal(dense[:, ~outliers], rest.leaf.to_dense())
    assert torch.equal(matrix.rows(torch.tensor([out - 1, 0])), dense[[out - 1, 0]])
    assert torch.equal(matrix.transpose().to_dense(), dense.T)
    again = from_description(matrix.describe(), matrix.tensors())
    assert again.describe() == matrix.describe()
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in matrix.tensors().items())
    assert matrix.kept == out * width
    assert matrix.nbytes == sum(part.leaf.nbytes + part.words.nbytes for part in (rest, own))  # type: ignore[union-attr]


@needs_kernels
@pytest.mark.parametrize("isa", kernels.available() if kernels.native_available() else ())
@pytest.mark.parametrize("values", ["int8", "nl3", "bfloat16"])
def test_a_call_is_its_parts_on_what_they_read(isa: str, values: str) -> None:
    for (out, width, count), rows in [
        ((70, 200, 7), 1),
        ((48, 130, 66), 5),
        ((16, 64, 1), 16),
        ((70, 200, 7), 70),
    ]:
        outliers, x = some(width, count), random(rows, width, seed=1)
        x[:, outliers] *= 50
        matrix = apart(random(out, width), outliers, values)
        rest, own = (part.leaf.leaf() for part in matrix)  # type: ignore[union-attr]
        for given_x in (x, x.bfloat16()):
            parts = [
                kernels.matmul(leaf, given_x[:, seen].float().contiguous(), isa)
                for leaf, seen in ((rest, ~outliers), (own, outliers))
            ]
            got = kernels.matmul(matrix.compiled(), given_x, isa)  # type: ignore[arg-type]
            assert torch.equal(got, (parts[0] + parts[1]).to(given_x.dtype))


@needs_kernels
def test_outliers_do_not_blur_what_lies_beside_them() -> None:
    weight, x, outliers = random(64, 128), random(20, 128, seed=1), some(128, 2)
    x[:, outliers] *= 100
    want = x.double() @ weight.double().T

    def error(matrix: Matrix) -> float:
        return float((matrix.matmul(x).double() - want).norm() / want.norm())

    whole, kept = error(Packed.pack(weight, "int8")), error(apart(weight, outliers))
    # bfloat16 keeps eight bits of the large products; beside those int8 codes of the small ones vanish
    ideal = (x[:, outliers].bfloat16().double() @ weight[:, outliers].bfloat16().double().T) + (
        x[:, ~outliers].double() @ weight[:, ~outliers].double().T
    )
    assert error(apart(weight, outliers)) < 1.2 * float((ideal - want).norm() / want.norm())
    assert kept < whole / 2


def test_the_reference_reads_the_same_inputs() -> None:
    weight, outliers, x = random(20, 70), some(70, 9), random(3, 70, seed=2)
    own = reference.Weight(weight[:, outliers], inputs=outliers.nonzero()[:, 0])
    want = x[:, outliers] @ weight[:, outliers].T
    assert torch.equal(reference.run_program([[(own, 1, -1)]], x), want)


def test_it_trains_and_packs_like_its_leaf() -> None:
    inputs = some(70, 30)
    tree = Selected.of(random(20, 70), inputs)
    x = random(4, 70, seed=1)
    assert torch.allclose(tree.matmul(x), x @ tree.to_dense().T, atol=1e-5)
    tree.matmul(x).sum().backward()  # type: ignore[no-untyped-call]
    assert tree.leaf.weight.grad is not None  # type: ignore[union-attr]
    packed = pack(tree, "int8", importance=torch.ones(70))
    assert isinstance(packed, Selected)
    assert packed.is_packed
    assert torch.equal(packed.inputs(), inputs)


@needs_kernels
def test_it_follows_copies_and_state_dicts() -> None:
    x, first = random(4, 70, seed=1), apart(random(20, 70), some(70, 5))
    other = apart(random(20, 70, seed=3), some(70, 5, seed=4))
    before, wanted = first.matmul(x), other.matmul(x)
    assert torch.equal(copy.deepcopy(first).matmul(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(first)).matmul(x), before)
    first.load_state_dict(other.state_dict())
    assert torch.equal(first.matmul(x), wanted)


@needs_kernels
def test_the_stages_of_sums_and_products() -> None:
    def sources(matrix: Matrix) -> list[list[int]]:
        return [[source for _, _, source in stage] for stage in stages_of(matrix)]

    matrix = apart(random(32, 32), some(32, 3))
    assert sources(matrix) == [[-1, -1]]
    assert sources(Packed.pack(random(32, 32))) == [[-1]]
    assert sources(Sum(matrix, Product(Packed.pack(random(32, 32)), matrix))) == [[-1, -1], [-1, -1, 0]]
    ((blocks,),) = stages_of(pack(BlockDiagonal.from_blocks(random(2, 16, 16)), "int8"))
    assert blocks[1] == 2
    with pytest.raises(MatrixError):
        stages_of(Dense(random(32, 32)))
    inside = Product(Selected(Packed.pack(random(8, 20)), some(32, 20)), Packed.pack(random(32, 64)))
    x = random(3, 64, seed=5)
    stages = compile_matrix(inside)
    assert kernels.matmul(stages, x).shape == (3, 8)  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    leaf = Dense(random(4, 3))
    with pytest.raises(MatrixError, match="2 inputs are selected for a leaf"):
        Selected(leaf, some(8, 2))
    with pytest.raises(MatrixError, match="bool"):
        Selected(leaf, torch.tensor([0, 1, 2]))
    with pytest.raises(MatrixError, match="one leaf"):
        Selected(Selected(leaf, some(8, 3)), some(10, 8))
    good = Selected(leaf, some(70, 3))
    for damage, message in [
        (lambda words: words[:-1], "int64 words"),
        (lambda words: words.to(torch.int32), "int64 words"),
        (lambda words: words * 0, "0 inputs are selected"),
        (lambda words: words.index_fill(0, torch.tensor([3]), 1), "past the 70"),
    ]:
        tensors = {**good.tensors(), "inputs": damage(good.words)}  # type: ignore[no-untyped-call]
        with pytest.raises(MatrixError, match=message):
            from_description(good.describe(), tensors)
    tensors = good.tensors()
    del tensors["inputs"]
    with pytest.raises(MatrixError, match="tensor inputs"):
        from_description(good.describe(), tensors)
    assert isinstance(good.transpose(), Sparse)


@needs_kernels
def test_lists_of_inputs_are_checked_before_a_kernel_reads_them() -> None:
    handle = Packed.pack(random(32, 3), "float32").leaf()
    assert isinstance(handle, kernels.Handle)
    for inputs in ([0, 2, 2], [2, 1, 3], [-1, 0, 1], [0, 1, 9]):
        with pytest.raises(MatrixError, match="comes after"):
            handle.reading(torch.tensor(inputs, dtype=torch.int32), 9)
    for wrong in (torch.tensor([0, 1], dtype=torch.int32), torch.tensor([0, 1, 2])):
        with pytest.raises(MatrixError, match="3 int32 numbers"):
            handle.reading(wrong, 9)
    good = handle.reading(torch.tensor([0, 4, 8], dtype=torch.int32), 9)
    assert good.in_features == 9
    with pytest.raises(MatrixError, match="blocks, and a list of inputs"):
        kernels.make_program([[kernels.Term(good, 2)]])
