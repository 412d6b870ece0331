"""Lottery jackpots: swaps that keep their patterns, masks found by search, and weights that stand still."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tuned_models import RUN, TEXT, Toy, masked

import gossamer as gs
from gossamer.errors import MethodError
from gossamer.matrices.values import quantize, value_type
from gossamer.models import load_checkpoint
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.sparse import mask_from_scores, parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.tune import SparseTuning
from gossamer.tune.formats import pattern_of
from gossamer.tune.ways.jackpot import JackpotOptions, JackpotWeight, swapped
from tiny import tiny_folder, tiny_model, tiny_tokens


@given(
    seed=st.integers(0, 10_000),
    pattern=st.sampled_from(["2:4", "4:8", "3:5", "unstructured"]),
    share=st.floats(0, 1),
)
@settings(max_examples=30, deadline=None)
def test_swaps_keep_the_pattern_and_the_best_go_first(seed: int, pattern: str, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    old, new = torch.rand(6, 24, generator=generator), torch.rand(6, 24, generator=generator)
    kind = parse_pattern(pattern)
    sparsity = 0.5 if pattern == "unstructured" else None
    mask, wanted = mask_from_scores(old, kind, sparsity), mask_from_scores(new, kind, sparsity)
    group = getattr(kind, "m", 0)
    found = swapped(mask, wanted, new, group, share)
    check_mask(found, kind)
    assert int(found.sum()) == int(mask.sum())
    moved = found != mask
    assert not (moved & (mask == wanted)).any()
    pairs = int((wanted & ~mask).sum())
    assert int(moved.sum()) == 2 * -(-int(pairs * share * 2**40) // 2**40) or 0 < share < 1
    assert share < 1 or torch.equal(found, wanted)
    gained = (new * found).sum() - (new * mask).sum()
    assert gained >= share * ((new * wanted).sum() - (new * mask).sum()) - 1e-4


def searched(dense: torch.Tensor, pattern: str, loss: Any, steps: int = 200) -> JackpotWeight:
    kind = parse_pattern(pattern)
    mask = mask_from_scores(dense.abs(), kind, 0.5 if pattern == "unstructured" else None)
    weight = JackpotWeight(dense * mask, mask, None, JackpotOptions(pattern, every=1))
    weight.fill(dense)
    for step in range(steps):
        loss(weight()).backward()
        weight.after_step((step + 1) / steps)
    return weight


def test_it_comes_near_the_best_masks_that_there_are() -> None:
    toy = Toy()
    weight = searched(toy.dense, "2:4", toy.lost)
    with torch.no_grad():
        found = toy.lost(weight())
    assert toy.best < 0.9 * toy.start
    assert found < toy.best + 0.3 * (toy.start - toy.best)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_weights_stand_still_and_masks_are_exact(pattern: str) -> None:
    torch.manual_seed(0)
    dense, want = torch.randn(8, 24), torch.randn(8, 24)
    weight = searched(dense, pattern, lambda w: (w - want).square().sum(), steps=20)
    assert not list(weight.parameters())
    assert int(weight.kept.sum()) == 8 * 12
    assert not torch.equal(weight.kept, mask_from_scores(dense.abs(), parse_pattern("2:4")))
    plain, codes = weight.finished()
    assert codes is None
    assert torch.equal(plain, dense * weight.kept)
    assert torch.equal(weight().detach(), plain)
    if pattern == "2:4":
        check_mask(weight.kept, parse_pattern(pattern))


def test_the_gradient_is_that_of_the_mask() -> None:
    torch.manual_seed(0)
    dense, want = torch.randn(4, 8), torch.randn(4, 8)
    mask = mask_from_scores(dense.abs(), parse_pattern("2:4"))
    for defers in (False, True):
        weight = JackpotWeight(dense * mask, mask, None, JackpotOptions("2:4"))
        weight.fill(dense)
        weight.defers = defers
        ((weight() - want) ** 2).sum().backward()
        weight.settle()
        assert weight.importance.grad is not None
        assert torch.allclose(weight.importance.grad, 2 * (dense * mask - want) * dense, atol=1e-5)


def test_changes_become_fewer_and_end() -> None:
    torch.manual_seed(0)
    dense = torch.randn(16, 64)
    mask = mask_from_scores(dense.abs(), parse_pattern("2:4"))
    moved = []
    for fraction in (0.0, 0.5, 1.0):
        weight = JackpotWeight(dense * mask, mask, None, JackpotOptions("2:4", every=1))
        with torch.no_grad():
            weight.importance.copy_(torch.rand(16, 64))
        weight.after_step(fraction)
        moved.append(int((weight.kept != mask).sum()))
    assert moved[0] > 10 * moved[1] > 0
    assert moved[2] == 0


def test_a_run_that_was_killed_goes_on_to_the_same_bits() -> None:
    def tuning() -> SparseTuning:
        model, masks = masked()
        options = {"pattern": "2:4", "every": 2}
        return SparseTuning(
            model, teacher=masked()[0], losses={"task": 1}, masks=masks, method="jackpot", options=options,
            norms=False,
        )  # fmt: skip

    def steps(one: SparseTuning, begin: int, end: int) -> None:
        for step in range(begin, end):
            one.loss(tiny_tokens(4, 16, seed=step)).backward()
            one.step((step + 0.5) / 8)

    whole, other, first = tuning(), tuning(), tuning()
    steps(whole, 0, 3)
    state = {name: tensor.clone() for name, tensor in whole.state_dict().items()}
    steps(whole, 3, 8)
    other.load_state_dict(state)
    steps(other, 3, 8)
    assert all(torch.equal(tensor, whole.values()[name]) for name, tensor in other.values().items())
    assert any(not torch.equal(w.kept, first.weights[n].kept) for n, w in whole.weights.items())  # type: ignore[arg-type]


def test_what_it_cannot_search_is_refused() -> None:
    torch.manual_seed(0)
    dense = torch.randn(8, 16)
    mask = mask_from_scores(dense.abs(), parse_pattern("1:4"))
    with pytest.raises(MethodError, match="keeps 32 weights, but 2:4 keeps 64"):
        JackpotWeight(dense * mask, mask, None, JackpotOptions("2:4"))
    with pytest.raises(MethodError, match="has none"):
        JackpotWeight(dense, None)
    with pytest.raises(MethodError, match="quantize what it gives"):
        JackpotWeight(dense, mask, quantize(dense, value_type("int4"), 32, mask))
    for options in ({"pattern": "16x4"}, {"every": 0}, {"power": -1}):
        model, masks = masked()
        with pytest.raises(MethodError):
            SparseTuning(model, losses={"task": 1}, masks=masks, method="jackpot", options=options)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("pattern", ["2:4", "16:32"])
def test_a_search_stays_within_the_pattern_of_the_masks(pattern: str, packed: bool) -> None:
    model, teacher = tiny_model(num_hidden_layers=1), tiny_model(num_hidden_layers=1)
    made = gs.sparsify(model, method="magnitude", pattern=pattern, skip="lm_head", pack=packed)
    given = None if packed else made.masks
    tuning = SparseTuning(
        model, teacher=teacher, losses={"task": 1}, masks=given, method="jackpot", options={"every": 1}
    )
    for step in range(3):
        tuning.loss(tiny_tokens(2, 16, seed=step)).backward()
        tuning.step(step / 3)
    assert {str(weight.options.pattern) for weight in tuning.weights.values()} == {pattern}
    found = {name: weight.final_mask() for name, weight in tuning.weights.items()}
    for mask in found.values():
        check_mask(mask, parse_pattern(pattern))  # type: ignore[arg-type]
    assert any(not torch.equal(mask, made.masks[name]) for name, mask in found.items())  # type: ignore[arg-type]


@pytest.mark.parametrize("pattern", ["16x4", "32x32", "channel:out", "channel:in"])
def test_a_search_does_not_leave_other_patterns(pattern: str) -> None:
    model = tiny_model(num_hidden_layers=1)
    made = gs.sparsify(model, method="magnitude", pattern=pattern, sparsity=0.25, skip="lm_head")
    with pytest.raises(MethodError, match=r"masks of N:M or unstructured, not (16x4|channel)"):
        SparseTuning(model, teacher=model, losses={"task": 1}, masks=made.masks, method="jackpot")


@pytest.mark.parametrize("shape", [(8, 64), (8, 70), (3, 96)])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:5", "32:64", "unstructured"])
def test_the_pattern_of_a_mask_is_told(pattern: str, shape: tuple[int, int]) -> None:
    scores = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    sparsity = 0.4 if pattern == "unstructured" else None
    found = pattern_of(
        mask_from_scores(scores, parse_pattern("unstructured:tensor" if sparsity else pattern), sparsity)
    )
    assert found == (None if sparsity else parse_pattern(pattern))
    assert pattern_of(torch.ones(shape, dtype=torch.bool)) is None


def test_a_search_without_the_dense_weights_is_refused() -> None:
    model, masks = masked()
    layers = dict(model.named_modules())
    with pytest.raises(MethodError, match="give the dense model as the teacher"):
        SparseTuning(model, losses={"task": 1}, masks=masks, method="jackpot")
    last = list(masks)[-1]
    with pytest.raises(MethodError, match=last):
        SparseTuning(model, losses={"task": 1}, masks={**masks, last: None}, method="jackpot")
    assert dict(model.named_modules()) == layers  # as it was
    SparseTuning(model, losses={"task": 1}, masks=masks)
    model, masks = masked()
    shorter = tiny_model(num_hidden_layers=1)
    with pytest.raises(MethodError, match="the model has 2 blocks, its teacher 1"):
        SparseTuning(model, teacher=shorter, losses={"task": 1}, masks=masks, method="jackpot")


def test_what_a_search_makes_is_told_as_it_is(tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense", dtype="float32", num_hidden_layers=1)
    options: dict[str, Any] = {"values": "float32", "windows": 2, "seqlen": 32, "calibration": [TEXT]}
    made = compress(dense, tmp_path / "made", method="obs", pattern="2:4", **options).path
    before = gs.finetune(  # a run that leaves all as it is, to see the checkpoint's own loss
        made, tmp_path / "same", teacher=dense, **(RUN | {"tokens": 64, "rate": 1e-12}), norms=False
    ).outcome.before
    search = RUN | {"method": "jackpot", "options": {"pattern": "unstructured", "every": 1}, "norms": False}
    done = gs.finetune(made, tmp_path / "out", teacher=dense, bfloat16=True, **search)
    assert done.outcome.before["total"] == pytest.approx(before["total"], rel=1e-2)  # in bfloat16 here
    assert done.made["pattern"] == "unstructured"
    assert done.made["sparsity"] == pytest.approx(0.5)
    plain = dict(gs.load(dense, dtype="float32").model.named_parameters())
    for name, module in load_checkpoint(done.path, dtype=torch.float32).named_modules():
        if isinstance(module, StructuredLinear) and "layers" in name:
            mask, weight = module.matrix.mask(), plain[f"{name}.weight"]
            assert not torch.equal(weight, weight.bfloat16().float())  # bits that bfloat16 would lose
            assert torch.equal(module.matrix.to_dense(), weight * mask)


@pytest.mark.parametrize("loss", ["kl", "task"])
def test_a_checkpoint_is_searched_from_the_dense_weights(loss: str, tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense", num_hidden_layers=1)
    options: dict[str, Any] = {"values": "bf16", "windows": 1, "seqlen": 32}
    compress(dense, tmp_path / "made", method="magnitude", pattern="2:4", **options)
    done = gs.finetune(  # by the pattern of the checkpoint, from the dense weights whatever the loss
        tmp_path / "made", tmp_path / "out", teacher=dense, losses={loss: 1}, method="jackpot",
        options={"every": 1}, norms=False, **RUN,
    )  # fmt: skip
    found = load_checkpoint(done.path)
    plain = dict(gs.load(dense, dtype="bfloat16").model.named_parameters())
    moved = 0
    for (name, new), old in zip(
        found.named_modules(), load_checkpoint(tmp_path / "made").modules(), strict=True
    ):
        if isinstance(new, StructuredLinear) and "layers" in name:
            mask = new.matrix.mask()
            check_mask(mask, parse_pattern("2:4"))
            assert torch.equal(new.matrix.to_dense().float(), plain[f"{name}.weight"].float() * mask)
            moved += int((mask != old.matrix.mask()).sum())
    assert moved
