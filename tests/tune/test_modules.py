"""Any PyTorch model under tuning: beside a plain loop, masks and grids at every step, bad input refused."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import CalibrationError, MethodError, ModelError
from gossamer.nn.views import weight_views
from gossamer.sparse import parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.tune.modules import ModuleTuning


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(4, 8, 3, padding=1)
        self.rnn = nn.LSTM(8, 8, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x.transpose(1, 2)).transpose(1, 2).relu()
        return self.head(self.norm(self.rnn(h)[0]))  # type: ignore[no-any-return]


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 6, 4, generator=generator)
    return x, x[..., 0].gt(0).long() + 2 * x[..., 1].gt(0).long()


def loss(model: object, seed: int) -> Tensor:
    x, y = batch(seed)
    logits = model(x)  # type: ignore[operator]
    return nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten())


def pruned() -> tuple[Small, dict[str, Tensor]]:
    model = Small()
    found = gs.sparsify(model, [batch(99)[0]], pattern="2:4", method="wanda", skip="head")
    return model, found.masks


def test_float_weights_train_as_in_a_plain_loop() -> None:
    model, masks = pruned()
    plain = copy.deepcopy(model)
    tuning = ModuleTuning(model, masks)
    groups = []
    for view in weight_views(plain)[0]:
        if view.name in masks:
            mask = masks[view.name]
            size = view.matrix()[mask].abs().mean()
            groups.append({"params": [view.weight], "lr": 0.01 * float(size)})
    taken = {id(p) for group in groups for p in group["params"]}
    for other in plain.parameters():
        if id(other) not in taken:
            size = float(other.detach().abs().mean()) or 1.0
            groups.append({"params": [other], "lr": 0.001 * size})
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(4):
        loss(tuning, step).backward()
        tuning.step(0.05)  # behind the warm-up: the whole rate
        loss(plain, step).backward()
        for view in weight_views(plain)[0]:
            if view.name in masks:
                assert view.weight.grad is not None
                view.weight.grad.mul_(masks[view.name].reshape(view.weight.shape))
        nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    tuning.merge()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("values", [None, "int8", "int4", "nl3"])
def test_masks_and_grids_hold_and_what_is_merged_computes_the_same(values: str | None) -> None:
    model, masks = pruned()
    tuning = ModuleTuning(model, masks, values=values, group=32)
    first = float(loss(tuning, 0).detach())
    for step in range(30):
        loss(tuning, step).backward()
        tuning.step(step / 30)
        for name, mask in masks.items():
            weight = tuning.weights[name]()
            assert not weight[~mask].any()
            assert weight[mask].any()
    assert float(loss(tuning, 0).detach()) < first
    with torch.no_grad():
        want = tuning(batch(1)[0])
        tuning.merge()
        torch.testing.assert_close(model(batch(1)[0]), want)
    if values is not None:
        codes = {"int8": 256, "int4": 16, "nl3": 8}[values]
        for view in weight_views(model)[0]:
            if view.name in masks:
                assert all(len(row.unique()) <= codes * -(-len(row) // 32) for row in view.matrix())


def test_a_weight_may_be_tuned_without_a_mask() -> None:
    model = Small()
    tuning = ModuleTuning(model, {"head": None}, values="int4")
    loss(tuning, 0).backward()
    tuning.step(0.5)
    tuning.merge()
    assert all(len(row.unique()) <= 16 for row in model.head.weight)


def test_other_parameters_move_in_bfloat16_too() -> None:
    model = Small().bfloat16()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tuning = ModuleTuning(model, {"head": None})
    for step in range(60):
        x, y = batch(step)
        x = x.bfloat16() if x.is_floating_point() else x
        nn.functional.cross_entropy(tuning(x).float().flatten(0, 1), y.flatten()).backward()
        tuning.step(0.05)
    tuning.merge()
    norms = [name for name, p in before.items() if p.dim() == 1 and p.eq(1).all()]
    assert norms
    for name in norms:
        assert (model.get_parameter(name) != before[name]).float().mean() > 0.5, name
        assert model.get_parameter(name).dtype == torch.bfloat16


class Normed(Small):
    """With a norm that keeps running means while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        h = self.rnn(self.conv(x.transpose(1, 2)).transpose(1, 2).relu())[0]
        return self.head(self.norm(h.transpose(1, 2)).transpose(1, 2))  # type: ignore[no-any-return]


