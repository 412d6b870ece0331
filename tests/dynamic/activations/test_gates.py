"""Gates in a model: what they drop, what they leave, how they are saved, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from activation_probes import hooks, inputs_of, logits
from torch import nn

from gossamer.dynamic.activations import METHODS, Gate, Gates, calibrate, linear_sites, method, settle
from gossamer.errors import CheckpointError, ModelError, OutputError, SparsityError
from gossamer.matrices import Dense, pack
from gossamer.nn import StructuredLinear
from tiny import tiny_folder, tiny_model, tiny_tokens

LAYER = "model.layers.1.mlp.down_proj"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_sparsity_zero_is_dense_to_the_bit(name: str) -> None:
    model, ids = tiny_model(), tiny_tokens()
    dense = logits(model, ids)
    calibrated = calibrate(model, method(name), ids)
    with calibrated.gates(0.0).attach(model) as attached:
        assert hooks(model) == len(calibrated.sites)
        assert torch.equal(logits(model, ids), dense)
    assert set(attached.achieved().values()) == {0.0}


@pytest.mark.parametrize("name", sorted(METHODS))
def test_hooks_are_removed_whatever_happens(name: str) -> None:
    model, ids = tiny_model(), tiny_tokens()
    dense = logits(model, ids)
    gates = calibrate(model, method(name), ids).gates(0.5)
    assert hooks(model) == 0
    with gates.attach(model):
        assert not torch.equal(logits(model, ids), dense)
    assert hooks(model) == 0
    with pytest.raises(RuntimeError, match="stop"), gates.attach(model):
        raise RuntimeError("stop")
    assert hooks(model) == 0
    attached = gates.attach(model)
    attached.detach()
    attached.detach()
    assert torch.equal(logits(model, ids), dense)


def test_a_threshold_drops_what_is_at_most_it_and_nothing_else() -> None:
    model, ids = tiny_model(), tiny_tokens()
    dense = inputs_of(model, LAYER, lambda: logits(model, ids))
    threshold = dense.abs().flatten().kthvalue(1000).values.item()
    with Gates("teal", {LAYER: Gate(128, 0.1, threshold)}).attach(model) as attached:
        found = inputs_of(model, LAYER, lambda: logits(model, ids))
    assert torch.equal(found, torch.where(dense.abs() > threshold, dense, 0))
    assert int((found == 0).sum()) == 1000
    assert attached.achieved() == {LAYER: 1000 / dense.numel()}


def test_importance_weighs_the_score() -> None:
    model, ids = tiny_model(), tiny_tokens()
    dense = inputs_of(model, LAYER, lambda: logits(model, ids))
    importance = torch.arange(128.0) / 64
    with Gates("any", {LAYER: Gate(128, 0.5, 0.3, tuple(importance.tolist()))}).attach(model):
        found = inputs_of(model, LAYER, lambda: logits(model, ids))
    assert torch.equal(found, torch.where(dense.abs() * importance > 0.3, dense, 0))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.7])
def test_top_k_keeps_the_same_number_of_every_token(sparsity: float) -> None:
    model, ids = tiny_model(), tiny_tokens()
    gates = calibrate(model, method("topk")).gates(sparsity)
    kept = 128 - int(sparsity * 128 + 0.5)
    with gates.attach(model):
        found = inputs_of(model, LAYER, lambda: logits(model, ids))
    assert ((found != 0).sum(dim=-1) == kept).all()
    only = Gates("topk", {LAYER: gates.gates[LAYER]})  # nothing before it is gated: the same inputs
    dense = inputs_of(model, LAYER, lambda: logits(model, ids))
    with only.attach(model):
        found = inputs_of(model, LAYER, lambda: logits(model, ids))
    smallest = dense.abs().topk(kept, dim=-1).values[..., -1:]
    assert torch.equal(found, torch.where(dense.abs() >= smallest, dense, 0))


def test_top_k_breaks_ties_by_index() -> None:
    linear = nn.Sequential(nn.Linear(4, 4))
    with Gates("topk", {"0": Gate(4, 0.5)}).attach(linear):
        found = inputs_of(linear, "0", lambda: linear(torch.tensor([[1.0, -1.0, 1.0, 1.0]])))
    assert found.tolist() == [[0.0, 0.0, 1.0, 1.0]]


@pytest.mark.parametrize("gate", [Gate(4, 0.5, 1.0), Gate(4, 0.5), Gate(4, 0.5, 1.0, (1.0, 1.0, 0.0, 1.0))])
def test_nan_is_never_dropped(gate: Gate) -> None:
    linear = nn.Sequential(nn.Linear(4, 4))
    x = torch.tensor([[0.1, 2.0, float("nan"), 3.0]])
    with Gates("any", {"0": gate}).attach(linear):
        assert linear(x).isnan().all()


def test_structured_linears_are_gated_as_plain_ones() -> None:
    model, ids = tiny_model(), tiny_tokens()
    plain = calibrate(model, method("wina"), ids)
    sites = linear_sites(model)
    for name, site in sites.items():
        parent, _, last = name.rpartition(".")
        packed = pack(Dense(site.module.weight.detach()), values="float32")
        setattr(model.get_submodule(parent), last, StructuredLinear(packed, site.module.bias))
    structured = calibrate(model, method("wina"), ids)
    assert list(structured.sites) == list(plain.sites)
    assert all(structured.sites[name].bytes >= site.bytes for name, site in sites.items())
    with structured.gates(0.5).attach(model) as attached:
        logits(model, ids)
    assert 0.4 < attached.achieved()[LAYER] < 0.6
    for name, gate in structured.gates(0.5).gates.items():
        assert gate.importance == pytest.approx(plain.gates(0.5).gates[name].importance, rel=1e-6)
        assert gate.threshold == pytest.approx(plain.gates(0.5).gates[name].threshold, rel=0.02)


@pytest.mark.parametrize("name", sorted(METHODS))
def test_saved_beside_a_model_and_loaded_again(name: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    model, ids = tiny_model(), tiny_tokens()
    gates = calibrate(model, method(name), ids).gates(0.5)
    file = gates.save(folder)
    assert not list(folder.glob("*.tmp"))
    again = Gates.load(folder)
    assert again == gates
    with gates.attach(model):
        expected = logits(model, ids)
    with again.attach(model):
        assert torch.equal(logits(model, ids), expected)
    before = file.read_bytes()
    again.save(folder)
    assert file.read_bytes() == before


def test_damaged_documents_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        Gates.load(tmp_path)
    file = Gates("teal", {LAYER: Gate(4, 0.5, 0.1, (1.0, 2.0, 3.0, 4.0))}).save(tmp_path)
    good = json.loads(file.read_text())
    file.write_text(file.read_text()[:-9])
    with pytest.raises(CheckpointError, match="damaged"):
        Gates.load(tmp_path)
    for key, bad, says in [
        ("importance", [1.0, 2.0], "4 activations has 2"),
        ("importance", [1.0, 2.0, 3.0, float("nan")], "importance"),
        ("importance", [1.0, 2.0, 3.0, -1.0], "importance"),
        ("importance", 3, "no document"),
        ("threshold", -0.5, "threshold"),
        ("threshold", float("nan"), "threshold"),
        ("threshold", float("inf"), "threshold"),
        ("features", "many", "no document"),
    ]:
        content = json.loads(json.dumps(good))
        content["gates"][LAYER][key] = bad
        with pytest.raises(CheckpointError, match=says):
            Gates.from_dict(content)
    for content in ({**good, "schema": 2}, {"schema": 1}, [], None):
        with pytest.raises(CheckpointError):
            Gates.from_dict(content)
    with pytest.raises(OutputError, match="cannot write"):
        Gates("teal", {}).save(tmp_path / "missing")


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
def test_sparsity_outside_its_range(sparsity: float) -> None:
    with pytest.raises(SparsityError):
        Gate(4, sparsity)


def test_gates_of_another_model_are_refused_before_any_hook() -> None:
    model = tiny_model()
    good = Gate(128, 0.5, 0.1)
    with pytest.raises(ModelError, match=r"no module model\.layers\.7\.mlp\.down_proj"):
        Gates("teal", {LAYER: good, "model.layers.7.mlp.down_proj": good}).attach(model)
    with pytest.raises(ModelError, match="reads 64 activations, and its gate 128"):
        Gates("teal", {LAYER: good, "model.layers.0.mlp.up_proj": good}).attach(model)
    assert hooks(model) == 0
    narrow = Gates("chess", {"model.layers.0.mlp.act_fn": Gate(64, 0.5, 0.1)})
    with narrow.attach(model), pytest.raises(ModelError, match="has 128 activations, and its gate 64"):
        logits(model, tiny_tokens())
    with pytest.raises(ModelError, match="has 128 activations, and its gate 64"):
        settle(model, narrow, tiny_tokens())
    assert hooks(model) == 0
