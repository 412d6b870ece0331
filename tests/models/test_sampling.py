"""Sampling against transformers' own processors: the same tokens kept, with the same probabilities."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gossamer.errors import ModelError, SamplingError
from gossamer.models.sampling import (
    Sampler,
    Sampling,
    distribution,
    finite_logits,
    log_probabilities,
    penalized,
)


def oracle(logits: torch.Tensor, ids: list[int], asked: Sampling) -> torch.Tensor:
    """Probabilities ``(vocab,)`` by transformers, in the order of its `generate`; float64 throughout."""
    scores, seen = logits.double()[None], torch.tensor([ids])
    if asked.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(float(asked.repetition_penalty))(seen, scores)
    scores = TemperatureLogitsWarper(float(asked.temperature))(seen, scores)
    if asked.top_k:
        scores = TopKLogitsWarper(asked.top_k)(seen, scores)
    if asked.top_p < 1:
        scores = TopPLogitsWarper(asked.top_p)(seen, scores)
    if asked.min_p:
        scores = MinPLogitsWarper(asked.min_p)(seen, scores)
    return scores.softmax(-1)[0]


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 400),
    seed=st.integers(0, 2**32 - 1),
    spread=st.sampled_from([0.0, 0.3, 2.0, 12.0]),
    ties=st.booleans(),
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 7, 50, 1000]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 0.999)),
    min_p=st.one_of(st.just(0.0), st.floats(1e-6, 1.0)),
    penalty=st.sampled_from([1.0, 0.5, 1.3, 4.0]),
)
@example(64, 0, 0.0, True, 1.0, 0, 0.7, 0.0, 1.0)
def test_filters_are_those_of_transformers(
    size: int, seed: int, spread: float, ties: bool, temperature: float, top_k: int, top_p: float,
    min_p: float, penalty: float,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(size, generator=generator) * spread
    logits = logits.round() if ties else logits
    ids = torch.randint(size, (9,), generator=generator).tolist()
    asked = Sampling(temperature, top_k, top_p, min_p, penalty)
    expected = oracle(logits, ids, asked).numpy()
    for nudge in (-1e-9, 1e-9):  # a token that only rounding puts on one side of a border says nothing
        nudged = replace(
            asked,
            top_p=min(1.0, max(1e-9, top_p + nudge)) if top_p < 1 else 1.0,
            min_p=min(1.0, max(0.0, min_p + nudge)) if min_p else 0.0,
        )
        assume(((oracle(logits, ids, nudged).numpy() > 0) == (expected > 0)).all())
    wide = logits.double().numpy()
    tokens, probabilities = distribution(penalized(wide, set(ids), penalty), asked)
    found = np.zeros(size)
    found[tokens] = probabilities
    if (
        ties or spread == 0
    ):  # of equal tokens at the border of top-p, transformers keeps any, and Gossamer the last
        found, expected = np.sort(found), np.sort(expected)
    assert ((found > 0) == (expected > 0)).all()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)


def test_each_filter_by_hand() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))

    def kept(**asked: float) -> list[int]:
        return distribution(logits, Sampling(**{"temperature": 1.0, **asked}))[0].tolist()  # type: ignore[arg-type]

    assert kept() == [0, 1, 2, 3]
    assert kept(top_k=2) == [0, 1]
    assert kept(top_p=0.7) == [0, 1]  # 0.5 + 0.3 reaches 0.7
    assert kept(top_p=1e-9) == [0]
    assert kept(min_p=0.25) == [0, 1, 2]  # 0.15 is more than a quarter of 0.5
    assert kept(top_k=3, top_p=0.85) == [0, 1, 2]  # of what is left, 0.5 + 0.3 is 0.84
    assert kept(top_k=3, top_p=0.83) == [0, 1]
    assert kept(temperature=0.5, min_p=0.25) == [0, 1]  # (0.15 / 0.5) squared is less than a quarter
    np.testing.assert_allclose(distribution(logits, Sampling(temperature=1e-30))[1], [1, 0, 0, 0])
    np.testing.assert_allclose(np.exp(log_probabilities(logits * 1)), [0.5, 0.3, 0.15, 0.05], rtol=1e-6)


def test_draws_follow_the_distribution() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sampler = Sampler(Sampling(temperature=1.0, seed=0))
    counts = np.bincount([sampler.choose(logits) for _ in range(8000)], minlength=4)
    np.testing.assert_allclose(counts / 8000, [0.5, 0.3, 0.15, 0.05], atol=0.02)
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.7, seed=0))
    counts = np.bincount([sampler.choose(logits) for _ in range(4000)], minlength=4)
    np.testing.assert_allclose(counts / 4000, [5 / 8, 3 / 8, 0, 0], atol=0.03)


def test_greedy_takes_the_first_of_the_likeliest_and_penalizes_what_was_there() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0], dtype=np.float32)
    assert Sampler(Sampling()).choose(logits) == 1
    sampler = Sampler(Sampling(repetition_penalty=2.0), [1, 1, 99])
    assert [sampler.choose(logits) for _ in range(3)] == [2, 3, 1]  # 1.5, then 1.5, and then all are halved
    assert logits.tolist() == [1.0, 3.0, 3.0, 2.0]
    assert Sampler(Sampling(repetition_penalty=2.0), [0]).choose(np.array([-1.0, -1.5], np.float32)) == 1


def test_choosing_leaves_torchs_threads_asleep() -> None:
    """No operation of PyTorch sees the vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Refusing(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            if "detach" in str(func):
                return func(*args, **(kwargs or {}))
            raise AssertionError(func)

    logits = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    with Refusing():
        for asked in (Sampling(), Sampling(1.0, 50, 0.9, 0.05, 1.1), Sampling(1.0, top_p=0.9)):
            Sampler(asked, [1, 2]).choose(finite_logits(logits))


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", (-0.1, float("nan"), float("inf"), None)),
        ("top_k", (-1, 1.5, float("inf"), None)),
        ("top_p", (0.0, 1.01, float("nan"))),
        ("min_p", (-0.1, 1.1, float("nan"))),
        ("repetition_penalty", (0.0, -1.0, float("nan"), float("inf"))),
        ("seed", (-1, 0.5, float("inf"), "1")),
    ],
)
def test_settings_out_of_range_are_named(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(SamplingError, match=f"{name} must be .*got {value}"):
            Sampling(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(value: float) -> None:
    with pytest.raises(ModelError, match="NaN or infinite"):
        finite_logits(torch.tensor([0.0, value]))
