"""Any PyTorch model made sparse: each weight as the method itself makes it of what the weight reads."""

from __future__ import annotations

import copy
import sys
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.calibrate import Gram, InputNorm
from gossamer.calibrate.modules import gather_gradients, gather_inputs, waves
from gossamer.errors import CalibrationError, GossamerError, MethodError, ModelError
from gossamer.matrices.values import value_type
from gossamer.nn import StructuredLinear
from gossamer.nn.experts import take_apart
from gossamer.nn.views import weight_views
from gossamer.prune import METHODS, Layer, method
from gossamer.sparse import mask_from_scores, parse_pattern
from gossamer.sparse.masks import check_mask
from tiny import tiny_model, tiny_tokens


class Mixed(nn.Module):
    """A convolution, a recurrent layer, two linear layers that read the same, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.rnn = nn.GRU(8, 8, batch_first=True)
        self.left, self.right = nn.Linear(8, 16), nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        h = self.conv(x.transpose(1, 2)).transpose(1, 2).relu()
        h = self.rnn(h)[0]
        return self.head(self.left(h).relu() * self.right(h)) * scale


def batches(count: int = 3) -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(4, 6, 4) for _ in range(count)]


def cross_entropy(model: nn.Module, x: Tensor) -> Tensor:
    logits = model(x)
    return nn.functional.cross_entropy(logits.flatten(0, 1), torch.arange(logits[..., 0].numel()) % 5)


def test_each_layer_is_what_the_method_makes_of_its_inputs() -> None:
    model, dense = Mixed(), Mixed()
    found = gs.sparsify(model, batches(), method="obs", pattern="2:4", skip="head")
    # the oracle: layer by layer, on the inputs that the layers pruned before give
    for name in ("conv", "left", "right"):
        view = next(v for v in weight_views(dense)[0] if v.name == name)
        seen: list[Tensor] = []
        handle = view.module.register_forward_pre_hook(
            lambda module, args, view=view, seen=seen: seen.append(view.inputs(module, args))  # type: ignore[misc]
        )
        with torch.no_grad():
            for batch in batches():
                dense(batch)
        handle.remove()
        gram = Gram(view.shape[1])
        for rows in seen:
            gram.update(rows)
        gram.finish()
        layer = Layer(name, view.matrix(), {Gram: gram})
        want = method("obs").prune(layer, parse_pattern("2:4"), 0.5, value_type("float32"), 64)
        got = next(v for v in weight_views(model)[0] if v.name == name)
        torch.testing.assert_close(got.matrix(), want.weight)
        if name == "conv":
            for before in ("conv", "rnn"):
                dense.get_submodule(before).load_state_dict(model.get_submodule(before).state_dict())
    assert {one["name"] for one in found.layers} == {
        "conv", "rnn.weight_ih_l0", "rnn.weight_hh_l0", "left", "right",
    }  # fmt: skip
    assert found.left == {"head": "skipped"}
    assert torch.equal(model.head.weight, Mixed().head.weight)


@pytest.mark.parametrize("pack", [False, True])
def test_of_what_was_made_of_a_layer_only_its_mask_is_held(
    pack: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["gossamer.recipes.sparsify"]  # whose function of that name hides it
    made: list[weakref.ref[Any]] = []
    held: list[int] = []
    original = module.prune_layer

    def counted(*args: Any) -> Any:
        held.append(sum(one() is not None for one in made))
        pruned = original(*args)
        made.append(weakref.ref(pruned))
        return pruned

    monkeypatch.setattr(module, "prune_layer", counted)
    gs.sparsify(nn.Sequential(*(nn.Linear(64, 64) for _ in range(5))), [torch.randn(9, 64)], pack=pack)
    assert len(held) == 5
    assert max(held) <= 1


@pytest.mark.parametrize("name", sorted(name for name in METHODS if not METHODS[name].finds_masks))
@pytest.mark.parametrize(("pattern", "sparsity"), [("2:4", None), ("unstructured", 0.6)])
def test_every_method_keeps_its_pattern(name: str, pattern: str, sparsity: float | None) -> None:
    model = Mixed()
    found = gs.sparsify(model, batches(), method=name, pattern=pattern, sparsity=sparsity, loss=cross_entropy)
    assert len(found.masks) == 6
    for view in weight_views(model)[0]:
        mask = found.masks[view.name]
        if pattern == "2:4":
            check_mask(mask, parse_pattern(pattern))
        assert not view.matrix()[~mask].any()
    assert found.sparsity == pytest.approx(sparsity or 0.5, abs=0.03)


def test_masks_of_magnitude_need_no_batches() -> None:
    model, dense = Mixed(), Mixed()
    found = gs.sparsify(model, method="magnitude", sparsity=0.5)
    for view in weight_views(dense)[0]:
        mask = mask_from_scores(view.matrix().abs(), parse_pattern("unstructured:tensor"), 0.5)
        assert torch.equal(found.masks[view.name], mask)


def test_layers_that_compete_and_layers_by_shape() -> None:
    one = gs.sparsify(Mixed(), batches(), method="wanda", sparsity=0.5, allocation="global",
                      pattern="unstructured:model")  # fmt: skip
    assert one.sparsity == pytest.approx(0.5, abs=1e-3)
    assert len({round(layer["sparsity"], 2) for layer in one.layers}) > 2
    two = gs.sparsify(Mixed(), batches(), method="magnitude", sparsity=0.5, allocation="erk")
    shares = {layer["name"]: layer["sparsity"] for layer in two.layers}
    assert two.sparsity == pytest.approx(0.5, abs=0.02)
    assert shares["conv"] != shares["left"]


def test_statistics_are_of_batches_of_any_form() -> None:
    plain = Mixed()
    gs.sparsify(plain, batches(), method="wanda", sparsity=0.5)
    for made in ([(x, 2.0) for x in batches()], [{"x": x, "scale": 2.0} for x in batches()]):
        model = Mixed()
        gs.sparsify(model, made, method="wanda", sparsity=0.5)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_packed_layers_compute_the_same() -> None:
    model, packed = Mixed(), Mixed()
    gs.sparsify(model, batches(), pattern="32:64", values="int4")
    gs.sparsify(packed, batches(), pattern="32:64", values="int4", pack=True)
    assert isinstance(packed.left, StructuredLinear)
    assert isinstance(packed.conv, nn.Conv1d)
    x = batches()[0]
    with torch.no_grad():
        got, want = packed(x), model(x)
    assert float((got - want).norm() / want.norm()) < 5e-3  # kernels round inputs to bfloat16


def test_an_encoder_of_transformers() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    ).eval()
    dense = copy.deepcopy(model)
    ids = torch.arange(40).reshape(2, 20)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = gs.sparsify(model, [batch], sparsity=0.5, skip="pooler", pack=True)
    assert len(found.layers) == 12
    with torch.no_grad():
        a, b = model(**batch).last_hidden_state, dense(**batch).last_hidden_state
    assert 0 < float((a - b).norm() / b.norm()) < 0.5


def test_modes_are_left_as_they_were() -> None:
    model = Mixed().train()
    model.rnn.eval()
    gs.sparsify(model, batches(), method="magnitude", sparsity=0.5)
    assert (model.training, model.rnn.training, model.conv.training) == (True, False, True)


def refused(kind: type[Exception], match: str, model: nn.Module, *args: Any, **options: Any) -> None:
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(kind, match=match):
        gs.sparsify(model, *args, **options)
    after = model.state_dict()
    assert all(torch.equal(before[n].nan_to_num(), after[n].nan_to_num()) for n in before)


def test_bad_input_is_refused_and_changes_nothing() -> None:
    refused(CalibrationError, "needs calibration batches", Mixed(), sparsity=0.5)
    refused(CalibrationError, "give a loss", Mixed(), batches(), method="taylor", sparsity=0.5)
    refused(MethodError, "unknown allocation", Mixed(), batches(), sparsity=0.5, allocation="fair")
    refused(MethodError, "regular expressions", Mixed(), batches(), sparsity=0.5, skip="(")
    refused(ModelError, "no weights to prune", nn.LayerNorm(4), batches(), sparsity=0.5)
    refused(ModelError, "no weights to prune", Mixed(), batches(), sparsity=0.5, skip="")
    with pytest.raises(ModelError, match="takes a PyTorch module, not 'a/folder'"):
        gs.sparsify("a/folder", batches(), sparsity=0.5)  # type: ignore[arg-type]
    broken = Mixed()
    with torch.no_grad():
        broken.right.weight[0, 0] = torch.nan
    refused(ModelError, "right.*NaN", broken, batches(), sparsity=0.5)
    bad = [*batches(), torch.full((4, 6, 4), torch.inf)]
    refused(CalibrationError, "not finite", Mixed(), bad, sparsity=0.5)
    unused = Mixed()
    unused.extra = nn.Linear(3, 3)
    refused(
        CalibrationError,
        "no calibration input reached extra: name it in `skip`",
        unused,
        batches(),
        sparsity=0.5,
    )
    refused(GossamerError, "blocks of 32x32 do not fit", Mixed(), batches(), sparsity=0.5, pattern="32x32")


def test_a_failure_in_the_middle_puts_weights_back() -> None:
    calls = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if done == 2:
            raise KeyboardInterrupt

    model = Mixed()
    with pytest.raises(KeyboardInterrupt):
        gs.sparsify(model, batches(), sparsity=0.5, progress=stop)
    assert calls == 3
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), Mixed().parameters(), strict=True))


def test_statistics_are_shared_only_where_inputs_are_read_alike() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Conv1d(2, 3, 3), nn.Conv1d(2, 3, 3, stride=2), nn.Conv1d(2, 3, 3)

        def forward(self, x: Tensor) -> Any:
            return self.a(x), self.b(x), self.c(x)

    model = Two()
    found = gather_inputs(model, weight_views(model)[0], [torch.randn(1, 2, 9)], [InputNorm], {})
    assert found["a"] is found["c"]
    assert (found["a"][InputNorm].tokens, found["b"][InputNorm].tokens) == (7, 4)


def test_pytorchs_own_transformer() -> None:
    """Its fused attention is pruned by the method, on what it is called with."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3))
    dense = copy.deepcopy(model).eval()
    inputs = [torch.randn(2, 7, 16) for _ in range(3)]
    found = gs.sparsify(model, inputs, method="obs", pattern="2:4", skip=r"^1$")
    assert found.left == {"1": "skipped"}
    assert len(found.layers) == 8  # of each of two layers: projections, outputs, two linear layers
    assert {one["sparsity"] for one in found.layers} == {0.5}
    for name, mask in found.masks.items():
        check_mask(mask, parse_pattern("2:4"))
        own = dict(model.named_parameters())
        weight = own[name] if name in own else own[f"{name}.weight"]
        assert bool((weight[~mask] == 0).all())
    # the first projections, by hand: they read what the model is given
    gram = Gram(16)
    for x in inputs:
        gram.update(x.reshape(-1, 16))
    gram.finish()
    name = "0.layers.0.self_attn.in_proj_weight"
    weight = dense.get_parameter(name).detach()
    want = method("obs").prune(
        Layer(name, weight, {Gram: gram}), parse_pattern("2:4"), 0.5, value_type("float32"), 64
    )
    torch.testing.assert_close(model.get_parameter(name).detach(), want.weight)
    model.eval()
    with torch.no_grad():
        change = (model(inputs[0]) - dense(inputs[0])).abs().max()
    assert 0 < change < 1


