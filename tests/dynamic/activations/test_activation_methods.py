"""The methods: their scores against the papers' formulas, the sparsity they reach, how it is allocated."""

from __future__ import annotations

import pytest
import torch
from activation_probes import hooks, inputs_of, logits
from torch import nn

from gossamer.dynamic.activations import (
    METHODS,
    calibrate,
    greedy,
    greedy_levels,
    linear_sites,
    method,
    natural_sparsity,
    settle,
)
from gossamer.errors import CalibrationError, MethodError, ModelError, SparsityError
from tiny import tiny_model, tiny_tokens

DOWN = "model.layers.0.mlp.down_proj"


@pytest.mark.parametrize("sparsity", [0.15, 0.25, 0.5])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_reaches_its_target_on_the_calibration_text(name: str, sparsity: float) -> None:
    model, windows = tiny_model(), tiny_tokens(4, 64)
    gates = calibrate(model, method(name), windows).gates(sparsity)
    with gates.attach(model) as attached:
        logits(model, windows)
    shares = attached.achieved()
    assert set(shares) == set(gates.gates)
    assert sum(shares.values()) / len(shares) == pytest.approx(sparsity, abs=0.02)


@pytest.mark.parametrize("name", ["teal", "wina", "chess"])
def test_each_layer_alone_reaches_its_target_closely(name: str) -> None:
    model, windows = tiny_model(), tiny_tokens(4, 64)
    calibrated = calibrate(model, method(name), windows)
    for site in calibrated.sites:
        with calibrated.gates({site: 0.7}).attach(model) as attached:
            logits(model, windows)
        assert attached.achieved()[site] == pytest.approx(0.7, abs=0.005)


@pytest.mark.parametrize("sparsity", [0.25, 0.8])
@pytest.mark.parametrize("name", sorted(METHODS))
def test_settled_gates_reach_their_target_in_every_layer(name: str, sparsity: float) -> None:
    model, windows = tiny_model(), tiny_tokens(4, 64)
    gates = calibrate(model, method(name), windows).gates(sparsity)
    settled = settle(model, gates, windows)
    assert hooks(model) == 0
    with settled.attach(model) as attached:
        logits(model, windows)
    assert attached.achieved() == pytest.approx(dict.fromkeys(gates.gates, sparsity), abs=0.005)
    assert (settled == gates) == (name == "topk")
    first = next(iter(gates.gates))
    assert settled.gates[first] == gates.gates[first]  # nothing is gated before it