@pytest.mark.parametrize("values", [None, "int4"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(values: str | None, tmp_path: Path) -> None:
    def begun() -> ModuleTuning:
        model = Normed().train()
        masks = gs.sparsify(model, method="magnitude", pattern="2:4", skip="head").masks
        return ModuleTuning(model, {**masks, "head": None}, values=values, group=32)

    def steps(tuning: ModuleTuning, begin: int, end: int) -> None:
        for step in range(begin, end):
            loss(tuning, step).backward()
            tuning.step((step + 0.5) / 8)

    whole, stopped = begun(), begun()
    steps(whole, 0, 8)
    steps(stopped, 0, 5)
    torch.save([stopped.state_dict(), stopped.optimizer.state_dict()], tmp_path / "state")
    again, first = begun(), begun()
    state, moments = torch.load(tmp_path / "state", weights_only=True)
    again.load_state_dict(state)
    again.optimizer.load_state_dict(moments)
    steps(again, 5, 8)
    for tuning in (whole, again, first):
        tuning.merge()
    found, start = again.model.state_dict(), first.model.state_dict()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(found[name], tensor), name
        assert not torch.equal(start[name], tensor), name


def test_the_state_of_another_tuning_is_refused() -> None:
    model, masks = pruned()
    state = ModuleTuning(model, masks).state_dict()
    name = next(iter(masks))
    for another in ({**masks, name: None}, {**masks, "head": None}, {**masks, name: ~masks[name]}):
        other = ModuleTuning(Small(), another)
        before = {one: tensor.clone() for one, tensor in other.state_dict().items()}
        with pytest.raises(CalibrationError, match="the state of another tuning"):
            other.load_state_dict(state)
        assert all(torch.equal(tensor, before[one]) for one, tensor in other.state_dict().items())
    wide = [
        ModuleTuning(nn.Sequential(nn.Linear(64, 2)), {"0": None}, values="int4", group=g) for g in (64, 32)
    ]
    with pytest.raises(CalibrationError, match="names or shapes differ"):
        wide[0].load_state_dict(wide[1].state_dict())


def test_masks_that_do_not_belong_are_refused() -> None:
    with pytest.raises(ModelError, match="no weight 'nothing'"):
        ModuleTuning(Small(), {"nothing": None})
    with pytest.raises(ModelError, match=r"a mask \(2, 2\) for a weight \(5, 8\)"):
        ModuleTuning(Small(), {"head": torch.ones(2, 2, dtype=torch.bool)})
    with pytest.raises(MethodError, match=r"in \[0, 1\), got 1"):
        ModuleTuning(Small(), {"head": None}, warmup=1)


def test_masks_of_any_module_may_be_searched_and_moved() -> None:
    dense = Small()
    for method, options in (
        ("ast", {"every": 1}),
        ("maskllm", {}),
        ("jackpot", {"every": 1, "rate": 0.05, "pattern": "2:4"}),
        ("lora", {"rank": 2}),
    ):
        model, masks = pruned()
        tuning = ModuleTuning(model, masks, method=method, options=options, dense=dense, share=0.05)
        first = float(loss(tuning, 0).detach())
        for step in range(24):
            loss(tuning, step).backward()
            tuning.step((step + 0.5) / 24)
        ended = tuning.masks()
        tuning.merge()
        moved = 0
        for view in weight_views(model)[0]:
            if view.name not in masks:
                continue
            mask, weight = ended[view.name], view.matrix()
            assert mask is not None
            check_mask(mask, parse_pattern("2:4"))
            assert not weight[~mask].any()
            moved += not torch.equal(mask, masks[view.name])
            if method in ("maskllm", "jackpot"):
                before = next(v for v in weight_views(dense)[0] if v.name == view.name).matrix()
                assert torch.equal(weight[mask], before[mask])
        assert bool(moved) == (method != "lora"), method
        assert float(loss(model, 0).detach()) < first, method


def test_a_search_among_dense_weights_needs_them() -> None:
    model, masks = pruned()
    with pytest.raises(MethodError, match="give the dense model"):
        ModuleTuning(model, masks, method="maskllm")
    with pytest.raises(MethodError, match=r"the dense model has no conv"):
        ModuleTuning(model, masks, method="maskllm", dense=nn.Linear(3, 3))
    with pytest.raises(MethodError, match="there is no 'depth'"):
        ModuleTuning(model, masks, method="lora", options={"depth": 1})


def test_other_parameters_stay_where_only_weights_are_searched() -> None:
    model, masks = pruned()
    before = {name: p.detach().clone() for name, p in model.named_parameters() if "weight_" not in name}
    tuning = ModuleTuning(model, masks, method="maskllm", dense=Small(), others=False)
    loss(tuning, 0).backward()
    tuning.step(0.5)
    tuning.merge()
    assert torch.equal(model.norm.weight, before["norm.weight"])
    assert torch.equal(model.head.weight, before["head.weight"])
