"""Structured matrices against dense arithmetic, gradients by finite differences, and fits against optima."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

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
    fit_error,
    from_description,
    pack,
    pack_tree,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed))


def half_mask(out: int, width: int, seed: int = 0) -> Tensor:
    return torch.rand(out, width, generator=generator(seed)) < 0.5


def gram_of(width: int, samples: int, seed: int = 0) -> Tensor:
    """Correlated inputs of very different sizes."""
    x = random(width, samples, seed=seed) * torch.logspace(-1, 1, width)[:, None]
    x = x + 0.5 * x.roll(1, 0)
    return x @ x.T


MAKERS: dict[str, Callable[[], Matrix]] = {
    "dense": lambda: Dense(random(7, 10)),
    "sparse": lambda: Sparse(half_mask(7, 10), random(7, 10)),
    "empty": lambda: Sparse(torch.zeros(7, 10, dtype=torch.bool), torch.zeros(0)),
    "low_rank": lambda: LowRank(Dense(random(7, 3)), Dense(random(3, 10, seed=1))),
    "sum": lambda: Sum(
        LowRank(Dense(random(7, 2)), Dense(random(2, 10, seed=1))),
        Sparse(half_mask(7, 10), random(7, 10, seed=2)),
        Dense(random(7, 10, seed=3)),
    ),
    "product": lambda: Product(
        Dense(random(7, 4)), Sparse(half_mask(4, 5), random(4, 5, seed=1)), Dense(random(5, 10, seed=2))
    ),
    "block_diagonal": lambda: Product(
        BlockDiagonal.from_blocks(random(7, 1, 2)),
        Sum(Dense(random(14, 6)), BlockDiagonal(Sparse(half_mask(14, 3), random(14, 3, seed=1)), 2)),
        BlockDiagonal.from_blocks(random(2, 3, 5, seed=2)),
    ),
    "packed": lambda: pack(random(7, 10), "float32", mask=half_mask(7, 10)),
    "mixed": lambda: Sum(pack(random(7, 10), "float32"), Dense(random(7, 10, seed=1))),
}
KINDS = list(MAKERS)


# --- the protocol -----------------------------------------------------------------------------------------


def dense_of(matrix: Matrix) -> np.ndarray:
    """The dense oracle, built by numpy from what the matrix stores."""
    if isinstance(matrix, Dense):
        return matrix.weight.detach().double().numpy()
    if isinstance(matrix, Sparse):
        dense = np.zeros(matrix.shape)
        dense[matrix.mask.numpy()] = matrix.values.detach().double().numpy()
        return dense
    if isinstance(matrix, Packed):
        return matrix.unpack().weight.double().numpy()
    inner = [dense_of(part) for part in matrix]
    if isinstance(matrix, BlockDiagonal):
        return scipy.linalg.block_diag(*np.split(inner[0], matrix.count))
    return sum(inner) if isinstance(matrix, Sum) else np.linalg.multi_dot(inner)


@pytest.mark.parametrize("kind", KINDS)
def test_against_dense(kind: str) -> None:
    matrix = MAKERS[kind]()
    oracle = dense_of(matrix)
    assert matrix.shape == oracle.shape == (7, 10)
    np.testing.assert_allclose(matrix.to_dense().detach().numpy(), oracle, rtol=1e-5, atol=1e-5)
    for shape in ((10,), (3, 10), (2, 3, 10), (0, 10)):
        x = random(*shape, seed=9)
        y = matrix(x)
        assert y.dtype == torch.float32
        np.testing.assert_allclose(y.detach().numpy(), x.double().numpy() @ oracle.T, rtol=1e-4, atol=1e-4)
    turned = matrix.transpose()
    assert turned.shape == (10, 7)
    np.testing.assert_allclose(turned.to_dense().detach().numpy(), oracle.T, rtol=1e-5, atol=1e-5)
    index = torch.tensor([[6, 0], [3, 3]])
    np.testing.assert_allclose(matrix.rows(index).detach().numpy(), oracle[index], rtol=1e-5, atol=1e-5)
    brief = matrix(random(3, 10, seed=9).bfloat16())
    assert brief.dtype == torch.bfloat16
    with pytest.raises(MatrixError, match=r"activations are \(..., 10\)"):
        matrix(random(3, 9))


@pytest.mark.parametrize("kind", KINDS)
def test_description_and_tensors_round_trip(kind: str) -> None:
    matrix = MAKERS[kind]()
    description = json.loads(json.dumps(matrix.describe()))
    stored = {name: tensor.clone() for name, tensor in matrix.tensors().items()}
    again = from_description(description, stored)
    assert type(again) is type(matrix)
    assert torch.equal(again.to_dense(), matrix.to_dense())
    assert again.describe() == matrix.describe()
    assert again.nbytes == matrix.nbytes
    assert matrix.bits_per_weight == 8 * sum(t.numel() * t.element_size() for t in stored.values()) / 70
    with pytest.raises(MatrixError):
        from_description(description, {**stored, "other": torch.zeros(1)})
    if kind != "mixed":
        with pytest.raises(MatrixError):
            from_description(description, dict(list(stored.items())[1:]))
    with pytest.raises(MatrixError):
        from_description({**description, "shape": [7, 65]}, stored)


@pytest.mark.parametrize("kind", KINDS)
def test_state_dict_and_deepcopy(kind: str) -> None:
    matrix = MAKERS[kind]()
    copied = copy.deepcopy(matrix)
    x = random(2, 10, seed=5)
    before = matrix(x)
    assert torch.equal(copied(x), before)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    assert torch.equal(matrix(x), before)
    copied.load_state_dict(matrix.state_dict())
    assert torch.equal(copied(x), before)


@pytest.mark.parametrize("kind", ["dense", "sparse", "low_rank", "sum", "product", "block_diagonal"])
def test_gradients(kind: str) -> None:
    matrix = MAKERS[kind]().double()
    x = random(2, 10, seed=5).double().requires_grad_()
    names = [name for name, _ in matrix.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in matrix.parameters()]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(matrix, state, (x,))

    assert torch.autograd.gradcheck(run, (x, *values))


def test_bits_per_weight() -> None:
    assert Dense(random(8, 16)).bits_per_weight == 32
    assert Dense(random(8, 16).bfloat16()).bits_per_weight == 16
    mask = torch.zeros(8, 16, dtype=torch.bool)
    mask[:, ::2] = True
    assert Sparse(mask, random(8, 16)).bits_per_weight == 17  # half of 32, and the mask
    assert LowRank(Dense(random(8, 2)), Dense(random(2, 16))).bits_per_weight == 32 * 48 / 128
    assert Sparse(mask, random(8, 16)).kept == 64
    assert MAKERS["sum"]().kept == 7 * 2 + 2 * 10 + int(half_mask(7, 10).sum()) + 70


# --- sparse -----------------------------------------------------------------------------------------------


def test_sparse_training_keeps_the_mask() -> None:
    mask, start, x = half_mask(6, 9), random(6, 9), random(20, 9, seed=3)
    sparse = Sparse(mask, start)
    dense = start.clone().requires_grad_()
    sparse(x).square().sum().backward()
    (x @ (dense * mask).T).square().sum().backward()
    assert sparse.values.grad is not None
    assert dense.grad is not None
    torch.testing.assert_close(sparse.values.grad, dense.grad[mask])
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1, weight_decay=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        sparse(x).square().sum().backward()
        optimizer.step()
    assert torch.equal(sparse.to_dense() != 0, mask)
    assert not torch.equal(sparse.to_dense(), start * mask)


def test_sparse_fit_is_the_best_subset() -> None:
    w = random(4, 6)
    gram = torch.diag(torch.tensor([1.0, 100.0, 0.01, 4.0, 0.5, 9.0]))
    fitted = Sparse.fit(w, gram, sparsity=0.5)
    for row in range(4):
        best = min(
            itertools.combinations(range(6), 3),
            key=lambda pruned: sum(float(w[row, j] ** 2 * gram[j, j]) for j in pruned),
        )
        assert (~fitted.mask[row]).nonzero().flatten().tolist() == list(best)
    assert torch.equal(fitted.to_dense(), w * fitted.mask)
    two_of_four = Sparse.fit(random(4, 8), pattern="2:4")
    assert (two_of_four.mask.reshape(4, 2, 4).sum(dim=2) == 2).all()


# --- fits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_low_rank_fit_is_the_truncated_svd(weighted: bool) -> None:
    w = random(12, 9)
    gram = gram_of(9, 50) if weighted else None
    root = np.linalg.cholesky(gram.double().numpy()) if gram is not None else np.eye(9)
    singular = np.linalg.svd(w.double().numpy() @ root, compute_uv=False)
    for rank in (1, 4, 9):
        fitted = LowRank.fit(w, gram, rank=rank)
        assert fitted.rank == rank
        error = fit_error(w, fitted.to_dense(), gram)
        total = fit_error(w, torch.zeros_like(w), gram)
        assert error == pytest.approx((singular[rank:] ** 2).sum(), rel=1e-4, abs=1e-9 * total)


@pytest.mark.parametrize("samples", [50, 5])  # 5: a singular Gram matrix
def test_no_perturbation_of_a_low_rank_fit_is_better(samples: int) -> None:
    w, gram = random(12, 9), gram_of(9, samples)
    fitted = LowRank.fit(w.double(), gram, rank=3)
    left, right = (part.to_dense().detach() for part in fitted)
    best = fit_error(w, left @ right, gram)
    draws = generator(7)
    for trial in range(200):
        size = 10.0 ** -(trial % 5)
        other = (left + size * torch.randn(12, 3, generator=draws)) @ (
            right + size * torch.randn(3, 9, generator=draws)
        )
        assert fit_error(w, other, gram) >= best * (1 - 1e-9)
    if samples == 50:  # the Gram matrix pulls the fit away from the plain SVD, and it gains by it
        assert best < 0.9 * fit_error(w, LowRank.fit(w, rank=3).to_dense(), gram)


def test_low_rank_fit_of_less_rank_trains_on() -> None:
    fitted = LowRank.fit(random(6, 1) @ random(1, 8), rank=3)
    assert all(torch.isfinite(p).all() for p in fitted.parameters())
    torch.testing.assert_close(fitted.to_dense(), random(6, 1) @ random(1, 8))


def test_sum_fit_finds_planted_parts() -> None:
    low = random(24, 2) @ random(2, 30, seed=1)
    spikes = torch.where(torch.rand(24, 30, generator=generator(2)) < 0.05, 8.0, 0.0)
    target = low + spikes
    parts = [(LowRank, {"rank": 2}), (Sparse, {"pattern": "unstructured:tensor", "sparsity": 0.92})]
    fitted = Sum.fit(target, parts=parts, rounds=200)
    error = fit_error(target, fitted.to_dense())
    assert error < 1e-3 * fit_error(target, torch.zeros_like(target))
    assert error < 0.01 * fit_error(target, LowRank.fit(target, rank=2).to_dense())
    once = Sum.fit(target, parts=parts, rounds=1)
    assert error <= fit_error(target, once.to_dense())


@pytest.mark.parametrize("samples", [None, 50, 3])  # 3: a singular Gram matrix
def test_block_diagonal_fit_is_the_best(samples: int | None) -> None:
    w = random(6, 9).double()
    gram = None if samples is None else gram_of(9, samples).double()
    fitted = BlockDiagonal.fit(w, gram, count=3)
    best = fit_error(w, fitted.to_dense(), gram)
    if gram is None:
        assert torch.equal(fitted.blocks()[1].detach(), w[2:4, 3:6])
    draws = generator(7)
    for trial in range(100):
        moved = fitted.blocks() + 10.0 ** -(trial % 5) * torch.randn(3, 2, 3, generator=draws)
        assert fit_error(w, BlockDiagonal.from_blocks(moved).to_dense(), gram) >= best * (1 - 1e-9)


def test_dense_fit_is_the_target() -> None:
    w = random(3, 4)
    fitted = Dense.fit(w)
    assert torch.equal(fitted.to_dense(), w)
    assert fitted.weight.data_ptr() != w.data_ptr()
    assert Dense.fit(w, dtype=torch.bfloat16).weight.dtype == torch.bfloat16


def test_fit_error_is_the_error_of_the_outputs() -> None:
    w, other, x = random(5, 6), random(5, 6, seed=1), random(6, 40, seed=2)
    direct = float(((w - other) @ x).double().square().sum())
    assert fit_error(w, other, x @ x.T) == pytest.approx(direct, rel=1e-5)


# --- trees ------------------------------------------------------------------------------------------------


def test_pack_tree() -> None:
    tree = Sum(
        LowRank(Dense(random(70, 8)), Dense(random(8, 130, seed=1))),
        Sparse.fit(random(70, 130, seed=2), pattern="32:64"),
        pack(random(70, 130, seed=3), "int8"),
    )
    packed = pack_tree(tree, "int4", importance=torch.rand(130, generator=generator()) + 0.1)
    assert isinstance(packed, Sum)
    low, sparse, kept = list(packed)
    assert isinstance(low, LowRank)
    assert all(isinstance(part, Packed) and part.values_name == "int4" for part in low)
    assert isinstance(sparse, Packed)
    assert sparse.layout == "32:64"
    assert kept is list(tree)[2]
    assert packed.bits_per_weight < tree.bits_per_weight
    error = fit_error(tree.to_dense(), packed.to_dense())
    assert error < 0.02 * fit_error(tree.to_dense(), torch.zeros(70, 130))
    exact = pack_tree(tree, "float32")
    torch.testing.assert_close(exact.to_dense(), tree.to_dense())
    assert isinstance(pack_tree(Dense(random(4, 4))), Packed)


# --- what is refused --------------------------------------------------------------------------------------


def test_bad_input() -> None:
    w = random(4, 6)
    with pytest.raises(MatrixError, match="one shape"):
        Sum(Dense(w), Dense(w[:3]))
    with pytest.raises(MatrixError, match="inner sizes differ"):
        Product(Dense(w), Dense(w))
    with pytest.raises(MatrixError, match="at least one part"):
        Product()
    with pytest.raises(MatrixError, match="mask keeps"):
        Sparse(half_mask(4, 6), torch.zeros(99))
    with pytest.raises(MatrixError, match="bool"):
        Sparse(w, w)
    with pytest.raises(MatrixError, match="floats"):
        Dense(torch.ones(2, 2, dtype=torch.int8))
    with pytest.raises(MatrixError, match="out_features"):
        Dense(torch.ones(2))
    with pytest.raises(MatrixError, match=r"rank .* in 1\.\.4"):
        LowRank.fit(w, rank=5)
    with pytest.raises(MatrixError, match="NaN"):
        LowRank.fit(w * float("nan"), rank=1)
    with pytest.raises(MatrixError, match="Gram matrix of 6 inputs"):
        LowRank.fit(w, torch.eye(5), rank=1)
    with pytest.raises(MatrixError, match="takes dtype"):
        Dense.fit(w, rank=3)
    with pytest.raises(MatrixError, match="cannot be fitted"):
        Product.fit(w)
    with pytest.raises(MatrixError, match="not 3 equal blocks"):
        BlockDiagonal(Dense(w), 3)
    with pytest.raises(MatrixError, match="one leaf, not a sum"):
        BlockDiagonal(Sum(Dense(w)), 2)
    with pytest.raises(MatrixError, match="no 4 equal blocks"):
        BlockDiagonal.fit(w, count=4)
    with pytest.raises(MatrixError, match="lead to no part: 2"):
        pack_tree(Sum(Dense(w), Dense(w)), overrides={"2": {"values": "int8"}})


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"kind": "spares", "shape": [4, 4]},
        {"kind": ["dense"], "shape": [4, 4]},
        {"kind": "dense", "shape": [4]},
        {"kind": "dense", "shape": [4, True]},
        {"kind": "dense", "shape": [4, -4]},
        {"kind": "dense", "shape": [4, 5]},
        {"kind": "sum", "shape": [4, 4], "parts": []},
        {"kind": "sum", "shape": [4, 4], "parts": ["dense"]},
        {"kind": "block_diagonal", "shape": [4, 4], "count": 2, "parts": []},
        {"kind": "block_diagonal", "shape": [4, 4], "parts": [{"kind": "dense", "shape": [4, 4]}]},
        {
            "kind": "block_diagonal",
            "shape": [4, 4],
            "count": 3,
            "parts": [{"kind": "dense", "shape": [4, 4]}],
        },
        {"kind": "packed", "shape": [4, 4], "layout": "dense", "values": 4},
        {"kind": "packed", "shape": [4, 4], "layout": "dense", "values": "int4", "group": "64"},
        {"kind": "packed", "shape": [4, 4], "layout": "dense", "values": "int4", "group": 0},
        {"kind": "packed", "shape": [4, 4], "layout": "bitmap", "values": "float32"},
        {"kind": "sparse", "shape": [4, 4]},
        "dense",
    ],
)
def test_bad_descriptions(description: object) -> None:
    with pytest.raises(MatrixError):
        from_description(description, {"weight": torch.ones(4, 4)})