class Threefold(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Odd(nn.Module):
    """A linear layer with a forward of its own, a recurrent cell, and a head that shares its embedding's
    weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.cell = nn.Embedding(12, 8), nn.GRUCell(8, 8)
        self.own, self.plain, self.head = Threefold(8, 8), nn.Linear(8, 8), nn.Linear(8, 12, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.plain(self.own(self.cell(self.embedding(ids)))))


def test_what_packing_or_pruning_would_break_is_left() -> None:
    ids = torch.arange(12)
    loose, packed = Odd(), Odd()
    table = loose.embedding.weight.detach().clone()
    found = gs.sparsify(loose, [ids], method="magnitude", sparsity=0.5)
    gs.sparsify(packed, [ids], method="magnitude", sparsity=0.5, pack=True)
    assert set(found.left) == {"cell", "head"}
    assert torch.equal(loose.embedding.weight, table)
    assert isinstance(packed.plain, StructuredLinear)
    assert isinstance(packed.own, Threefold)
    torch.testing.assert_close(packed(ids), loose(ids))


def test_fused_experts_and_routers_are_left() -> None:
    model, ids = tiny_model("qwen3_moe"), tiny_tokens()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = gs.sparsify(model, [ids], method="wanda", pattern="2:4", skip="lm_head")
    assert len(found.layers) == 3 * 4
    mixtures = [f"model.layers.{index}.mlp" for index in range(3)]
    assert found.left.keys() == {
        "lm_head",
        *(f"{m}.{part}" for m in mixtures for part in ("gate", "experts")),
    }
    assert "take_apart" in found.left[f"{mixtures[0]}.experts"]
    take_apart(model)
    found = gs.sparsify(model, method="magnitude", pattern="2:4", skip="lm_head")
    assert len(found.layers) == 3 * (4 + 4 * 2)
    assert set(found.left) == {"lm_head", *(f"{m}.gate" for m in mixtures)}
    gates = [f"{m}.gate.weight" for m in mixtures]
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in gates)
    # a gate is a router where there are experts
    layers = {"gate": nn.Linear(8, 8), "up": nn.Linear(8, 8)}
    assert not gs.sparsify(nn.ModuleDict(layers), method="magnitude", pattern="2:4").left
    mixture = nn.ModuleDict({**layers, "experts": nn.ModuleList([nn.Linear(8, 8)])})
    assert gs.sparsify(mixture, method="magnitude", pattern="2:4").left == {"gate": "it chooses experts"}


def test_a_skip_that_is_in_no_name_is_told() -> None:
    with pytest.raises(MethodError, match=r"skip is in no weight's name: 'haed' \(there are: "):
        gs.sparsify(Mixed(), batches(), method="magnitude", sparsity=0.5, skip=["left", "haed"])


@pytest.mark.parametrize("allocation", ["global", "er", "erk", "owl", "sensitivity"])
def test_every_allocation_shares_the_sparsity(allocation: str) -> None:
    pattern = "unstructured:model" if allocation == "global" else "unstructured:tensor"
    found = gs.sparsify(
        Mixed(),
        batches(),
        method="wanda",
        sparsity=0.6,
        pattern=pattern,
        allocation=allocation,
        loss=cross_entropy,
    )
    assert found.sparsity == pytest.approx(0.6, abs=0.02)
    assert len({round(layer["sparsity"], 2) for layer in found.layers}) > 1


def test_allocations_take_options() -> None:
    options = {"method": "wanda", "sparsity": 0.5, "pattern": "unstructured:tensor", "allocation": "owl"}
    found = gs.sparsify(Mixed(), batches(), **options, allocation_options={"outlier": 2.0, "spread": 0.2})  # type: ignore[arg-type]
    shares = [layer["sparsity"] for layer in found.layers]
    assert max(shares) - min(shares) == pytest.approx(0.4, abs=0.05)


def test_a_block_of_owl_ends_at_the_first_number() -> None:
    from gossamer.recipes.sparsify import _block

    assert _block("encoder.layer.3.attention.self.query") == "encoder.layer.3"
    assert _block("layer1.0.conv2") == "layer1.0"
    assert _block("0") == "0"
    assert _block("rnn.weight_ih_l0") == "rnn.weight_ih_l0"


def test_gradients_of_outputs_are_estimated_from_those_of_weights() -> None:
    """Where tokens are independent, as here, the two agree: of squared sums only the squares are left."""
    torch.manual_seed(2)
    net = nn.Linear(24, 12)
    data = [torch.randn(64, 24) * torch.rand(24) for _ in range(200)]
    signs = [torch.randn(64, 12) * torch.linspace(0.2, 3, 12) for _ in data]

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (model(batch["x"]) * batch["g"]).sum()

    views, _ = weight_views(net)
    given = [{"x": x, "g": g} for x, g in zip(data, signs, strict=True)]
    gradient = gather_gradients(net, views, given, loss)[views[0].name]
    gram = Gram(24)
    for x in data:
        gram.update(x)
    gram.finish()
    seen = torch.stack([g.square().sum(dim=0) for g in signs]).mean(dim=0)
    torch.testing.assert_close(gradient.squared_outputs(gram), seen, rtol=0.15, atol=0)


def test_sensitivity_prunes_what_the_loss_does_not_need() -> None:
    """A branch that hardly moves the loss gives up its weights before the other."""

    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.idle, self.busy = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return 0.01 * self.idle(x) + self.busy(x)

    net = Branches()
    x = [torch.randn(64, 8) for _ in range(8)]
    found = gs.sparsify(
        net,
        x,
        method="obs",
        sparsity=0.5,
        allocation="sensitivity",
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch), batch.argmax(dim=1)),
    )
    shares = {layer["name"]: layer["sparsity"] for layer in found.layers}
    assert shares["idle"] > 0.7 > 0.3 > shares["busy"]


def test_outliers_are_kept_apart() -> None:
    """What is packed computes what the unpacked model does, and inputs of outliers are not rounded."""
    model, packed, dense = Mixed(), Mixed(), Mixed()
    options = {"method": "magnitude", "sparsity": 0.0, "values": "int4", "outlier_share": 0.25}
    found = gs.sparsify(model, batches(), **options)
    gs.sparsify(packed, batches(), pack=True, **options)
    counts = {layer["name"]: layer["outliers"] for layer in found.layers}
    assert counts["left"] == 2
    assert counts["head"] == 4
    kept = (model.left.weight == dense.left.weight.bfloat16().float()).all(dim=0)
    assert int(kept.sum()) == 2
    x = batches()[0]
    with torch.no_grad():
        got, want = packed(x), model(x)
    assert float((got - want).norm() / want.norm()) < 5e-3
    with pytest.raises(MethodError, match="apart from integers"):
        gs.sparsify(Mixed(), batches(), method="magnitude", sparsity=0.5, outliers=6.0)


def test_what_allocations_and_outliers_need() -> None:
    with pytest.raises(CalibrationError, match="the allocation owl needs calibration batches"):
        gs.sparsify(Mixed(), method="magnitude", sparsity=0.5, allocation="owl")
    with pytest.raises(CalibrationError, match="the allocation sensitivity reads gradients"):
        gs.sparsify(Mixed(), batches(), method="magnitude", sparsity=0.5, allocation="sensitivity")
    with pytest.raises(CalibrationError, match="outliers apart needs calibration batches"):
        gs.sparsify(Mixed(), method="magnitude", sparsity=0.0, values="int8", outliers=1.0)


def norms(model: nn.Module, given: list[Any]) -> dict[str, InputNorm]:
    """What `gather_inputs` finds, run as far as `waves` says."""
    views, _ = weight_views(model)
    reached = waves(model, views, given)
    found: dict[str, InputNorm] = {}
    for wave in reached.order:
        for name, one in gather_inputs(model, wave, given, [InputNorm], reached.calls).items():
            statistic = one[InputNorm]
            assert isinstance(statistic, InputNorm)
            found[name] = statistic
    return found


class Twice(nn.Module):
    """One layer reads two tensors, another the first of them: ``order`` says who comes first."""

    def __init__(self, order: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.other, self.order = nn.Linear(4, 4), nn.Linear(4, 4), order

    def forward(self, x: Tensor) -> Tensor:
        one, two = (self.shared, self.other) if self.order == "shared" else (self.other, self.shared)
        h = one(x) + two(x)
        return self.shared(h * 10)


@pytest.mark.parametrize("order", ["shared", "other"])
def test_a_layer_that_is_called_twice_leaves_others_their_own_inputs(order: str) -> None:
    x = torch.randn(16, 4)
    model = Twice(order)
    views, _ = weight_views(model)
    found = gather_inputs(model, views, [x, x], [InputNorm], {})
    other, shared = found["other"][InputNorm], found["shared"][InputNorm]
    assert isinstance(other, InputNorm)
    torch.testing.assert_close(other.norm, torch.cat([x, x]).norm(dim=0))
    assert (other.tokens, shared.tokens) == (32, 64)


@pytest.mark.parametrize("names", ["ab", "ba"])
def test_layers_with_one_weight_are_pruned_on_what_all_of_them_read(names: str) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            for name in names:
                setattr(self, name, nn.Linear(6, 6))
            self.a.weight = self.b.weight
            self.unused, self.other = nn.Linear(6, 6), nn.Linear(6, 6)
            self.unused.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x) * torch.linspace(0.1, 9, 6)) + self.other(x)

    x, model = torch.randn(16, 6), Tied()
    between = model.a(x).detach() * torch.linspace(0.1, 9, 6)
    found = norms(model, [x, x])
    assert set(found) == {names[0], "other"}
    torch.testing.assert_close(found["other"].norm, torch.cat([x, x]).norm(dim=0))
    want = torch.cat([x, x, between, between]).norm(dim=0)
    torch.testing.assert_close(found[names[0]].norm, want)
    layer = Layer("", model.a.weight.detach().clone(), {InputNorm: found[names[0]]})
    told = gs.sparsify(model, [x, x], method="wanda", sparsity=0.5, skip="other")
    pruned = method("wanda").prune(layer, parse_pattern("unstructured:row"), 0.5, value_type("float32"), 64)
    torch.testing.assert_close(model.b.weight.detach(), pruned.weight)
    assert set(told.left) == {names[1], "unused", "other"}


def test_a_tensor_that_is_changed_in_place_is_read_anew() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            y = self.a(x)
            return self.b(x.mul_(10)) + y

    x = torch.randn(16, 4)
    model = InPlace()
    assert [[view.name for view in wave] for wave in waves(model, weight_views(model)[0], [x]).order] == [
        ["a"], ["b"],
    ]  # fmt: skip
    found = gather_inputs(model, weight_views(model)[0], [x], [InputNorm], {})
    torch.testing.assert_close(found["a"][InputNorm].norm, x.norm(dim=0))  # type: ignore[attr-defined]
    torch.testing.assert_close(found["b"][InputNorm].norm, 10 * x.norm(dim=0))  # type: ignore[attr-defined]


def test_batches_may_call_layers_as_often_as_they_like() -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = x[:, 0]
            for part in x.unbind(dim=1):
                h = self.step(part) + h
            return self.last(h)

    for lengths in ((2, 10), (10, 2), (1, 5), (3, 3)):
        found = norms(Steps(), [torch.randn(3, length, 4) for length in lengths])
        assert found["step"].tokens == 3 * sum(lengths)
        assert found["last"].tokens == 6


def test_a_layer_may_be_reached_by_some_batches_only() -> None:
    class Either(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
            self.both = nn.Linear(4, 4)

        def forward(self, x: Tensor, which: int) -> Tensor:
            return self.experts[which](x) + self.both(x)

    one, two = torch.randn(8, 4), torch.randn(5, 4)
    found = norms(Either(), [(one, 0), (two, 1)])
    torch.testing.assert_close(found["experts.0"].norm, one.norm(dim=0))
    torch.testing.assert_close(found["experts.1"].norm, two.norm(dim=0))
    torch.testing.assert_close(found["both"].norm, torch.cat([one, two]).norm(dim=0))
    gs.sparsify(Either(), [(one, 0), (two, 1)], sparsity=0.5)


def test_padding_does_not_count() -> None:
    from transformers import BertConfig, BertModel

    def bert() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
        return BertModel(BertConfig(vocab_size=64, **sizes)).eval()

    ids = torch.arange(12).reshape(2, 6)
    padded = torch.cat([ids, torch.zeros(2, 9, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(2, 6, dtype=torch.long), torch.zeros(2, 9, dtype=torch.long)], dim=1)
    name = "encoder.layer.0.intermediate.dense"

    def seen(batch: dict[str, Tensor]) -> Any:
        model = bert()
        views = [view for view in weight_views(model)[0] if view.name == name]
        return gather_inputs(model, views, [batch], [InputNorm], {})[name][InputNorm]

    plain, hidden = seen({"input_ids": ids}), seen({"input_ids": padded, "attention_mask": mask})
    assert hidden.tokens == plain.tokens == 12
    torch.testing.assert_close(hidden.norm, plain.norm, rtol=1e-4, atol=1e-4)


class Laid(nn.Module):
    """Modules that read tokens laid out as ``how`` says."""

    def __init__(self, how: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how = how
        first = how == "batch first"
        options = {"dim_feedforward": 4, "dropout": 0.0, "batch_first": first}
        self.linear = nn.Linear(4, 4)
        self.rnn = nn.LSTM(4, 4, bidirectional=True, batch_first=first)
        self.block = nn.TransformerEncoderLayer(4, 2, **options)  # type: ignore[arg-type]

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if self.how == "flat":
            return self.linear(x.flatten(0, 1))
        x = x if self.how == "batch first" else x.transpose(0, 1)
        hides = None if attention_mask is None else attention_mask == 0
        return self.linear(x) + self.rnn(x)[0][..., :4] + self.block(x, src_key_padding_mask=hides)


@pytest.mark.parametrize("windows", [3, 5])
@pytest.mark.parametrize("how", ["batch first", "sequence first", "flat"])
def test_padding_is_found_where_tokens_lie(how: str, windows: int) -> None:
    """5 tokens a window: of 5 windows only what is known to be so can be told to be sequence first."""
    x = torch.randn(windows, 5, 4)
    mask = torch.ones(windows, 5)
    mask[:, 3:] = 0
    x[:, 3:] = 9
    model = Laid(how).eval()
    known = ("linear",) if how == "flat" else ("linear", "rnn", "block")
    if how == "sequence first" and windows == 5:
        known = ("rnn", "block")
    views = [view for view in weight_views(model)[0] if view.name.startswith(known)]
    # the states of the backward direction have run over padding before
    views = [view for view in views if view.name != "rnn.weight_hh_l0_reverse"]
    plain = gather_inputs(model, views, [{"x": x[:, :3]}], [InputNorm], {})
    hidden = gather_inputs(model, views, [{"x": x, "attention_mask": mask}], [InputNorm], {})
    for name, one in plain.items():
        want, got = one[InputNorm], hidden[name][InputNorm]
        assert got.tokens == want.tokens == 3 * windows, name
        torch.testing.assert_close(got.norm, want.norm, msg=name)  # type: ignore[attr-defined]


def test_one_mapping_is_one_batch_and_lists_are_arguments() -> None:
    x = batches()[0]
    one, two, three = Mixed(), Mixed(), Mixed()
    gs.sparsify(one, [{"x": x}], sparsity=0.5)
    gs.sparsify(two, {"x": x}, sparsity=0.5)
    gs.sparsify(three, [[x]], sparsity=0.5)
    for other in (two, three):
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_neither_pattern_nor_sparsity() -> None:
    net = nn.Sequential(nn.Linear(64, 8))
    assert gs.sparsify(net, [torch.randn(64, 64)]).sparsity == 0.5


def test_weights_that_are_no_parameters_are_left() -> None:
    net = nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Linear(8, 8), nn.LazyLinear(8)
    )
    found = gs.sparsify(net, method="magnitude", sparsity=0.5)
    assert [layer["name"] for layer in found.layers] == ["1"]
    assert "computed from other parameters" in found.left["0"]
    assert "no shape yet" in found.left["2"]
    net[1].weight = nn.Parameter(torch.randn(1, 8).expand(8, 8))
    refused(ModelError, "expanded, many places over one number", net[:2], method="magnitude", sparsity=0.5)


def test_packing_keeps_modes_and_every_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.b, self.c = self.a, nn.Linear(64, 64)
            self.c.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.c(self.b(self.a(x)))

    net = Named()  # in training mode
    found = gs.sparsify(net, [torch.randn(9, 64)], pack=True)
    assert net.a is net.b
    assert isinstance(net.a, StructuredLinear)
    assert net.a.training
    assert "another layer's too" in found.left["c"]
    alone = nn.Linear(64, 64)
    refused(ModelError, "Sequential", alone, [torch.randn(9, 64)], pack=True)


def test_a_packed_encoder_of_pytorch_still_runs() -> None:
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    net = nn.Sequential(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(64, 64)).eval()
    gs.sparsify(net, [torch.randn(2, 5, 64)], pack=True)
    assert isinstance(net[1], StructuredLinear)
    with torch.no_grad():
        assert torch.isfinite(net(torch.randn(2, 5, 64))).all()


def test_more_that_is_refused() -> None:
    refused(CalibrationError, "one number", Mixed(), batches(), method="taylor", sparsity=0.5,
            loss=lambda model, x: model(x))  # fmt: skip
    tiny = nn.Sequential(nn.Linear(9, 16))
    refused(MethodError, "keep a weight", tiny, method="magnitude", sparsity=0.95, pattern="unstructured:row")
    labelled = [(x, torch.zeros(4)) for x in batches()]
    with pytest.raises(CalibrationError, match=r"the items of a tuple or list one by one.*labels") as told:
        gs.sparsify(nn.Sequential(nn.Linear(4, 4)), labelled, sparsity=0.5)
    assert isinstance(told.value.__cause__, TypeError)
    nested = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    batch = {"src": torch.randn(2, 5, 16), "src_key_padding_mask": torch.arange(5).repeat(2, 1) > 2}
    refused(CalibrationError, "enable_nested_tensor", nested, [batch])
