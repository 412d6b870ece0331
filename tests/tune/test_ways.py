"""Low-rank deltas under masks, masks that move, and Hugging Face's Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_models import RUN, masked

import gossamer as gs
from gossamer.errors import GossamerError, MethodError, PatternError
from gossamer.matrices.values import quantize, value_type
from gossamer.models import load_checkpoint
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.sparse import mask_from_scores, parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.tune import Loop, SparseTuning, train
from gossamer.tune.ways.ast import AstOptions, AstWeight
from gossamer.tune.ways.lora import LoraOptions, LoraWeight
from tiny import tiny_folder, tiny_model, tiny_tokens


@pytest.mark.parametrize("bits", [None, 4])
def test_a_merged_delta_keeps_every_zero_and_moves_the_rest(bits: int | None) -> None:
    torch.manual_seed(0)
    dense, mask = torch.randn(24, 96), torch.rand(24, 96) < 0.4
    start = None if bits is None else quantize(dense * mask, value_type(f"int{bits}"), 32, mask)
    first = dense * mask if start is None else start.to_dense()
    weight = LoraWeight(first, mask, start, LoraOptions(rank=4, alpha=8))
    assert torch.equal(weight(), first)
    trained = {name for name, p in weight.named_parameters() if p.requires_grad}
    assert trained == {"A", "B"} | ({"scales"} if bits else set())
    optimizer = torch.optim.Adam(weight.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (weight() - 1).square().sum().backward()
        optimizer.step()
        assert not weight()[~mask].any()
    plain, codes = weight.finished()
    want = mask * (first + (8 / 4) * weight.B @ weight.A).detach()
    if codes is None:
        assert torch.allclose(plain, want, atol=1e-5)
    else:
        assert torch.equal(plain, codes.to_dense())
        assert not codes.q[~mask].any()
    assert not torch.equal(plain[mask], first[mask])


def test_lora_gradients_are_those_of_the_product() -> None:
    torch.manual_seed(0)
    dense, mask, want = torch.randn(8, 12), torch.rand(8, 12) < 0.5, torch.randn(8, 12)
    weights = [LoraWeight(dense, mask, None, LoraOptions(rank=2)) for _ in range(2)]
    with torch.no_grad():
        for weight in weights:
            weight.B.fill_(0.3)
    weights[1].defers = True
    for weight in weights:
        ((weight() - want) ** 2).sum().backward()
        weight.settle()
    A, B = (p.detach().clone().requires_grad_() for p in (weights[0].A, weights[0].B))
    ((mask * (dense + 8.0 * B @ A) - want) ** 2).sum().backward()
    for weight in weights:
        assert torch.allclose(weight.A.grad, A.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]
        assert torch.allclose(weight.B.grad, B.grad, rtol=1e-4, atol=1e-4)  # type: ignore[arg-type]


def test_a_step_of_lora_is_as_large_as_one_of_the_weights() -> None:
    torch.manual_seed(0)
    dense, mask = torch.randn(8, 12), torch.rand(8, 12) < 0.5
    weight = LoraWeight(dense, mask, None, LoraOptions(rank=4, alpha=8.0))
    mean = float(dense[mask].abs().mean())
    group, *none = weight.groups(0.01)
    assert (group["lr"], none) == (pytest.approx(0.01 * mean / 2), [])  # deltas count alpha / rank times
    before = weight.dense().detach()
    weight.B.data += 1e-3
    moved = (weight.dense().detach() - before).abs().mean()
    assert float(moved) == pytest.approx(2e-3 * float(weight.A.detach().sum(0).abs().mean()), rel=1e-3)


def test_moving_masks_stay_within_the_pattern_and_stand_still_at_the_end() -> None:
    torch.manual_seed(0)
    pattern, dense = parse_pattern("2:4"), torch.randn(16, 32)
    mask = mask_from_scores(dense.abs(), pattern)
    weight = AstWeight(dense * mask, mask, None, AstOptions(every=1, decay=0.0, freeze=0.5, begin="dense"))
    weight.fill(dense)
    want = dense.flip(1)
    optimizer = torch.optim.SGD(weight.parameters(), lr=0.3)
    seen = []
    for step in range(10):
        ((weight() - want) ** 2).sum().backward()
        weight.before_step(step / 10)
        optimizer.step()
        optimizer.zero_grad()
        weight.after_step(step / 10)
        assert weight.mask is not None
        check_mask(weight.mask, pattern)
        assert int(weight.mask.sum()) == int(mask.sum())
        assert not weight()[~weight.mask].any()
        seen.append(weight.mask.clone())
    assert not torch.equal(seen[0], seen[4])
    assert all(torch.equal(seen[4], later) for later in seen[5:])


def test_what_is_pruned_gets_the_gradient_and_decays() -> None:
    mask = torch.tensor([[True, True, False, False]])
    options = AstOptions(decay=0.1, freeze=0.9, begin="dense")
    weight = AstWeight(torch.tensor([[4.0, 3.0, 0.0, 0.0]]), mask, None, options)
    weight.fill(torch.tensor([[9.0, 9.0, 2.0, -1.0]]))
    assert weight.latent.tolist() == [[4.0, 3.0, 2.0, -1.0]]
    weight.before_step(0.25)  # half of the rise
    (weight() * torch.tensor([[1.0, 2.0, 3.0, 4.0]])).sum().backward()
    assert weight.latent.grad is not None
    assert weight.latent.grad[0].tolist() == pytest.approx([1.0, 2.0, 3.0 + 0.05 * 2, 4.0 - 0.05])
    weight.latent.grad = None
    weight.before_step(0.95)
    weight().sum().backward()
    assert weight.latent.grad.tolist() == [[1.0, 1.0, 0.0, 0.0]]


def test_what_was_pruned_may_begin_at_zero() -> None:
    mask = torch.tensor([[True, True, False, False]])
    weight = AstWeight(torch.tensor([[0.4, 0.3, 0.0, 0.0]]), mask, None, AstOptions(every=1, decay=0.0))
    weight.fill(torch.tensor([[9.0, 9.0, 2.0, -1.0]]))
    assert weight.latent[0].tolist() == pytest.approx([0.4, 0.3, 0.0, 0.0])
    weight.after_step(0.1)
    assert torch.equal(weight.mask, mask)  # nothing has grown yet
    (weight() * torch.tensor([[0.0, 0.0, 1.0, 0.0]])).sum().backward()
    with torch.no_grad():
        weight.latent -= 0.35 * weight.latent.grad
    weight.after_step(0.2)
    assert weight.mask.tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("method", ["lora", "ast"])
def test_a_checkpoint_is_tuned_by_other_ways_too(method: str, tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense", num_hidden_layers=1)
    compress(dense, tmp_path / "made", method="magnitude", pattern="2:4", values="int4", windows=1, seqlen=32)
    options = {"rank": 4} if method == "lora" else {"every": 1}
    done = gs.finetune(
        tmp_path / "made", tmp_path / "out", teacher=dense, method=method, options=options, **RUN
    )
    assert done.outcome.after["kl"] <= done.outcome.before["kl"]
    models = [load_checkpoint(path) for path in (tmp_path / "made", done.path)]
    for old, new in zip(*(m.modules() for m in models), strict=True):
        if isinstance(old, StructuredLinear) and old.matrix.shape[0] < 300:
            assert old.matrix.describe() | {"clamped": 0} == new.matrix.describe() | {"clamped": 0}
            check_mask(new.matrix.mask(), parse_pattern("2:4"))
            if method == "lora":
                assert torch.equal(old.matrix.mask(), new.matrix.mask())


@pytest.mark.parametrize(
    ("method", "options", "error"),
    [
        ("lora", {"rank": 0}, MethodError),
        ("lora", {"every": 1}, MethodError),
        ("ast", {"begin": "one"}, MethodError),
        ("ast", {"pattern": "unstructured"}, MethodError),
        ("ast", {"pattern": "3:2"}, PatternError),
        ("ast", {"every": 0}, MethodError),
    ],
)
def test_bad_options_are_refused(method: str, options: dict[str, Any], error: type[GossamerError]) -> None:
    model, masks = masked()
    with pytest.raises(error):
        SparseTuning(model, losses={"task": 1}, masks=masks, method=method, options=options)


def test_ast_needs_masks_of_its_pattern() -> None:
    model, masks = masked("1:4")
    with pytest.raises(MethodError, match="but 2:4 keeps"):
        SparseTuning(model, losses={"task": 1}, masks=masks, method="ast", options={"pattern": "2:4"})
    model, masks = masked()
    with pytest.raises(MethodError, match="has none"):
        SparseTuning(model, losses={"task": 1}, masks=dict.fromkeys(masks), method="ast")


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("method", ["full", "ast"])
def test_a_trainer_gives_the_weights_of_our_loop(method: str, passes: int, tmp_path: Path) -> None:
    from torch.utils.data import SequentialSampler
    from transformers import Trainer, TrainingArguments

    from gossamer.tune.trainer import TuningCallback, TuningModule

    class InOrder(Trainer):  # type: ignore[misc]
        def _get_train_sampler(self, train_dataset: Any = None) -> Any:
            return SequentialSampler(train_dataset or self.train_dataset)

    def made() -> SparseTuning:
        model, masks = masked()
        options = {"every": 2, "decay": 0.1} if method == "ast" else {}
        return SparseTuning(
            model, teacher=tiny_model(seed=4, num_hidden_layers=2), losses={"kl": 1, "task": 0.5},
            masks=masks, values="int4", rate=1e-3, method=method, options=options,
        )  # fmt: skip

    ids, steps = tiny_tokens(8, 16), 4
    ours, theirs = made(), made()
    for step in range(steps):
        for part in ids[2 * step : 2 * step + 2].chunk(passes):
            (ours.loss(part) / passes).backward()
        ours.step((step + 0.5) / steps)
    module = TuningModule(theirs)
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_train_batch_size=2 // passes, max_steps=steps, max_grad_norm=1.0,
        gradient_accumulation_steps=passes,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    optimizers = (theirs.optimizer, module.schedule(steps))
    InOrder(
        module, arguments, train_dataset=data, optimizers=optimizers, callbacks=[TuningCallback(theirs)]
    ).train()
    before = made().values()
    for name, tensor in ours.values().items():
        if passes == 1:
            assert torch.equal(tensor, theirs.values()[name]), name
        else:  # sums in another order
            close = torch.isclose(tensor.float(), theirs.values()[name].float(), rtol=1e-3, atol=1e-6)
            assert close.float().mean() > 0.999, name
    assert any(not torch.equal(tensor, before[name]) for name, tensor in ours.values().items())
    for weight in theirs.weights.values():
        assert weight.mask is not None
        assert not weight()[~weight.mask].any()


def test_a_trainer_saves_what_is_tuned_and_goes_on(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from gossamer.tune.trainer import TuningCallback, TuningModule

    data = [{"input_ids": row, "labels": row} for row in tiny_tokens(8, 16)]

    def run(steps: int, folder: Path, resume: bool = False) -> SparseTuning:
        model, masks = masked()
        assert model.lm_head.weight is model.model.embed_tokens.weight  # what safetensors would refuse
        tuning = SparseTuning(model, losses={"task": 1}, masks=masks, rate=1e-3, method="ast")
        module = TuningModule(tuning)
        arguments = TrainingArguments(  # it saves, as it does unless it is told not to
            output_dir=str(folder), per_device_train_batch_size=2, max_steps=4, save_steps=steps,
            report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        trainer = Trainer(
            module, arguments, train_dataset=data, optimizers=(tuning.optimizer, module.schedule(4)),
            callbacks=[TuningCallback(tuning)],
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2") if resume else None)
        return tuning

    whole = run(2, tmp_path).values()
    again = run(4, tmp_path, resume=True).values()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())


def test_moving_masks_resume_with_the_rest_of_the_state() -> None:
    model, masks = masked()
    tuning = SparseTuning(
        model, losses={"task": 1}, masks=masks, method="ast", options={"every": 1}, rate=0.05
    )
    train(tuning, tiny_tokens(8, 16), tiny_tokens(2, 16), Loop(tokens=128, batch=2))
    state = {name: tensor.clone() for name, tensor in tuning.state_dict().items()}
    other = SparseTuning(masked()[0], losses={"task": 1}, masks=masks, method="ast", options={"every": 1})
    other.load_state_dict(state)
    moved = [n for n, w in other.weights.items() if not torch.equal(w.mask, masks[n])]  # type: ignore[arg-type]
    assert moved
    assert all(torch.equal(tensor, state[name]) for name, tensor in other.state_dict().items())
