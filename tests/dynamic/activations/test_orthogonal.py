"""WINA's preparation: the same function, orthogonal columns, and gates that act in the new coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from activation_probes import inputs_of, logits

from gossamer.dynamic.activations import calibrate, method, orthogonal_columns
from gossamer.errors import ModelError
from gossamer.matrices import Dense, pack
from gossamer.nn import StructuredLinear
from tiny import tiny_model, tiny_tokens

KEY, GATE = "model.layers.1.self_attn.k_proj", "model.layers.1.mlp.gate_proj"


ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {"model_type": "gemma", "head_dim": 16},  # norms multiply by 1 + weight
    "stablelm": {"model_type": "stablelm"},  # norms also add
}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_prepared_model_computes_the_same(arch: str) -> None:
    model, ids = tiny_model("llama", **{"model_type": arch, **ARCHITECTURES[arch]}), tiny_tokens()
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    assert torch.allclose(logits(orthogonal_columns(model), ids), logits(model, ids), atol=1e-4)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


@pytest.mark.parametrize("name", [KEY, GATE])
def test_columns_are_orthogonal(name: str) -> None:
    weight = orthogonal_columns(tiny_model()).get_submodule(name).weight.detach().double()
    gram = weight.T @ weight
    assert (gram - gram.diag().diag()).abs().max() < 1e-5 * gram.max()
    plain = tiny_model().get_submodule(name).weight.detach().double()
    gram = plain.T @ plain
    assert (gram - gram.diag().diag()).abs().max() > 0.1 * gram.max()


@pytest.mark.parametrize("arch", ["llama", "gemma"])
def test_weights_of_norms_are_in_the_layers_that_are_rotated(arch: str) -> None:
    """What is dropped are then directions of the normalised state, as in the authors' code."""
    model = tiny_model("llama", model_type=arch, head_dim=16)
    prepared = orthogonal_columns(model)
    one = 0.0 if arch == "gemma" else 1.0
    for name, norm_name in ((KEY, "input_layernorm"), (GATE, "post_attention_layernorm")):
        norm = model.model.layers[1].get_submodule(norm_name)
        folded = model.get_submodule(name).weight.detach() * (norm.weight.detach() + 1 - one)
        columns = prepared.get_submodule(name).weight.detach().norm(dim=0)
        values = torch.linalg.svdvals(folded)
        assert torch.allclose(columns[: len(values)], values, atol=1e-4)
        inner: Any = prepared.model.layers[1].get_submodule(norm_name)
        assert type(inner.norm) is type(norm)
        assert (inner.norm.weight == one).all()


@pytest.mark.parametrize("name", [KEY, GATE])
def test_no_other_choice_of_as_many_activations_errs_less(name: str) -> None:
    model, ids = orthogonal_columns(tiny_model()), tiny_tokens()
    gates = calibrate(model, method("wina", prepared=True, selection="top_k"), ids).gates(0.5)
    weight = model.get_submodule(name).weight.detach()
    for x in inputs_of(model, name, lambda: logits(model, ids)).reshape(-1, weight.shape[1])[:8]:
        scores = x.abs() * torch.tensor(gates.gates[name].importance)
        dropped = gates.gates[name].drops(scores)
        error = (weight @ (x * dropped)).norm()
        for _ in range(20):
            other = dropped[torch.randperm(len(dropped))]
            assert error <= (weight @ (x * other)).norm() * (1 + 1e-5)


def test_prepared_weighs_the_orthogonal_layers_alone() -> None:
    model, ids = orthogonal_columns(tiny_model()), tiny_tokens()
    gates = calibrate(model, method("wina", prepared=True), ids).gates(0.5).gates
    weighed = {name.rpartition(".")[2] for name, gate in gates.items() if gate.importance is not None}
    assert weighed == {"k_proj", "gate_proj"}


def test_thresholds_of_zero_are_dense() -> None:
    model, ids = tiny_model(), tiny_tokens()
    prepared = orthogonal_columns(model)
    with calibrate(prepared, method("wina", prepared=True), ids).gates(0.0).attach(prepared):
        assert torch.allclose(logits(prepared, ids), logits(model, ids), atol=1e-4)


def test_a_packed_model_is_refused_before_it_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    layer: Any = model.get_submodule(GATE)
    model.set_submodule(GATE, StructuredLinear(pack(Dense(layer.weight.detach()), "int8")))
    monkeypatch.setattr("copy.deepcopy", lambda _: pytest.fail("it is copied"))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.gate_proj is a StructuredLinear"):
        orthogonal_columns(model)


def test_a_model_with_other_names_is_refused() -> None:
    with pytest.raises(ModelError, match="cannot be made orthogonal"):
        orthogonal_columns(tiny_model("gpt2"))
    with pytest.raises(ModelError, match="has post_feedforward_layernorm: columns"):
        orthogonal_columns(tiny_model("gemma2"))
