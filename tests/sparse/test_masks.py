"""Masks: exact counts, ties by index, and errors, for every pattern and shape."""

from __future__ import annotations

import math
from decimal import ROUND_FLOOR, Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import PatternError, ScoreError, SparsityError
from gossamer.sparse import (
    NM,
    Block,
    Channel,
    Pattern,
    Unstructured,
    check_mask,
    count_pruned,
    mask_from_scores,
)
from gossamer.sparse.masks import most_kept, unit_scores

shapes = st.tuples(st.integers(1, 20), st.integers(1, 150))
sparsities = st.floats(0, 0.999, allow_nan=False).map(lambda s: round(s, 3))


def scores_of(shape: tuple[int, int], seed: int, levels: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if levels:  # few distinct values: many ties
        return torch.randint(0, levels, shape, generator=generator).float()
    return torch.rand(shape, generator=generator)


@pytest.mark.parametrize(
    ("n", "sparsity", "pruned"),
    [(4, 0.5, 2), (5, 0.5, 3), (45, 0.7, 32), (10, 0.05, 1), (3, 0.0, 0), (1, 0.4, 0)],
)
def test_count_is_rounded_half_up(n: int, sparsity: float, pruned: int) -> None:
    assert count_pruned(n, sparsity) == pruned


def test_any_real_number_is_a_sparsity() -> None:
    scores = scores_of((4, 8), 0)
    for sparsity in (np.float32(0.5), np.float64(0.5), Fraction(1, 2)):
        mask = mask_from_scores(scores, Unstructured(), sparsity)  # type: ignore[arg-type]
        assert torch.equal(mask, mask_from_scores(scores, Unstructured(), 0.5))


@given(st.integers(0, 10**9), sparsities)
def test_count_agrees_with_decimal_arithmetic(n: int, sparsity: float) -> None:
    exact = (Decimal(repr(sparsity)) * n + Decimal("0.5")).to_integral_value(ROUND_FLOOR)
    assert count_pruned(n, sparsity) == int(exact)


@pytest.mark.parametrize("sparsity", [1.0, -0.1, 1.5, float("nan"), "0.5", None])
def test_sparsity_outside_its_range_is_refused(sparsity: object) -> None:
    with pytest.raises(SparsityError):
        mask_from_scores(torch.rand(4, 4), Unstructured(), sparsity)  # type: ignore[arg-type]


@given(shapes, sparsities, st.integers(0, 99), st.sampled_from([0, 1, 3]))
def test_unstructured_counts_are_exact(
    shape: tuple[int, int], sparsity: float, seed: int, levels: int
) -> None:
    rows, cols = shape
    scores = scores_of(shape, seed, levels)
    by_row = mask_from_scores(scores, Unstructured("row"), sparsity)
    assert (cols - by_row.sum(1) == count_pruned(cols, sparsity)).all()
    whole = mask_from_scores(scores, Unstructured("tensor"), sparsity)
    assert rows * cols - int(whole.sum()) == count_pruned(rows * cols, sparsity)
    by_columns = mask_from_scores(scores, Unstructured("columns:32"), sparsity)
    for start in range(0, cols, 32):
        part = by_columns[:, start : start + 32]
        assert part.numel() - int(part.sum()) == count_pruned(part.numel(), sparsity)
    for mask in (by_row, whole, by_columns):
        assert mask.dtype == torch.bool
        assert mask.shape == scores.shape


@given(shapes, st.integers(1, 64), st.integers(2, 64), st.integers(0, 99), st.sampled_from([0, 2]))
def test_nm_keeps_exactly_n_of_m_and_no_less_of_the_ragged_end(
    shape: tuple[int, int], n: int, m: int, seed: int, levels: int
) -> None:
    n = min(n, m)
    mask = mask_from_scores(scores_of(shape, seed, levels), NM(n, m))
    rows, cols = shape
    whole = cols - cols % m
    assert (mask[:, :whole].reshape(rows, -1, m).sum(2) == n).all()
    rest = cols - whole
    assert (mask[:, whole:].sum(1) == math.ceil(rest * n / m)).all()
    check_mask(mask, NM(n, m))


@pytest.mark.parametrize(
    ("pattern", "kept"), [(NM(2, 4), [1, 1, 2, 2]), (NM(1, 4), [1, 1, 1, 1]), (NM(3, 4), [1, 2, 3, 3])]
)
def test_a_last_group_is_never_pruned_whole(pattern: NM, kept: list[int]) -> None:
    """Widths of 1 to 4, and those of a convolution over 1x3x3 and 3x3x3 inputs."""
    for width, count in enumerate(kept, start=1):
        assert mask_from_scores(torch.rand(5, width), pattern).sum(dim=1).tolist() == [count] * 5
    for width, last in ((9, kept[0]), (27, kept[2])):
        mask = mask_from_scores(torch.rand(5, width), pattern)
        assert mask.sum(dim=1).tolist() == [width // 4 * pattern.n + last] * 5
        assert int(mask.sum()) == most_kept((5, width), pattern, pattern.sparsity)


@given(shapes, sparsities, st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_blocks_go_whole(shape: tuple[int, int], sparsity: float, r: int, c: int, seed: int) -> None:
    rows, cols = shape
    if r > rows or c > cols:
        with pytest.raises(PatternError):
            mask_from_scores(scores_of(shape, seed), Block(r, c), sparsity)
        return
    mask = mask_from_scores(scores_of(shape, seed), Block(r, c), sparsity)
    blocks = mask[::r, ::c]
    assert blocks.numel() - int(blocks.sum()) == count_pruned(blocks.numel(), sparsity)
    check_mask(mask, Block(r, c))


def test_blocks_that_a_border_cuts_off_compare_by_their_mean() -> None:
    scores = torch.ones(5, 5)
    scores[4] = torch.tensor([2.0, 2.0, 0.5, 0.5, 0.25])
    scores[:4, 4] = 3.0
    pattern = Block(4, 2)
    assert unit_scores(scores, pattern).tolist() == [[8.0, 8.0, 24.0], [16.0, 4.0, 2.0]]
    kept = mask_from_scores(scores, pattern, 0.5)[::4, ::2]
    assert kept.tolist() == [[False, True, True], [True, False, False]]
    by_row = mask_from_scores(scores, Block(4, 2, "row"), 0.3)[::4, ::2]
    assert by_row.tolist() == [[False, True, True], [True, True, False]]


@given(shapes, sparsities, st.sampled_from([0, 1]), st.integers(0, 99))
def test_channels_go_whole(shape: tuple[int, int], sparsity: float, axis: int, seed: int) -> None:
    mask = mask_from_scores(scores_of(shape, seed), Channel(axis), sparsity)
    line = mask[:, 0] if axis == 0 else mask[0]
    assert shape[axis] - int(line.sum()) == count_pruned(shape[axis], sparsity)
    check_mask(mask, Channel(axis))


def test_the_highest_scores_are_kept() -> None:
    scores = torch.tensor([[5.0, 1.0, 4.0, 2.0, 3.0, 0.0]])
    assert mask_from_scores(scores, Unstructured(), 0.5).tolist() == [[True, False, True, False, True, False]]
    assert mask_from_scores(scores, NM(1, 3)).tolist() == [[True, False, False, False, True, False]]
    assert mask_from_scores(scores, Block(1, 2), 0.34).tolist() == [[True, True, True, True, False, False]]


@given(shapes, sparsities, st.integers(0, 99))
def test_no_pruned_score_exceeds_a_kept_one(shape: tuple[int, int], sparsity: float, seed: int) -> None:
    scores = scores_of(shape, seed, 5)
    mask = mask_from_scores(scores, Unstructured("tensor"), sparsity)
    if mask.any() and not mask.all():
        assert scores[~mask].max() <= scores[mask].min()


def test_of_equal_scores_the_lower_index_goes_first() -> None:
    assert mask_from_scores(torch.ones(1, 5), Unstructured(), 0.5).tolist() == [[False] * 3 + [True] * 2]
    assert mask_from_scores(torch.ones(2, 4), NM(2, 4)).tolist() == [[False, False, True, True]] * 2


@pytest.mark.parametrize("pattern", [Unstructured(), NM(2, 4), Block(2, 2), Channel(1)])
def test_nan_scores_are_refused(pattern: object) -> None:
    scores = torch.rand(4, 8)
    scores[1, 3] = float("nan")
    with pytest.raises(ScoreError, match="NaN"):
        mask_from_scores(scores, pattern, 0.5)  # type: ignore[arg-type]


def test_infinite_scores_are_only_very_high() -> None:
    scores = torch.tensor([[1.0, float("inf"), 2.0, float("-inf")]])
    assert mask_from_scores(scores, Unstructured(), 0.5).tolist() == [[False, True, True, False]]


def test_a_sparsity_that_contradicts_nm_is_refused() -> None:
    with pytest.raises(SparsityError, match="2:4"):
        mask_from_scores(torch.rand(4, 8), NM(2, 4), 0.7)
    assert mask_from_scores(torch.rand(4, 8), NM(2, 4), 0.5).sum() == 16


def test_check_mask_sees_each_violation() -> None:
    mask = torch.zeros(4, 8, dtype=torch.bool)
    mask[2, 4:7] = True
    with pytest.raises(PatternError, match="row 2 keeps 3"):
        check_mask(mask, NM(2, 4))
    with pytest.raises(PatternError, match="cuts"):
        check_mask(mask, Block(2, 2))
    with pytest.raises(PatternError, match="channels"):
        check_mask(mask, Channel(0))


@pytest.mark.parametrize(
    "pattern",
    [
        Unstructured("row"),
        Unstructured("tensor"),
        Unstructured("columns:32"),
        NM(2, 4),
        NM(5, 7),
        NM(1, 64),
        Block(4, 4),
        Block(3, 5, "row"),
        Channel(0),
        Channel(1),
    ],
)
@settings(max_examples=25)
@given(shape=shapes, sparsity=sparsities)
def test_counts_are_known_without_scores(pattern: Pattern, shape: tuple[int, int], sparsity: float) -> None:
    if isinstance(pattern, Block) and (shape[0] < pattern.rows or shape[1] < pattern.cols):
        return
    wanted = pattern.sparsity if isinstance(pattern, NM) else sparsity
    kept = int(mask_from_scores(scores_of(shape, 0), pattern, wanted).sum())
    known = most_kept(shape, pattern, wanted)
    if isinstance(pattern, Block):
        cut = shape[0] % pattern.rows or shape[1] % pattern.cols
        assert kept <= known <= shape[0] * shape[1] if cut else known == kept
    else:
        assert known == kept
