"""Packed sums, products and block-diagonal matrices: one call, which follows every change of a part."""

from __future__ import annotations

import copy
import pickle
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import kernels
from gossamer.errors import MatrixError
from gossamer.matrices import (
    BlockDiagonal,
    Dense,
    LowRank,
    Matrix,
    Packed,
    Product,
    Sparse,
    Sum,
    from_description,
    inference,
    pack,
    pack_tree,
)

needs_kernels = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the kernels are called with."""
    made: list[Any] = []

    def counted(operand: Any, x: Tensor) -> Tensor:
        made.append(operand)
        return kernels.matmul(operand, x)

    class Counting:
        matmul = staticmethod(counted)
        make_program = staticmethod(kernels.make_program)

    monkeypatch.setattr(inference, "kernels", Counting)
    return made


def low_rank_and_sparse(values: str = "int4") -> Matrix:
    low = LowRank(Dense(random(70, 8)), Dense(random(8, 130, seed=1)))
    tree = Sum(low, Sparse.fit(random(70, 130, seed=2), pattern="32:64"))
    return pack_tree(tree, values, overrides={"0": {"values": "bfloat16"}})


def between_blocks(values: str = "int4", layout: str = "auto") -> Matrix:
    tree = Product(
        BlockDiagonal.from_blocks(random(3, 32, 16)),
        Sparse.fit(random(48, 130, seed=1), pattern="32:64"),
        BlockDiagonal.from_blocks(random(2, 65, 20, seed=2)),
    )
    return pack_tree(tree, values, layout, overrides={"2": {"values": "float32"}})


TREES = {"low rank and sparse": low_rank_and_sparse, "between blocks": between_blocks}


# --- multiplying ------------------------------------------------------------------------------------------


@needs_kernels
def test_a_packed_tree_is_one_call(calls: list[Any]) -> None:
    for make in TREES.values():
        tree = make()
        y = tree(random(3, tree.shape[1]))
        assert y.shape == (3, tree.shape[0])
        assert [call.out_features for call in calls] == [tree.shape[0]]
        tree(random(1, tree.shape[1]))
        assert calls[1] is calls[0]  # put together once
        calls.clear()


@needs_kernels
def test_terms_are_added_in_float32_from_the_left() -> None:
    tree = low_rank_and_sparse()
    (left, right), sparse = list(tree)
    x = random(5, 130, seed=7)
    assert torch.equal(tree(x), left(right(x)) + sparse(x))
    brief = x.bfloat16()
    assert torch.equal(tree(brief), tree(brief.float()).bfloat16())
    assert not torch.equal(tree(brief), left(right(brief)) + sparse(brief))  # rounded in between
    a, b, c = (pack(random(16, 64, seed=seed), "float32") for seed in range(3))
    x = random(5, 64)
    assert torch.equal(Sum(a, Sum(b, c))(x), (a(x) + b(x)) + c(x))


def random_tree(rng: np.random.Generator, out: int, width: int, depth: int) -> Matrix:
    kind = rng.integers(5) if depth else 0
    if kind == 1:
        return Sum(*(random_tree(rng, out, width, depth - 1) for _ in range(rng.integers(1, 4))))
    if kind == 2:
        sizes = [out, *(int(rng.choice([3, 16, 40, 64])) for _ in range(rng.integers(0, 3))), width]
        return Product(*(random_tree(rng, a, b, depth - 1) for a, b in pairwise(sizes)))
    if kind == 3 and (counts := [n for n in (2, 3, 4) if out % n == width % n == 0]):
        count = int(rng.choice(counts))
        return BlockDiagonal(random_tree(rng, out, width // count, 0), count)
    weight = torch.from_numpy(rng.standard_normal((out, width)).astype(np.float32)) / width**0.5
    if rng.random() < 0.5:
        return Dense(weight)
    return Sparse(torch.from_numpy(rng.random((out, width)) < 0.5), weight)


# how far rounded activations may move a result, beside what it would be if nothing cancelled out
VALUES = {"float32": 1e-6, "bfloat16": 4e-3, "int8": 1e-2, "int4": 1e-2}


@settings(max_examples=150, deadline=None)
@given(
    out=st.sampled_from([1, 16, 17, 32, 48, 60]),
    width=st.sampled_from([1, 16, 60, 64, 130, 192]),
    rows=st.integers(1, 64),
    values=st.sampled_from(list(VALUES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_tree_packs_and_multiplies(out: int, width: int, rows: int, values: str, seed: int) -> None:
    tree = random_tree(np.random.default_rng(seed), out, width, 3)
    packed = pack_tree(tree, values)
    assert packed.is_packed
    assert not tree.is_packed
    assert packed.shape == tree.shape
    if values == "float32":
        assert torch.equal(packed.to_dense(), tree.to_dense().detach())
    x = random(rows, width, seed=seed % 1000)
    got = packed(x).double()
    want = x.double() @ packed.to_dense().double().T  # by the rounded weights: only activations differ
    assert (got - want).norm() <= VALUES[values] * _size(packed, x)
    row = int(seed % rows)
    if rows <= 16 or kernels.isa() != "amx":  # with tiles few rows have bits of their own
        assert torch.equal(packed(x[row]), packed(x)[row])


def _size(matrix: Matrix, x: Tensor) -> float:
    return float(_magnitudes(matrix, x.double().abs()).norm())


def _magnitudes(matrix: Matrix, x: Tensor) -> Tensor:
    if isinstance(matrix, Sum):
        return torch.stack([_magnitudes(part, x) for part in matrix]).sum(0)
    if isinstance(matrix, Product):
        for factor in reversed(list(matrix)):
            x = _magnitudes(factor, x)
        return x
    return x @ matrix.to_dense().double().abs().T


def test_gradients_reach_activations_only(calls: list[Any]) -> None:
    for make in TREES.values():
        tree = make()
        x = random(3, tree.shape[1], seed=3).requires_grad_()
        y = tree(x)
        assert torch.equal(y.detach(), tree(x.detach()))
        (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
        torch.testing.assert_close(gradient, torch.ones_like(y) @ tree.to_dense())
        assert not list(tree.parameters())


def test_a_tree_with_a_trainable_leaf_still_trains() -> None:
    tree = Sum(pack(random(16, 64), "int4"), LowRank(Dense(random(16, 2)), Dense(random(2, 64))))
    assert not tree.is_packed
    tree(random(4, 64)).square().sum().backward()
    assert all(p.grad is not None for p in tree.parameters())


@needs_kernels
def test_without_native_kernels_the_reference_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    for make in TREES.values():
        tree = make("float32")
        x = random(2, 3, tree.shape[1], seed=4)
        want = tree(x)
        with monkeypatch.context() as patch:
            patch.setattr(kernels, "native_available", lambda: False)
            plain = copy.deepcopy(tree)
            assert isinstance(plain.compiled(), list)
            torch.testing.assert_close(plain(x), want, rtol=1e-2, atol=1e-2)
            assert plain(x.bfloat16()).dtype == torch.bfloat16


# --- following changes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TREES)
def test_a_changed_part_changes_the_product(name: str) -> None:
    tree = TREES[name]()
    x = random(2, tree.shape[1], seed=5)
    before = tree(x)
    again: dict[str, Any] = {
        "copied": copy.deepcopy(tree),
        "pickled": pickle.loads(pickle.dumps(tree)),
        "moved": copy.deepcopy(tree).to(torch.bfloat16),
    }
    for what, other in again.items():
        assert torch.equal(other(x), before), what
    # other bytes in a leaf
    other = TREES[name]("int8")
    state = TREES[name]("int4").state_dict()
    state = {key: 2 * tensor if key.endswith("scales") else tensor for key, tensor in state.items()}
    tree.load_state_dict(state, assign=True)
    assert not torch.equal(tree(x), before)
    tree.load_state_dict(TREES[name]().state_dict())
    assert torch.equal(tree(x), before)
    # another leaf
    for index, part in enumerate(other):
        tree.parts[index] = part
    assert torch.equal(tree(x), other(x))
    # one more, and a trainable one
    total = Sum(tree)
    assert torch.equal(total(x), tree(x))
    total.parts.append(pack(random(*tree.shape), "int8"))
    assert not torch.equal(total(x), tree(x))
    total.parts[1] = Dense(torch.zeros(tree.shape))
    assert not total.is_packed
    torch.testing.assert_close(total(x), tree(x))


# --- packing ----------------------------------------------------------------------------------------------


def test_pack_takes_trees_and_overrides() -> None:
    tree = Sum(
        LowRank(Dense(random(70, 8)), Dense(random(8, 130, seed=1))),
        Sparse.fit(random(70, 130, seed=2), pattern="32:64"),
    )
    packed = pack(
        tree, "int4", overrides={"0": {"values": "int8", "group": 32}, "0.1": {"values": "bfloat16"}}
    )
    (left, right), core = list(packed)
    assert (left.values_name, left.group) == ("int8", 32)
    assert right.values_name == "bfloat16"
    assert (core.values_name, core.layout, core.group) == ("int4", "32:64", 64)
    assert pack(tree, "int4", overrides={"1": {"layout": "bitmap"}}).parts[1].layout == "bitmap"
    leaves = [m for m in packed.modules() if isinstance(m, Packed)]
    assert packed.bits_per_weight == 8 * sum(leaf.nbytes for leaf in leaves) / (70 * 130)


def test_narrow_factors_are_not_padded_to_a_group() -> None:
    for rank, layout in ((8, "16x4"), (32, "16x4"), (62, "dense"), (64, "dense"), (80, "dense")):
        factors = LowRank(Dense(random(160, rank)), Dense(random(rank, 256, seed=1)))
        left, right = packed = pack(factors, "bfloat16")
        assert (left.layout, right.layout) == (layout, "dense")
        assert torch.equal(packed.to_dense(), left.to_dense() @ right.to_dense())
        assert torch.equal(left.to_dense(), next(iter(factors)).weight.detach().bfloat16().float())
    assert next(iter(pack(factors, "int8", overrides={"0": {"layout": "bitmap"}}))).layout == "bitmap"
    assert pack(Dense(random(160, 8)), "int4").layout == "dense"


def test_blocks_are_packed_as_they_are() -> None:
    for values in ("float32", "int4"):
        blocks = BlockDiagonal.from_blocks(random(4, 16, 64))
        packed = pack(blocks, values)
        assert isinstance(packed, BlockDiagonal)
        assert packed.stacked.shape == (64, 64)
        assert packed.nbytes == pack(random(64, 64), values).nbytes  # nothing for what is zero
        odd = pack(BlockDiagonal.from_blocks(random(4, 10, 64)), values)
        assert isinstance(odd, Packed)
        assert odd.mask().sum() == 4 * 10 * 64
        sparse = BlockDiagonal(Sparse.fit(random(40, 64), pattern="32:64"), 4)
        assert pack(sparse, values).mask().sum() == 40 * 32


def test_blocks_by_columns() -> None:
    x = random(3, 128)
    for high, whole in ((64, False), (128, True)):
        blocks = BlockDiagonal.from_blocks(random(2, high, 64))
        packed = pack(blocks, "float32", layout="columns")
        assert packed.is_packed == whole
        torch.testing.assert_close(packed(x), blocks(x))


def test_importance_reaches_the_inputs_it_is_of() -> None:
    """A weight that matters alone in its group is rounded away from all others."""
    importance = torch.full((128,), 1e-6)
    importance[[5, 64 + 20]] = 1.0
    blocks = random(2, 16, 64)
    packed = pack(BlockDiagonal.from_blocks(blocks), "int3", importance=importance)
    plain = pack(BlockDiagonal.from_blocks(blocks), "int3")
    errors = [(p.to_dense() - torch.block_diag(*blocks)).abs() for p in (packed, plain)]
    for block, column in ((0, 5), (1, 84)):
        rows = slice(16 * block, 16 * block + 16)
        assert errors[0][rows, column].mean() < 0.2 * errors[1][rows, column].mean()


@pytest.mark.parametrize("name", TREES)
def test_descriptions_bring_trees_back(name: str) -> None:
    tree = TREES[name]()
    stored = {key: tensor.clone() for key, tensor in tree.tensors().items()}
    again = from_description(tree.describe(), stored)
    x = random(2, tree.shape[1])
    assert torch.equal(again(x), tree(x))
    assert again.bits_per_weight == tree.bits_per_weight


@needs_kernels
def test_parts_that_no_longer_fit_are_refused() -> None:
    tree = low_rank_and_sparse()
    tree.parts[1] = pack(random(70, 131), "int4")
    with pytest.raises(MatrixError, match="term 1 of stage 1 takes 1 x 131 inputs where there are 130"):
        tree(random(1, 130))


def test_descriptions_of_too_few_or_too_deep_parts_are_refused() -> None:
    leaf = Dense(torch.ones(2, 2))
    description: dict[str, Any] = {"kind": "low_rank", "shape": [2, 2], "parts": [leaf.describe()]}
    tensors = {f"0.{name}": tensor for name, tensor in leaf.tensors().items()}
    with pytest.raises(MatrixError, match="not made of 1 parts"):
        from_description(description, tensors)
    deep, name = leaf.describe(), ""
    for _ in range(3000):
        deep, name = {"kind": "sum", "shape": [2, 2], "parts": [deep]}, f"0.{name}"
    with pytest.raises(MatrixError, match="too deep"):
        from_description(deep, {f"{name}{key}": tensor for key, tensor in leaf.tensors().items()})
