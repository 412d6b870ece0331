"""Scales alone: integers and masks stand still, gradients are those of the product, and checkpoints too."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tuned_models import RUN, masked

import gossamer as gs
from gossamer.errors import MethodError
from gossamer.matrices import Packed
from gossamer.matrices.values import quantize, value_type
from gossamer.models import load_checkpoint
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.tune import SparseTuning
from gossamer.tune.ways.scales import ScalesWeight
from tiny import tiny_folder, tiny_tokens


@pytest.mark.parametrize("values", ["int4", "nl3"])
@pytest.mark.parametrize("defers", [False, True])
def test_gradients_are_those_of_the_product(values: str, defers: bool) -> None:
    torch.manual_seed(0)
    dense, mask, want = torch.randn(6, 80), torch.rand(6, 80) < 0.5, torch.randn(6, 80)
    start = quantize(dense * mask, value_type(values), 32, mask)
    weight = ScalesWeight(start.to_dense(), mask, start)
    weight.defers = defers
    assert torch.equal(weight(), start.to_dense())
    ((weight() - want) ** 2).sum().backward()
    weight.settle()
    scales = start.scales.float().requires_grad_()
    ((scales.repeat_interleave(32, 1)[:, :80] * start.q - want) ** 2).sum().backward()
    assert weight.factors.grad is not None
    assert torch.allclose(weight.factors.grad, scales.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_codes_stand_still_and_scales_reach_their_least_squares() -> None:
    torch.manual_seed(0)
    dense, mask, want = torch.randn(6, 64), torch.rand(6, 64) < 0.5, torch.randn(6, 64)
    start = quantize(dense * mask, value_type("int4"), 64, mask)
    weight = ScalesWeight(start.to_dense(), mask, start)
    assert [name for name, _ in weight.named_parameters()] == ["factors"]
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.01)
    for _ in range(300):
        optimizer.zero_grad()
        ((weight() - want) ** 2).sum().backward()
        optimizer.step()
    plain, codes = weight.finished()
    assert codes is not None
    assert torch.equal(codes.q, start.q)
    assert torch.equal(plain, weight().detach())
    assert not plain[~mask].any()
    q = start.q.float()
    best = (q * want).sum(1) / q.square().sum(1)
    assert torch.allclose(codes.scales[:, 0].float(), best, atol=2e-3)


@pytest.mark.parametrize("values", ["int4", "nl3"])
def test_masks_and_integers_hold_at_every_step(values: str) -> None:
    model, masks = masked()
    tuning = SparseTuning(
        model, losses={"task": 1}, masks=masks, method="scales", values=values, rate=0.05, weight_decay=0.1
    )
    codes = {name: weight.finished()[1] for name, weight in tuning.weights.items()}
    before = tuning.values()["model.layers.0.mlp.up_proj.factors"].clone()
    for step in range(4):
        tuning.loss(tiny_tokens(2, 16, seed=step)).backward()
        tuning.step((step + 0.5) / 4)
        for name, weight in tuning.weights.items():
            mask, now = masks[name], weight.finished()[1]
            assert mask is not None
            assert now is not None
            assert not weight()[~mask].any()
            assert torch.equal(now.q, codes[name].q)  # type: ignore[union-attr]
            assert torch.equal(now.to_dense(), weight().detach())
    assert not torch.equal(before, tuning.values()["model.layers.0.mlp.up_proj.factors"])
    for name, matrix in tuning.merge().items():
        if name.removesuffix(".weight") in masks:
            assert isinstance(matrix, Packed)
            assert torch.equal(matrix.mask(), masks[name.removesuffix(".weight")])  # type: ignore[arg-type]


def test_floats_have_no_scales() -> None:
    with pytest.raises(MethodError, match="these are floats"):
        ScalesWeight(torch.randn(4, 8), None)


def test_a_checkpoint_keeps_its_integers(tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense", num_hidden_layers=1)
    made = tmp_path / "made"
    compress(dense, made, method="magnitude", pattern="2:4", values="int3", windows=1, seqlen=32)
    done = gs.finetune(made, tmp_path / "out", teacher=dense, losses={"kl": 1}, method="scales", **RUN)
    assert done.outcome.after["kl"] < done.outcome.before["kl"]
    changed = 0
    for old, new in zip(load_checkpoint(made).modules(), load_checkpoint(done.path).modules(), strict=True):
        if isinstance(old, StructuredLinear) and old.matrix.describe().get("values") == "int3":
            before, after = old.matrix.quantized(), new.matrix.quantized()
            assert torch.equal(before.q, after.q)
            changed += int((before.scales != after.scales).sum())
    assert changed
