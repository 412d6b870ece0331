"""Gates in the native decoder: beside hooks in transformers, and beside itself without gates."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from gossamer import kernels
from gossamer.dynamic.activations import Gate, Gates, calibrate, method
from gossamer.engine import Decoder, NativeSession
from gossamer.errors import ModelError
from gossamer.matrices import Packed
from gossamer.nn import StructuredLinear, replace_module
from tiny import tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

TIERS = kernels.native.native().available() if kernels.native_available() else []
METHODS = [
    ("teal", "threshold"),
    ("wina", "threshold"),
    ("wina", "top_k"),
    ("chess", "threshold"),
    ("chess", "top_k"),
    ("topk", "top_k"),
]


def gates_of(model: Any, name: str = "teal", sparsity: Any = 0.4, **options: Any) -> Gates:
    return calibrate(model, method(name, **options), tiny_tokens(2, 64, seed=5)).gates(sparsity)


def packed(model: Any, values: str, layout: str) -> Any:
    """``model`` with the linear layers of its blocks packed, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            matrix = Packed.pack(module.weight.detach(), values, "dense").repack(layout)
            replace_module(model, name, StructuredLinear(matrix, module.bias))
    return model


def run_on(tier: str, monkeypatch: pytest.MonkeyPatch) -> None:
    index = kernels.native.native().tier(tier)
    monkeypatch.setattr(kernels.native, "tier", lambda name: index)


def logits(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    return NativeSession(decoder, torch.float32).logits(ids)


def steps(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    session = NativeSession(decoder, torch.float32)
    return torch.stack([session.step(int(token)) for token in ids])


@pytest.mark.parametrize(("name", "selection"), METHODS)
def test_logits_are_those_of_hooks_in_transformers(name: str, selection: str) -> None:
    model, ids = tiny_model("llama", attention_bias=True), tiny_tokens(1, 40)[0]
    gates = gates_of(model, name, selection=selection)
    with torch.no_grad(), gates.attach(model) as attached:
        want = model(ids[None]).logits[0]
    decoder = Decoder(model, gates.gates)
    got = logits(decoder, ids)
    # a score next to a threshold may fall to the other side
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-3
    want_shares, got_shares = attached.achieved(), decoder.achieved()
    assert got_shares.keys() == want_shares.keys()
    assert all(abs(got_shares[site] - want_shares[site]) <= 2e-3 for site in want_shares)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("name", "selection"), [("wina", "top_k"), ("chess", "threshold")])
def test_a_token_has_the_same_bits_in_any_company_and_on_any_threads(
    name: str, selection: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(tier, monkeypatch)
    model = tiny_model("llama", hidden_size=72, num_attention_heads=6, intermediate_size=104)
    gates, ids = gates_of(model, name, selection=selection).gates, tiny_tokens(1, 30)[0]
    decoder = Decoder(packed(model, "int8", "columns"), gates)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            parts = NativeSession(decoder, torch.float32)
            found += [logits(decoder, ids), steps(decoder, ids)]
            found.append(torch.cat([parts.logits(some) for some in ids.split([3, 9, 1, 17])]))
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(found[0], logits(decoder.gated(None), ids))
    for other in found[1:]:
        assert torch.equal(other, found[0])


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("name", "values"), [("teal", "int4"), ("chess", "bfloat16"), ("topk", "int8")])
def test_gates_that_drop_nothing_are_dense_to_the_bit(
    name: str, values: str, tier: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_on(tier, monkeypatch)
    model, ids = tiny_model("llama"), tiny_tokens(1, 30)[0]
    gates = gates_of(model, name, 0.0)
    dense = Decoder(packed(model, values, "dense"))
    for run in (logits, steps):
        assert torch.equal(run(dense.gated(gates.gates), ids), run(dense, ids))


@pytest.mark.parametrize("values", ["int8", "int4"])
@pytest.mark.parametrize("sparsity", [0.3, 0.8])  # below the break-even of columns, and past it
def test_columns_have_the_bits_of_the_dense_layout(values: str, sparsity: float) -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 30)[0]
    gates = gates_of(model, "wina", sparsity).gates
    dense = Decoder(packed(model, values, "dense"), gates)
    columns = Decoder(packed(tiny_model("llama"), values, "columns"), gates)
    for run in (logits, steps):
        assert torch.equal(run(columns, ids), run(dense, ids))


def test_a_few_gates_leave_the_other_sites_dense() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 30)[0]
    site = "model.layers.1.self_attn.k_proj"
    gates = Gates("teal", {site: Gate(64, 0.9, 1e9)})  # k reads zeros, q and v read all
    with torch.no_grad(), gates.attach(model):
        want = model(ids[None]).logits[0]
    decoder = Decoder(model, gates.gates)
    for got in (logits(decoder, ids), steps(decoder, ids)):
        assert float((got - want).abs().max() / want.abs().max()) <= 1e-4
    assert decoder.achieved() == {site: 1.0}


@pytest.mark.parametrize("threshold", [None, 1e9])
def test_equal_scores_are_dropped_by_index(threshold: float | None) -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 12)[0]
    # importance 0 makes all scores equal: top-k then drops the first half, a threshold everything
    site = "model.layers.0.mlp.down_proj"
    gates = Gates("any", {site: Gate(128, 0.5, threshold, (0.0,) * 128)})
    decoder = Decoder(model, gates.gates)
    with torch.no_grad(), gates.attach(model):
        want = model(ids[None]).logits[0]
    assert float((logits(decoder, ids) - want).abs().max() / want.abs().max()) <= 1e-4
    assert decoder.achieved() == {site: 0.5 if threshold is None else 1.0}


@pytest.mark.parametrize("threshold", [None, 0.5])
def test_nan_is_never_dropped(threshold: float | None) -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 12)[0]
    with torch.no_grad():
        model.model.layers[0].post_attention_layernorm.weight[3] = float("nan")
    gates = {f"model.layers.0.mlp.{name}": Gate(64, 0.5, threshold) for name in ("gate_proj", "up_proj")}
    assert bool(logits(Decoder(model, gates), ids).isnan().all())


def test_one_decoder_runs_dense_and_gated_over_one_cache() -> None:
    model, ids = tiny_model("llama"), tiny_tokens(1, 50)[0]
    dense = Decoder(model)
    gated = dense.gated(gates_of(model).gates)
    cache = dense.new_cache(torch.float32)
    first = dense.append(cache, ids[:40])[0]
    gated.append(cache, ids[40:])
    assert cache.length == 50
    cache.truncate(40)
    assert torch.equal(dense.append(cache, ids[40:])[0], logits(dense, ids)[-1])
    assert torch.equal(first, logits(dense, ids[:40])[-1])
    assert torch.equal(logits(gated.gated(None), ids), logits(dense, ids))


@pytest.mark.parametrize(
    ("site", "features", "said"),
    [
        ("model.layers.9.mlp.down_proj", 128, "has no site model.layers.9.mlp.down_proj"),
        ("lm_head", 64, "has no site lm_head"),
        ("model.layers.0.mlp.down_proj", 64, "has 128 activations, and its gate 64"),
        ("model.layers.0.mlp.act_fn", 64, "has 128 activations, and its gate 64"),
    ],
)
def test_gates_of_another_model_are_refused(site: str, features: int, said: str) -> None:
    model = tiny_model("llama")
    gates = {site: Gate(features, 0.5, 0.1)}
    for make in (partial(Decoder, model, gates), partial(Decoder(model).gated, gates)):
        with pytest.raises(ModelError, match=said):
            make()
