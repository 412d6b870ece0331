"""MaskLLM: learned masks beside the best ones there are, and that weights and patterns stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_models import RUN, Toy, masked

import gossamer as gs
from gossamer.errors import GossamerError, MethodError, PatternError
from gossamer.matrices.values import quantize, value_type
from gossamer.models import load_checkpoint
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.sparse import mask_from_scores, parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.tune import Loop, SparseTuning, train
from gossamer.tune.ways.maskllm import MaskLlmOptions, MaskLlmWeight
from tiny import tiny_folder, tiny_model, tiny_tokens

PATTERN = parse_pattern("2:4")


def learned(dense: torch.Tensor, loss: Any, steps: int = 300, **options: Any) -> MaskLlmWeight:
    mask = mask_from_scores(dense.abs(), PATTERN)
    weight = MaskLlmWeight(dense * mask, mask, None, MaskLlmOptions(keep=0.0, **options))
    weight.fill(dense)
    optimizer = torch.optim.Adam(weight.parameters(), lr=2e-3)
    for step in range(steps):
        loss(weight()).backward()
        optimizer.step()
        optimizer.zero_grad()
        weight.after_step((step + 1) / steps)
    return weight


@pytest.mark.parametrize("prior", [0.0, 3.0])
def test_it_finds_the_best_masks_that_there_are(prior: float) -> None:
    toy = Toy()
    weight = learned(toy.dense, toy.lost, prior=prior)
    with torch.no_grad():
        found = toy.lost(weight())
    assert toy.best < 0.9 * toy.start
    assert found < toy.best + 0.1 * (toy.start - toy.best)


def test_weights_stand_still_and_masks_are_exact_without_gradients() -> None:
    torch.manual_seed(0)
    dense = torch.randn(8, 24)
    want = torch.randn(8, 24)
    weight = learned(dense, lambda w: (w - want).square().sum(), steps=20)
    assert {name for name, _ in weight.named_parameters()} == {"logits"}
    with torch.no_grad():
        seen = weight()
    check_mask(seen != 0, PATTERN)
    assert torch.equal(seen, dense * weight.likeliest())
    plain, codes = weight.finished()
    assert codes is None
    assert torch.equal(plain, seen)
    assert torch.equal(weight.final_mask(), seen != 0)


def test_a_strong_prior_is_the_mask_at_first() -> None:
    torch.manual_seed(0)
    dense = torch.randn(32, 64)
    for pattern in ("2:4", "4:8", "1:4"):
        mask = mask_from_scores(torch.rand(32, 64), parse_pattern(pattern))
        weight = MaskLlmWeight(dense * mask, mask, None, MaskLlmOptions(pattern, prior=50.0))
        assert torch.equal(weight.likeliest(), mask)
        with torch.no_grad():
            assert torch.equal(weight(), dense * mask)
    weight = MaskLlmWeight(dense * mask, mask, None, MaskLlmOptions("1:4", prior=0.0))
    assert (weight.likeliest() & mask).sum() < 0.4 * mask.sum()


def test_gradients_are_those_of_the_expected_mask() -> None:
    torch.manual_seed(0)
    dense, want = torch.randn(4, 8), torch.randn(4, 8)
    mask = mask_from_scores(dense.abs(), PATTERN)
    options = MaskLlmOptions(keep=0.25)
    weights = [MaskLlmWeight(dense, mask, None, options) for _ in range(2)]
    weights[1].defers = True
    for weight in weights:
        (weight() * want).sum().backward()
        weight.settle()
    logits = weights[0].logits.detach().clone().requires_grad_()
    shares = ((100 * logits + weights[0]._gumbel()) / 4).softmax(-1)
    product = dense * (shares @ weights[0].masks).reshape(dense.shape)
    ((product * want).sum() - 0.25 * product.square().sum()).backward()
    for weight in weights:
        assert torch.allclose(weight.logits.grad, logits.grad, rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_noise_is_let_go_when_gradients_have_settled() -> None:
    dense = torch.randn(8, 32)
    weight = MaskLlmWeight(dense, mask_from_scores(dense.abs(), PATTERN), None, MaskLlmOptions())
    for defers in (True, False):
        weight.defers = defers
        weight().sum().backward()
        assert weight._noise is not None
        if defers:
            weight.settle()
        else:
            weight.after_step(0.5)
        assert weight._noise is None


def test_noise_is_anew_each_step_and_cools_down() -> None:
    torch.manual_seed(0)
    dense = torch.randn(8, 32)
    mask = mask_from_scores(dense.abs(), PATTERN)
    weight = MaskLlmWeight(dense, mask, None, MaskLlmOptions(prior=3.0))
    first, again = weight(), weight()
    assert torch.equal(first, again)
    weight.after_step(0.0)
    assert not torch.equal(weight(), first)
    weight.after_step(1.0)
    soft = weight().detach() / dense
    assert ((soft < 1e-3) | (soft > 1 - 1e-3)).float().mean() > 0.9


def test_a_run_that_was_killed_goes_on_to_the_same_bits() -> None:
    def tuning() -> SparseTuning:
        model, masks = masked()
        teacher = tiny_model(num_hidden_layers=2)
        return SparseTuning(
            model, teacher=teacher, losses={"kl": 1}, masks=masks, method="maskllm", rate=0.01, norms=False
        )

    def steps(one: SparseTuning, begin: int, end: int) -> None:
        for step in range(begin, end):
            one.loss(tiny_tokens(4, 16, seed=step)).backward()
            one.step((step + 0.5) / 6)

    whole, other = tuning(), tuning()
    steps(whole, 0, 3)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    steps(whole, 3, 6)
    other.load_state_dict(state)
    steps(other, 3, 6)
    assert all(torch.equal(tensor, whole.values()[name]) for name, tensor in other.values().items())


def test_a_model_learns_its_masks() -> None:
    teacher = tiny_model(num_hidden_layers=2)
    model, masks = masked()
    tuning = SparseTuning(
        model, teacher=teacher, losses={"kl": 1}, masks=masks, method="maskllm", rate=3e-3, norms=False
    )
    windows = tiny_tokens(16, 32)
    done = train(tuning, windows[:12], windows[12:], Loop(tokens=60 * 4 * 32, batch=4, patience=99))
    assert done.after["kl"] < 0.97 * done.before["kl"]
    moved = 0
    for name, matrix in tuning.merge().items():
        weight = matrix.to_dense()
        check_mask(weight != 0, PATTERN)
        dense = teacher.get_parameter(name).detach()
        assert torch.equal(weight, dense * (weight != 0))
        moved += int((masks[name.removesuffix(".weight")] != (weight != 0)).sum())
    assert moved


def test_a_checkpoint_learns_its_masks(tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense", num_hidden_layers=1)
    compress(dense, tmp_path / "made", method="magnitude", pattern="2:4", values="bf16", windows=1, seqlen=32)
    done = gs.finetune(
        tmp_path / "made", tmp_path / "out", teacher=dense, method="maskllm", **(RUN | {"tokens": 8 * 64})
    )
    assert done.outcome.after["total"] <= done.outcome.held_out[0][1]
    assert done.worse == (done.outcome.after["total"] > done.outcome.before["total"])
    for module in load_checkpoint(done.path).modules():
        if isinstance(module, StructuredLinear) and module.matrix.shape[0] < 300:
            check_mask(module.matrix.mask(), PATTERN)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"pattern": "unstructured"}, MethodError),
        ({"pattern": "32:64"}, MethodError),
        ({"pattern": "3:2"}, PatternError),
        ({"cold": 0.0}, MethodError),
        ({"prior": -1.0}, MethodError),
        ({"every": 1}, MethodError),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], error: type[GossamerError]) -> None:
    model, masks = masked()
    with pytest.raises(error):
        SparseTuning(model, losses={"task": 1}, masks=masks, method="maskllm", options=options)


def test_a_teacher_that_only_its_weights_were_asked_of_is_let_go() -> None:
    model, masks = masked()
    teacher, _ = masked()
    for losses in ({"task": 1.0}, {"task": 1.0, "kl": 1.0}):
        tuning = SparseTuning(model, teacher=teacher, losses=losses, masks=masks, method="maskllm")
        assert (tuning.teacher is None) == ("kl" not in losses)
        assert tuning.loss(torch.arange(8)[None]).isfinite()
        tuning.merge()
        model, masks = masked()


def test_weights_that_do_not_suit_are_refused() -> None:
    dense = torch.randn(4, 8)
    mask = mask_from_scores(dense.abs(), PATTERN)
    with pytest.raises(MethodError, match="has none"):
        MaskLlmWeight(dense, None)
    few = mask_from_scores(dense.abs(), parse_pattern("1:4"))
    with pytest.raises(MethodError, match="keeps 8 weights, but 2:4 keeps 16"):
        MaskLlmWeight(dense * few, few)
    with pytest.raises(MethodError, match="quantize what it gives"):
        MaskLlmWeight(dense, mask, quantize(dense * mask, value_type("int4"), 32, mask))
    with pytest.raises(GossamerError):
        MaskLlmWeight(dense, torch.ones(4, 8, dtype=torch.bool))
    with pytest.raises(MethodError, match="no whole groups"):
        MaskLlmWeight(torch.randn(4, 6), mask_from_scores(torch.rand(4, 6), PATTERN))
