"""Sirius: what it keeps, what it writes itself, and that keeping nothing is dense greedy decoding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer import kernels
from gossamer.dynamic.activations import GatedSession, Gates, Sirius, calibrate, method
from gossamer.engine import Decoder, NativeSession
from gossamer.errors import MethodError
from gossamer.models.session import Session
from tiny import tiny_model, tiny_tokens

PROMPT = tiny_tokens(1, 20)[0].tolist()
ENGINES = ["transformers", *(["native"] if kernels.native_available() else [])]


def gates_of(model: Any, sparsity: float = 0.5) -> Gates:
    return calibrate(model, method("teal"), tiny_tokens(2, 64, seed=5)).gates(sparsity)


def sides(engine: str, model: Any, gates: Gates) -> tuple[Any, Any]:
    """A dense session, and a gated one of the same sequence."""
    if engine == "transformers":
        dense = Session(model)
        return dense, GatedSession(dense, gates)
    decoder = Decoder(model)
    native = NativeSession(decoder, torch.float32)
    return native, native.beside(decoder.gated(gates.gates))


def greedy(session: Any, count: int) -> tuple[int, ...]:
    tokens = [int(session.prompt(torch.tensor(PROMPT)).argmax())]
    while len(tokens) < count:
        tokens.append(int(session.step(tokens[-1]).argmax()))
    return tuple(tokens)


@pytest.mark.parametrize("engine", ENGINES)
def test_keeping_nothing_is_dense_greedy_decoding(engine: str) -> None:
    model = tiny_model("llama")
    gates = gates_of(model)
    dense, sparse = sides(engine, model, gates)
    made = Sirius(period=5, threshold=1.5).generate(dense, sparse, PROMPT, 30)
    assert made.tokens == greedy(sides(engine, model, gates)[0], 30)
    assert made.advances == (1,) * 29
    assert dense.length == len(PROMPT) + 29


@pytest.mark.parametrize("engine", ENGINES)
def test_every_token_is_the_gated_models_or_the_dense_models(engine: str) -> None:
    model = tiny_model("llama")
    gates = gates_of(model, 0.3)
    sirius = Sirius(period=6, threshold=0.05, temperature=1.0)
    made = sirius.generate(*sides(engine, model, gates), PROMPT, 40)
    assert len(made.tokens) == 40
    assert 1 + sum(made.advances) == 40
    assert 1 < made.mean_advance <= 6
    # the dense model reads it all again: tokens that end an advance are its likeliest, all others likely
    with torch.no_grad():
        logits = model(torch.tensor([[*PROMPT, *made.tokens]])).logits[0, len(PROMPT) - 1 : -1]
    at = 0
    ends = {at := at + advance for advance in made.advances} | {0}
    for i, (row, token) in enumerate(zip(logits, made.tokens, strict=True)):
        if i in ends:
            assert float(row.max() - row[token]) <= 1e-3
        else:
            assert float(row.softmax(0)[token]) >= 0.049


@pytest.mark.parametrize("engine", ENGINES)
def test_gates_that_drop_nothing_are_never_corrected(engine: str) -> None:
    model = tiny_model("llama")
    sides_ = sides(engine, model, gates_of(model, 0.0))
    # the likeliest of 384 tokens has a probability above 1 / 384
    made = Sirius(period=8, threshold=1 / 400, temperature=1.0).generate(*sides_, PROMPT, 33)
    assert made.tokens == greedy(sides(engine, model, gates_of(model))[0], 33)
    assert made.advances == (8, 8, 8, 8)


def test_it_ends_at_a_stop_token() -> None:
    model = tiny_model("llama")
    gates = gates_of(model)
    whole = Sirius(threshold=1e-6).generate(*sides("transformers", model, gates), PROMPT, 24)
    stop = whole.tokens[9]
    made = Sirius(threshold=1e-6).generate(*sides("transformers", model, gates), PROMPT, 24, stop={stop})
    assert made.tokens == whole.tokens[: whole.tokens.index(stop) + 1]


def test_no_tokens_are_none() -> None:
    model = tiny_model("llama")
    made = Sirius().generate(*sides("transformers", model, gates_of(model)), PROMPT, 0)
    assert made.tokens == made.advances == ()


@pytest.mark.parametrize("settings", [{"period": 0}, {"threshold": 0.0}, {"temperature": -1.0}])
def test_bad_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="Sirius needs"):
        Sirius(**settings)