def test_wina_scores_are_the_formula() -> None:
    model, ids = tiny_model(), tiny_tokens()
    x = inputs_of(model, DOWN, lambda: logits(model, ids)).reshape(-1, 128)
    weight = model.get_submodule(DOWN).weight.detach()
    scores = torch.stack(
        [
            torch.stack([row[j].abs() * sum(w * w for w in weight[:, j]).sqrt() for j in range(128)])
            for row in x[:3]
        ]
    )
    gate = calibrate(model, method("wina"), ids).gates(0.5).gates[DOWN]
    assert torch.allclose(x[:3].abs() * torch.tensor(gate.importance), scores, rtol=1e-5)
    whole = x.abs() * weight.norm(dim=0)
    assert gate.threshold == pytest.approx(
        whole.flatten().kthvalue(whole.numel() // 2).values.item(), rel=0.004
    )


def test_wina_is_teal_where_all_columns_weigh_the_same() -> None:
    model, ids = tiny_model(), tiny_tokens()
    layer = model.get_submodule(DOWN)
    layer.weight.data /= layer.weight.data.norm(dim=0)
    found = {}
    for name in ("teal", "wina"):
        with calibrate(model, method(name), ids).gates({DOWN: 0.4}).attach(model):
            found[name] = inputs_of(model, DOWN, lambda: logits(model, ids))
    assert ((found["teal"] == 0) == (found["wina"] == 0)).float().mean() > 0.998


def test_wina_errs_less_than_teal_where_columns_differ_and_are_orthogonal() -> None:
    torch.manual_seed(0)
    model, ids = tiny_model(), tiny_tokens(4, 64)
    layer = model.model.layers[0].self_attn.q_proj
    orthogonal = torch.linalg.qr(torch.randn(64, 64)).Q
    layer.weight.data = orthogonal * torch.logspace(-1, 1, 64)[torch.randperm(64)]
    name = "model.layers.0.self_attn.q_proj"
    errors = {}
    dense = layer(inputs_of(model, name, lambda: logits(model, ids)))
    for which in ("teal", "wina"):
        with calibrate(model, method(which), ids).gates({name: 0.5}).attach(model):
            errors[which] = (layer(inputs_of(model, name, lambda: logits(model, ids))) - dense).norm()
    assert errors["wina"] < 0.5 * errors["teal"]


def test_chess_has_a_threshold_for_each_channel() -> None:
    model, ids = tiny_model(), tiny_tokens()
    mlp = model.model.layers[0].mlp
    x = inputs_of(model, "model.layers.0.mlp.up_proj", lambda: logits(model, ids)).reshape(-1, 64)
    with torch.no_grad():
        activated, up = mlp.act_fn(mlp.gate_proj(x)), mlp.up_proj(x)
    calibrated = calibrate(model, method("chess"), ids)
    gate = calibrated.gates(0.6).gates["model.layers.0.mlp.act_fn"]
    thresholds = gate.threshold / up.abs().mean(dim=0)
    only = calibrated.gates({"model.layers.0.mlp.act_fn": 0.6})
    with only.attach(model):
        found = inputs_of(model, DOWN, lambda: logits(model, ids)).reshape(-1, 128)
    expected = torch.where(activated.abs() > thresholds, activated, 0) * up
    assert ((found == 0) == (expected == 0)).float().mean() > 0.999
    assert (found == 0).float().mean().item() == pytest.approx(0.6, abs=0.005)
    assert thresholds.max() > 1.2 * thresholds.min()


def test_chess_chooses_layers() -> None:
    model = tiny_model()
    assert {name.rpartition(".")[2] for name in method("chess").sites(model)} == {
        "act_fn",
        "q_proj",
        "o_proj",
    }
    only = method("chess", attention=()).sites(model)
    assert {name.rpartition(".")[2] for name in only} == {"act_fn"}
    sites = linear_sites(model)
    both = sites[DOWN].bytes + sites["model.layers.0.mlp.up_proj"].bytes
    assert only["model.layers.0.mlp.act_fn"].bytes == both
    with pytest.raises(MethodError, match="no gated MLP"):
        method("chess").sites(tiny_model("gpt2"))


@pytest.mark.parametrize("arch", ["gpt2", "qwen3", "gemma2", "opt", "mixtral"])
def test_other_architectures(arch: str) -> None:
    model, ids = tiny_model(arch), tiny_tokens(2, 32)
    gates = calibrate(model, method("wina"), ids).gates(0.3)
    with gates.attach(model) as attached:
        logits(model, ids)
    shares = attached.achieved()
    # what reads a ReLU (OPT's second layers) is half zeros by nature
    assert sorted(shares.values())[len(shares) // 2] == pytest.approx(0.3, abs=0.03)
    assert not any(name.endswith(("gate", "router")) for name in shares)


def test_routers_of_experts_are_no_sites() -> None:
    model = tiny_model()
    model.model.layers[0].mlp.router = nn.Linear(64, 4)
    model.model.layers[0].mlp.expert = nn.Linear(64, 4)
    names = {name.removeprefix("model.layers.0.mlp.") for name in linear_sites(model)}
    assert "expert" in names
    assert "router" not in names


def test_natural_sparsity_of_relu_and_of_silu() -> None:
    ids = tiny_tokens()
    relu = natural_sparsity(tiny_model(hidden_act="relu"), ids)
    assert all(0.3 < share < 0.95 for name, share in relu.items() if name.endswith("down_proj"))
    assert all(share < 0.01 for name, share in relu.items() if not name.endswith("down_proj"))
    model = tiny_model()
    silu = natural_sparsity(model, ids)
    assert set(silu) == set(linear_sites(model))
    assert max(silu.values()) < 0.01
    x = inputs_of(model, DOWN, lambda: logits(model, ids))
    expected = (x.abs() <= 0.1 * x.abs().amax(dim=-1, keepdim=True)).float().mean().item()
    assert natural_sparsity(model, ids, 0.1)[DOWN] == pytest.approx(expected, abs=1e-6)
    assert hooks(model) == 0


def test_nan_activations_are_named() -> None:
    model, ids = tiny_model(), tiny_tokens()
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("nan")
    gates = calibrate(tiny_model(), method("teal"), ids).gates(0.5)
    named = r"model\.layers\.1\.mlp\.gate_proj: an activation is NaN"
    with pytest.raises(CalibrationError, match=named):
        settle(model, gates, ids)
    for name in ("teal", "wina"):
        with pytest.raises(CalibrationError, match=named):
            calibrate(model, method(name), ids)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.act_fn: an activation is NaN"):
        calibrate(model, method("chess"), ids)
    with pytest.raises(CalibrationError, match=r"model\.layers\.1\.mlp\.gate_proj"):
        natural_sparsity(model, ids)
    assert hooks(model) == 0


def test_bad_requests_fail_with_a_sentence() -> None:
    model, ids = tiny_model(), tiny_tokens()
    with pytest.raises(MethodError, match="did you mean 'teal'"):
        method("teel")
    with pytest.raises(MethodError, match="does not take these options"):
        method("teal", k=3)
    with pytest.raises(MethodError, match="unknown selection 'best'"):
        method("wina", selection="best")
    with pytest.raises(CalibrationError, match="needs calibration text"):
        calibrate(model, method("teal"))
    with pytest.raises(CalibrationError, match="needs calibration text"):
        calibrate(model, method("chess", selection="top_k"))
    calibrated = calibrate(model, method("teal"), ids)
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(SparsityError):
            calibrated.gates(sparsity)
        with pytest.raises(SparsityError):
            natural_sparsity(model, ids, sparsity)
    with pytest.raises(MethodError, match=r"gates no model\.layers\.9"):
        calibrated.gates({"model.layers.9.mlp.down_proj": 0.5})
    with pytest.raises(ModelError):
        linear_sites(nn.Sequential(nn.Linear(4, 4)))


def test_greedy_levels_take_the_cheap_and_spend_the_budget() -> None:
    sizes = {"cheap": 100.0, "dear": 300.0}

    def error(levels: dict[str, float]) -> float:
        return levels["cheap"] ** 2 + 30 * levels["dear"] ** 2

    levels = greedy_levels(sizes, 0.3, error)
    assert sum(levels[name] * size for name, size in sizes.items()) == pytest.approx(0.3 * 400)
    uniform = dict.fromkeys(sizes, 0.3)
    assert error(levels) < error(uniform)
    assert levels["cheap"] > 0.9
    before = greedy_levels(sizes, 0.15, error)
    assert greedy_levels(sizes, 0.3, error, start=before) == pytest.approx(levels)
    assert greedy_levels(sizes, 0.0, error) == {"cheap": 0.0, "dear": 0.0}
    full = greedy_levels(sizes, 0.98, error)
    assert full == pytest.approx({"cheap": 0.98, "dear": 0.98})
    for sparsity in (0.99, 1.0, -0.1):
        with pytest.raises(SparsityError):
            greedy_levels(sizes, sparsity, error)


@pytest.mark.parametrize("name", ["teal", "chess", "topk"])
def test_greedy_allocation_errs_less_at_the_same_bytes(name: str) -> None:
    model, windows = tiny_model(), tiny_tokens(2, 48)
    calibrated = calibrate(model, method(name), windows)
    levels = greedy(model, calibrated, 0.4, windows)
    assert set(levels) == set(calibrated.sites)
    block = {n: s for n, s in calibrated.sites.items() if n.startswith("model.layers.0.")}
    total = sum(site.bytes for site in block.values())
    assert sum(levels[n] * site.bytes for n, site in block.items()) == pytest.approx(0.4 * total)
    after = "model.layers.1.input_layernorm"
    dense = inputs_of(model, after, lambda: logits(model, windows))
    errors = []
    for chosen in ({n: levels[n] for n in block}, dict.fromkeys(block, 0.4)):
        with calibrated.gates(chosen).attach(model):
            errors.append((inputs_of(model, after, lambda: logits(model, windows)) - dense).norm().item())
    assert errors[0] < errors[1]
    assert hooks(model) == 0


def test_greedy_allocation_of_a_later_block_looks_at_its_own_inputs() -> None:
    model, windows = tiny_model(), tiny_tokens(2, 48)
    calibrated = calibrate(model, method("wina"), windows)
    dense = inputs_of(model, "model.norm", lambda: logits(model, windows))

    def error(levels: dict[str, float]) -> float:
        with calibrated.gates(levels).attach(model):
            found = inputs_of(model, "model.norm", lambda: logits(model, windows))
        return float((found - dense).double().square().sum())

    last = {n: site.bytes for n, site in calibrated.sites.items() if n.startswith("model.layers.2.")}
    expected = greedy_levels(last, 0.3, error)
    found = greedy(model, calibrated, 0.3, windows)
    assert {name: found[name] for name in last} == pytest.approx(expected)
