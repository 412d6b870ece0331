"""Whole-model fine-tuning: beside plain PyTorch, masks at every step, budgets, kills and bad inputs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import nn
from tuned_models import Stopped, same_files

import gossamer as gs
from gossamer.errors import (
    CalibrationError,
    GossamerError,
    MatrixError,
    MethodError,
    ModelError,
    OutputError,
    ResumeError,
    TextError,
)
from gossamer.matrices import Packed
from gossamer.matrices.atomic import check_free
from gossamer.models import load_checkpoint
from gossamer.models.text import Exchange
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.tune import Loop, SparseTuning, Windows, saves, train
from gossamer.tune.losses import loss
from gossamer.tune.place import dense_weight
from gossamer.tune.weights import FLOAT_SHARE, SHARE
from tiny import tiny_folder, tiny_model, tiny_tokenizer, tiny_tokens

TEXT = "".join(topics.values())[:30_000]
SMALL: dict[str, Any] = {"text": [TEXT], "seqlen": 32, "batch": 4, "micro": 2, "held_out": 2, "rate": 1e-3}
BUDGET: dict[str, Any] = {**SMALL, "tokens": 10 * 4 * 32, "evaluations": 5}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=2)


def checkpoint(dense: Path, out: Path, **settings: Any) -> Path:
    some: dict[str, Any] = {"method": "magnitude", "windows": 2, "seqlen": 32, "calibration": [TEXT]}
    return compress(dense, out, **{**some, **settings}).path


@pytest.fixture(scope="module")
def sparse_int4(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(dense, tmp_path_factory.mktemp("made") / "int4", pattern="32:64", values="int4")


def packed(path: Path) -> dict[str, Packed]:
    """The packed linears of the blocks, by name."""
    found = load_checkpoint(path).named_modules()
    return {n: m.matrix for n, m in found if isinstance(m, StructuredLinear) and "layers" in n}  # type: ignore[misc]


def masked(seed: int = 0) -> tuple[Any, dict[str, torch.Tensor | None]]:
    """A plain float model and random masks of its linear layers."""
    model = tiny_model(seed=seed, num_hidden_layers=2)
    generator = torch.Generator().manual_seed(seed)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    return model, {n: torch.rand(m.weight.shape, generator=generator) < 0.5 for n, m in layers.items()}


@pytest.mark.parametrize(
    "settings",
    [
        {"pattern": "32:64", "values": "int4"},
        {"sparsity": 0.0, "values": "int3", "group": 32},
        {"sparsity": 0.6, "values": "bfloat16"},
        {"pattern": "16x4", "sparsity": 0.5, "values": "float32"},
    ],
)
def test_a_tuned_checkpoint_has_the_same_form_and_a_smaller_loss(
    settings: dict[str, Any], dense: Path, tmp_path: Path
) -> None:
    before = checkpoint(dense, tmp_path / "before", **settings)
    done = gs.finetune(
        before, tmp_path / "after", teacher=dense, losses={"kl": 1, "squarehead": 0.1}, **BUDGET
    )
    assert done.outcome.after["total"] < done.outcome.before["total"]
    assert done.outcome.after["total"] == pytest.approx(
        done.outcome.after["kl"] + 0.1 * done.outcome.after["squarehead"], rel=1e-5
    )
    old, new = packed(before), packed(tmp_path / "after")
    assert old.keys() == new.keys()
    for name, was in old.items():
        assert was.describe() | {"clamped": 0} == new[name].describe() | {"clamped": 0}
        assert torch.equal(was.mask(), new[name].mask())
        assert not torch.equal(was.to_dense(), new[name].to_dense())
    record = json.loads((tmp_path / "after" / "gossamer.json").read_text())["made"]
    (tuned,) = record["tuned"]
    assert (tuned["tokens"], tuned["step"], tuned["teacher"]) == (10 * 4 * 32, 10, "tiny")
    assert record["pattern"] == json.loads((before / "gossamer.json").read_text())["made"]["pattern"]
    assert not (tmp_path / "after.work").exists()


def test_float_weights_train_as_in_a_plain_loop() -> None:
    model, masks = masked()
    teacher = tiny_model(seed=5, num_hidden_layers=2).requires_grad_(False)
    tuning = SparseTuning(
        model, teacher=teacher, losses={"kl": 0.7, "squarehead": 0.2, "task": 0.3}, masks=masks, rate=1e-3,
        norms=False,
    )  # fmt: skip
    plain, _ = masked()
    plain.requires_grad_(False)
    weights = {n: plain.get_submodule(n).weight for n in masks}
    for name, weight in weights.items():
        weight.data *= masks[name]
        weight.requires_grad_(True)
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(4):
        ids = tiny_tokens(3, 20, seed=step)
        tuning.loss(ids).backward()
        tuning.step(0.5)
        out, want = (m(ids, output_hidden_states=True) for m in (plain, teacher))
        # hidden states behind the last block come before the last norm
        states = [[*o.hidden_states[1:-1], None] for o in (out, want)]
        log_p, log_q = out.logits[:, :-1].log_softmax(-1), want.logits[:, :-1].log_softmax(-1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        task = nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        last = [_behind_last_block(m, ids) for m in (plain, teacher)]
        pairs = [*zip(states[0][:-1], states[1][:-1], strict=True), tuple(last)]
        square = sum(((f - g)[:, :-1].square().mean() / g[:, :-1].square().mean()) for f, g in pairs)
        # Adam takes gradients of nothing but rounding for full steps, so both drift apart a little
        assert tuning.parts == pytest.approx(
            {"kl": kl.item(), "task": task.item(), "squarehead": square.item()},
            rel=1e-5 if step == 0 else 5e-3,
        )
        optimizer.zero_grad()
        (0.7 * kl + 0.3 * task + 0.2 * square).backward()
        for name, weight in weights.items():
            weight.grad *= masks[name]
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * tuning.factor(0.5)
        optimizer.step()
    for name, weight in weights.items():
        apart = (tuning.weights[name]() - weight).abs()
        assert apart.median() < 1e-6
        assert apart.mean() < 2e-5  # four steps of 5e-4


def _behind_last_block(model: Any, ids: torch.Tensor) -> torch.Tensor:
    heard: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(
        lambda m, a, out: heard.append(out[0] if isinstance(out, tuple) else out)
    )
    model(ids)
    handle.remove()
    return heard[0]


@pytest.mark.parametrize("values", ["int4", None])
def test_masks_hold_at_every_step_whatever_the_optimizer_does(values: str | None) -> None:
    model, masks = masked()
    tuning = SparseTuning(model, losses={"task": 1}, masks=masks, values=values, rate=0.05, weight_decay=0.1)
    for step in range(3):
        tuning.loss(tiny_tokens(2, 16, seed=step)).backward()
        tuning.step(0.3)
        for name, weight in tuning.weights.items():
            mask = masks[name]
            assert mask is not None
            assert not weight()[~mask].any()
            assert weight()[mask].any()
    merged = tuning.merge()
    for name, mask in masks.items():
        matrix = merged[f"{name}.weight"]
        assert isinstance(matrix, gs.Matrix)
        assert mask is not None
        assert torch.equal(matrix.mask() if isinstance(matrix, Packed) else matrix.mask, mask)  # type: ignore[operator,arg-type]
        assert not matrix.to_dense()[~mask].any()


@pytest.mark.parametrize(("values", "share"), [(None, FLOAT_SHARE), ("int8", SHARE)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_is_a_share_of_each_layers_weights(method: str, values: str | None, share: float) -> None:
    model, masks = masked()
    first, *_ = masks
    with torch.no_grad():
        model.get_submodule(first).weight.mul_(50)
    tuning = SparseTuning(model, losses={"task": 1}, masks=masks, method=method, values=values)
    before = {name: weight.dense().detach().clone() for name, weight in tuning.weights.items()}
    tuning.loss(tiny_tokens(2, 16)).backward()
    tuning.step(0.3)  # Adam's first step is the rate itself, whatever the gradient
    for name, weight in tuning.weights.items():
        moved = (weight.dense().detach() - before[name]).square().mean().sqrt()
        kept = before[name] if masks[name] is None else before[name][masks[name]]
        want = share * tuning.factor(0.3) * kept.abs().mean()
        assert 0.3 * want < moved < 1.5 * want, name
    assert before[first].abs().mean() > 10 * before[name].abs().mean()


def test_the_merged_model_computes_what_the_tuned_one_did() -> None:
    model, masks = masked()
    tuning = SparseTuning(model, losses={"task": 1}, masks=masks, rate=1e-2)
    ids = tiny_tokens(2, 16)
    tuning.loss(ids).backward()
    tuning.step(0.3)
    with torch.no_grad():
        want = model(ids).logits
        tuning.merge()
        assert torch.equal(model(ids).logits, want)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("losses", "changes"),
    [
        ({"kl": 1, "task": 1}, {"micro": 4}),
        (
            {"kl": 1, "squarehead": 1},
            {"gradient_checkpointing": True},
        ),  # a ratio: not the same in other parts
    ],
)
def test_parts_of_a_batch_and_checkpointed_gradients_change_nothing(
    losses: dict[str, float], changes: dict[str, Any]
) -> None:
    batch, found = tiny_tokens(4, 16), []
    for micro, again in ((2, False), (changes.get("micro", 2), changes.get("gradient_checkpointing", False))):
        model, masks = masked()
        tuning = SparseTuning(
            model, teacher=tiny_model(seed=3, num_hidden_layers=2), losses=losses, masks=masks, values="int4",
            rate=1e-3, gradient_checkpointing=again,
        )  # fmt: skip
        start = {name: tensor.clone() for name, tensor in tuning.values().items()}
        for _ in range(3):
            for part in torch.split(batch, micro):
                (tuning.loss(part) * (len(part) / len(batch))).backward()
            tuning.step(0.5)
        found.append(tuning.values())
        tuning.merge()
        assert not any("forward" in vars(module) for module in model.modules())
    moved = {name: float((tensor - start[name]).abs().max()) for name, tensor in found[0].items()}
    assert min(moved.values()) > 1e-5
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], rtol=0, atol=3e-6), name


def test_checkpointed_gradients_leave_dropout_off() -> None:
    model = tiny_model("opt", dropout=0.5)
    masks = {n: None for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    tuning = SparseTuning(model, losses={"task": 1}, masks=masks, gradient_checkpointing=True)
    ids = tiny_tokens(2, 16)
    assert torch.equal(tuning.loss(ids), tuning.loss(ids))


def test_padding_counts_nowhere() -> None:
    ids = tiny_tokens(2, 12)
    model, masks = masked()
    tuning = SparseTuning(
        model, teacher=tiny_model(seed=3, num_hidden_layers=2), losses={"kl": 1, "task": 1, "squarehead": 1},
        masks=masks,
    )  # fmt: skip
    want = float(tuning.loss(ids).detach())
    for pad in (2, 77):
        for side in (0, 1):
            padding = torch.full((2, 5), pad)
            parts = [(padding, torch.zeros_like(padding)), (ids, torch.ones_like(ids))]
            whole, mask = (torch.cat(t, 1) for t in zip(*(parts if side == 0 else parts[::-1]), strict=True))
            padded = float(tuning.loss({"input_ids": whole, "attention_mask": mask}).detach())
            assert padded == pytest.approx(want, rel=1e-4)


def test_an_optimizer_of_ones_own_is_seen_by_losses_and_the_merge() -> None:
    model, masks = masked()
    tuning = SparseTuning(model, losses={"task": 1}, masks=masks, rate=1e-2)
    ids = tiny_tokens(4, 16)
    with torch.no_grad():
        before = float(tuning.loss(ids))
    for _ in range(5):
        tuning.loss(ids, defer=False).backward()
        tuning.optimizer.step()
        tuning.optimizer.zero_grad()
    with torch.no_grad():
        after = float(tuning.loss(ids))
        want = model(ids).logits
        tuning.merge()
        assert torch.equal(model(ids).logits, want)
    assert after < 0.95 * before


def test_a_run_that_goes_wrong_ends_at_its_best_state(
    sparse_int4: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = SparseTuning.step, 0

    def breaking(self: SparseTuning, fraction: float) -> None:
        nonlocal calls
        step(self, fraction)
        calls += 1
        if calls == 8:
            next(iter(self.weights.values())).latent.data.fill_(torch.nan)

    monkeypatch.setattr(SparseTuning, "step", breaking)
    asked = {**BUDGET, "rate": None, "tokens": 30 * 4 * 32, "evaluations": 15}
    done = gs.finetune(sparse_int4, tmp_path / "out", teacher=dense, **asked)
    assert done.outcome.ended == "a loss that is not finite"
    assert 0 < done.outcome.best_step <= 6
    assert done.outcome.after["total"] < done.outcome.before["total"]
    assert all(math.isfinite(total) for _, total in done.outcome.held_out)
    calls = 7  # at once: nothing is better than the start
    with pytest.raises(CalibrationError, match="not finite at step"):
        gs.finetune(sparse_int4, tmp_path / "other", teacher=dense, **asked)


def test_a_budget_below_a_step_is_a_step(sparse_int4: Path, dense: Path, tmp_path: Path) -> None:
    exact = {**SMALL, "tokens": 10, "rate": None, "bfloat16": False}  # bfloat16 may round one step away
    done = gs.finetune(sparse_int4, tmp_path / "out", teacher=dense, **exact)
    assert done.outcome.step == 1
    assert len({total for _, total in done.outcome.held_out}) == 2  # it moved
    model, masks = masked()
    with pytest.raises(MethodError, match="needs a budget"):
        train(
            SparseTuning(model, losses={"task": 1}, masks=masks),
            tiny_tokens(8, 16),
            tiny_tokens(2, 16),
            Loop(),
        )


@pytest.mark.parametrize("name", ["tokens", "minutes", "batch", "micro", "evaluations", "patience"])
def test_a_loop_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(MethodError, match=f"{name} is .*, got 0"):
        Loop(**{name: 0})  # type: ignore[arg-type]


def test_a_killed_run_goes_on_to_the_same_bits(
    sparse_int4: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gs.finetune(sparse_int4, tmp_path / "whole", teacher=dense, **BUDGET)
    steps = Stopped(monkeypatch, at=6)
    with pytest.raises(KeyboardInterrupt):
        gs.finetune(sparse_int4, tmp_path / "again", teacher=dense, **BUDGET)
    assert not (tmp_path / "again").exists()
    assert json.loads((tmp_path / "again.work" / saves.LOOP).read_text())["numbers"]["step"] == 4
    steps.calls = 100
    with pytest.raises(ResumeError, match="it differs in settings"):
        gs.finetune(sparse_int4, tmp_path / "again", teacher=dense, **{**BUDGET, "rate": 2e-3})
    again = gs.finetune(sparse_int4, tmp_path / "again", teacher=dense, **BUDGET)
    assert again.resumed
    assert steps.calls == 106  # six steps were left
    assert same_files(whole.path, again.path)


def test_a_full_disk_keeps_the_last_state_and_damage_is_told(
    sparse_int4: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = saves.write_tensors, 0

    def full(path: Path, tensors: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 3:
            raise OutputError("no space is left")
        return write(path, tensors)

    monkeypatch.setattr(saves, "write_tensors", full)
    with pytest.raises(OutputError, match="no space"):
        gs.finetune(sparse_int4, tmp_path / "out", teacher=dense, **BUDGET)
    monkeypatch.undo()
    check_free(tmp_path / "out")
    files = json.loads((tmp_path / "out.work" / saves.LOOP).read_text())["files"]
    state = tmp_path / "out.work" / files["state"]["name"]
    data = bytearray(state.read_bytes())
    data[-5] ^= 1
    state.write_bytes(data)
    with pytest.raises(ResumeError, match=r"its state in out\.work is damaged"):
        gs.finetune(sparse_int4, tmp_path / "out", teacher=dense, **BUDGET)


def test_budgets_are_kept(sparse_int4: Path, dense: Path, tmp_path: Path) -> None:
    done = gs.finetune(sparse_int4, tmp_path / "a", teacher=dense, **{**BUDGET, "tokens": 300})
    assert (done.outcome.tokens, done.outcome.ended) == (384, "tokens")  # whole steps of 128
    done = gs.finetune(sparse_int4, tmp_path / "b", teacher=dense, **SMALL, minutes=1e-4)
    assert (done.outcome.step, done.outcome.ended) == (1, "minutes")
    done = gs.finetune(
        sparse_int4, tmp_path / "c", teacher=dense, **{**BUDGET, "rate": 10.0, "patience": 2, "clip": 1e9}
    )
    assert (done.outcome.best_step, done.outcome.ended) == (0, "patience")
    old, new = packed(sparse_int4), packed(done.path)
    assert all(torch.equal(old[name].to_dense(), new[name].to_dense()) for name in old)


def test_windows_are_all_seen_before_any_comes_again() -> None:
    seen: list[int] = []

    class Counts:
        def __init__(self) -> None:
            self.parts: dict[str, float] = {}

        def loss(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            seen.extend(batch["input_ids"][:, 0].tolist() if torch.is_grad_enabled() else [])
            return torch.zeros((), requires_grad=True)

        def step(self, fraction: float) -> None: ...

        def values(self) -> dict[str, torch.Tensor]:
            return {}

        def load_values(self, values: Any) -> None: ...

    ids = torch.arange(7)[:, None].repeat(1, 4)
    train(Counts(), ids, ids[:1], Loop(tokens=14 * 4, batch=2, patience=99))  # type: ignore[arg-type]
    assert sorted(seen[:7]) == sorted(seen[7:]) == list(range(7))
    assert seen[:7] != seen[7:]


PAIRS = [Exchange(f"What is {i} and {i}?", "Twice as much. " * (1 + i % 5)) for i in range(60)]
CHAT = "<s>user: {}</s><s>assistant: {}</s>"  # the form of the tiny tokenizer


def test_answers_alone_are_learned(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = {"values": "float32", "head_values": "float32"}
    sparse = checkpoint(dense, tmp_path / "sparse", pattern="2:4", **exact)
    budget = {**BUDGET, "tokens": 2 * 4 * 32, "bfloat16": False}
    asked: dict[str, Any] = {**budget, "text": PAIRS, "losses": {"task": 1}}
    texts = {**asked, "text": ["".join(CHAT.format(pair.prompt, pair.response) for pair in PAIRS)]}
    want, share = answers_by_hand(sparse, seqlen=32, held_out=2)
    after = []
    for micro in (1, 4):  # each token as much as another, in whatever parts they come
        done = gs.finetune(sparse, tmp_path / f"of {micro}", **{**asked, "micro": micro})
        assert done.outcome.before["task"] == pytest.approx(want, rel=1e-5)
        assert done.learned == pytest.approx(share)
        assert done.made["tuned"][0]["text"]["learned"] == round(share, 4)
        assert done.outcome.after["task"] < want
        after.append({name: layer.to_dense() for name, layer in packed(done.path).items()})
    for name, weight in after[0].items():
        torch.testing.assert_close(weight, after[1][name], rtol=1e-3, atol=1e-6)
    all_of_it = gs.finetune(sparse, tmp_path / "texts", **texts)
    assert all_of_it.learned == 1
    assert all_of_it.outcome.before["task"] != pytest.approx(want, rel=1e-3)

    def dies(self: SparseTuning, fraction: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SparseTuning, "step", dies)
    with pytest.raises(KeyboardInterrupt):
        gs.finetune(sparse, tmp_path / "cut", **asked)
    with pytest.raises(ResumeError, match="it differs in tokens"):
        gs.finetune(sparse, tmp_path / "cut", **texts)


@pytest.mark.parametrize("given", [torch.ones(3, 1), torch.ones(4), torch.ones(0, 8)])
def test_windows_without_a_token_to_learn_are_refused(given: torch.Tensor) -> None:
    with pytest.raises(MethodError, match=r"windows to tune on are|a window to tune on in which nothing"):
        Windows.of(given.long())
    ids, learned = torch.ones(2, 4, dtype=torch.int64), torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0]]).bool()
    assert Windows.of(ids[:1], learned[:1]).share == pytest.approx(1 / 3)
    with pytest.raises(MethodError, match="a window to tune on in which nothing is learned"):
        Windows.of(ids, learned)


def answers_by_hand(path: Path, seqlen: int, held_out: int) -> tuple[float, float]:
    """The cross-entropy of answers in the held-out windows of PAIRS, and the share of tokens to tune on that
    are answers: character by character, in plain PyTorch."""
    tokenizer = tiny_tokenizer()
    text, wanted = "", ""
    for pair in PAIRS:
        before, _, after = CHAT.partition("{}</s><s>assistant: {}")
        asked = f"{before}{pair.prompt}</s><s>assistant: "
        text += f"{asked}{pair.response}{after}"
        wanted += " " * len(asked) + "x" * len(pair.response + after)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    counts, at = [], 0
    for token in ids:
        length = len(tokenizer.decode([token]))
        counts.append("x" in wanted[at : at + length])
        at += length
    assert at == len(text)
    rows = [(ids[i : i + seqlen], counts[i : i + seqlen]) for i in range(0, len(ids) - seqlen + 1, seqlen)]
    rows = [(window, flags) for window, flags in rows if any(flags[1:])]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    model, losses = load_checkpoint(path), []
    for row in order[:held_out]:
        window, flags = rows[row]
        with torch.inference_mode():
            log_p = model(torch.tensor([window])).logits[0].float().log_softmax(-1)
        losses += [-float(log_p[i - 1, window[i]]) for i in range(1, seqlen) if flags[i]]
    rest = [flag for row in order[held_out:] for flag in rows[row][1][1:]]
    return sum(losses) / len(losses), sum(rest) / len(rest)


def test_bf16_may_be_tuned_towards_int4(dense: Path, tmp_path: Path) -> None:
    before = checkpoint(dense, tmp_path / "bf16", pattern="32:64", values="bfloat16")
    done = gs.finetune(before, tmp_path / "int4", teacher=dense, values="int4", **BUDGET)
    assert {layer["values"] for layer in done.made["layers"]} == {"int4"}
    assert not [key for layer in done.made["layers"] for key in layer if key.endswith("_error")]
    assert gs.describe(done.path).layer_error is None
    old, new = packed(before), packed(done.path)
    assert {m.values_name for m in new.values()} == {"int4"}
    assert all(torch.equal(old[name].mask(), new[name].mask()) for name in old)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"losses": {"klx": 1}}, MethodError, "did you mean 'kl'"),
        ({"losses": {"kl": 0}}, MethodError, "no loss is left"),
        ({"losses": {"kl": -1}}, MethodError, "at least 0"),
        ({"loss_options": {"task": {"x": 1}}}, MethodError, "not asked for"),
        ({"loss_options": {"kl": {"x": 1}}}, MethodError, "does not take these"),
        ({"loss_options": {"kl": {"temperature": 0}}}, MethodError, "above 0"),
        ({"method": "fill"}, MethodError, "did you mean 'full'"),
        ({"options": {"rank": 3}}, MethodError, "does not take these"),
        ({"micro": 3}, MethodError, "do not split"),
        ({"group": 7}, MatrixError, "a scale covers 64 or 32 inputs"),
        ({"speed": 3}, GossamerError, "the setting speed"),
        ({"tokens": 0}, GossamerError, "the setting tokens"),
        ({"seqlen": 4096}, ModelError, "longer than"),
        ({"method": "lora", "options": {"rank": 4.5}}, MethodError, "takes as rank a whole number, got 4.5"),
        (
            {"method": "lora", "options": {"alpha": float("nan")}},
            MethodError,
            "alpha a finite number, got nan",
        ),
        ({"method": "ast", "options": {"pattern": 24}}, MethodError, "takes as pattern text, got 24"),
        (
            {"loss_options": {"kl": {"temperature": True}}},
            MethodError,
            "temperature a finite number, got True",
        ),
        ({"text": ["too short"]}, TextError, "window"),
        ({"text": [TEXT[:250]]}, TextError, "held out"),
        ({"teacher": "/nowhere"}, ModelError, "nowhere"),
        ({"teacher": None}, ModelError, "made from 'tiny'"),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    changes: dict[str, Any],
    error: type[GossamerError],
    says: str,
    sparse_int4: Path,
    dense: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=says):
        gs.finetune(sparse_int4, tmp_path / "out", **{"teacher": dense, **BUDGET, **changes})
    assert not any(tmp_path.iterdir())


def test_another_vocabulary_other_blocks_and_nan_are_refused(
    sparse_int4: Path, dense: Path, tmp_path: Path
) -> None:
    other = tiny_model(num_hidden_layers=2, vocab_size=400)
    model, masks = masked()
    with pytest.raises(MethodError, match="another vocabulary"):
        SparseTuning(model, teacher=other, losses={"kl": 1}, masks=masks)
    teacher = tiny_model(num_hidden_layers=2)
    with pytest.raises(MethodError, match="the model has 2, its teacher 3"):
        SparseTuning(model, teacher=tiny_model(), losses={"squarehead": 1}, masks=masks)
    with pytest.raises(MethodError, match="needs a teacher"):
        SparseTuning(model, losses={"kl": 1}, masks=masks)
    with pytest.raises(MethodError, match="the weight of the loss task is at least 0, got -1"):
        SparseTuning(model, losses={"kl": 1, "task": -1}, teacher=teacher, masks=masks)
    with pytest.raises(MethodError, match=r"in \[0, 1\), got 1"):
        SparseTuning(model, losses={"task": 1, "kl": 0}, masks=masks, warmup=1)
    teacher.model.layers[0].mlp.up_proj.weight.data[0, 0] = torch.nan  # as a damaged file would have it
    model, masks = masked()
    with pytest.raises(ModelError, match="not finite: NaN"):
        SparseTuning(model, teacher=teacher, losses={"kl": 1}, masks=masks)
    folder = tiny_folder(tmp_path / "other", num_hidden_layers=2)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    last = max(words, key=words.get)
    words["qqqq"] = words.pop(last)
    tokenizer["model"]["merges"] = [m for m in tokenizer["model"]["merges"] if "".join(m) != last]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match="another vocabulary"):
        gs.finetune(sparse_int4, tmp_path / "out", teacher=folder, **BUDGET)


@pytest.mark.parametrize(
    ("arch", "name", "says"),
    [
        ("llama_untied", "lm_head", "lm_head lies outside of the blocks"),
        ("llama", "model.layers.0.mlp.up", "no layer 'model.layers.0.mlp.up'"),
        ("gpt2", "transformer.h.0.attn.c_attn", "is a Conv1D, and what is tuned here is nn.Linear"),
    ],
)
def test_masks_of_what_cannot_be_tuned_are_refused(arch: str, name: str, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        SparseTuning(tiny_model(arch, num_hidden_layers=1), losses={"task": 1}, masks={name: None})


def test_models_and_losses_of_another_kind_are_refused() -> None:
    with pytest.raises(ModelError, match="not a Sequential: other modules are tuned by ModuleTuning"):
        SparseTuning(nn.Sequential(nn.Linear(8, 8)), losses={"task": 1})  # type: ignore[arg-type]
    model, masks = masked()
    for losses in ("task", ["task"], [("task", 1)]):
        with pytest.raises(MethodError, match="losses are weights by name"):
            SparseTuning(model, losses=losses, masks=masks)  # type: ignore[arg-type]


def test_every_loss_says_what_it_needs() -> None:
    assert [loss(name).needs_teacher for name in ("kl", "squarehead", "task")] == [True, True, False]


def test_biases_of_tuned_layers_are_tuned_and_put_back(tmp_path: Path) -> None:
    dense = tiny_folder(tmp_path / "dense", "qwen2", num_hidden_layers=1)
    made = checkpoint(dense, tmp_path / "made", pattern="32:64", values="int4")
    done = gs.finetune(made, tmp_path / "out", teacher=dense, **BUDGET)
    name = "model.layers.0.self_attn.q_proj.bias"
    before, after = (load_checkpoint(path).get_parameter(name) for path in (made, done.path))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(("values", "sparsity"), [("int4", 0.2), ("int3", 0.3)])
def test_what_was_pruned_stays_zero_in_a_layout_that_keeps_no_masks(
    values: str, sparsity: float, dense: Path, tmp_path: Path
) -> None:
    made = checkpoint(dense, tmp_path / "made", sparsity=sparsity, values=values)
    done = gs.finetune(made, tmp_path / "out", teacher=dense, **BUDGET)
    before, after = packed(made), packed(done.path)
    assert {matrix.layout for matrix in after.values()} == {"dense"}
    moved = 0
    for name, matrix in before.items():
        old, new = matrix.to_dense(), after[name].to_dense()
        assert not bool((new[old == 0] != 0).any())
        moved += int((old != new).sum())
    assert moved


@pytest.mark.parametrize(
    ("values", "sparsity", "layout"),
    [("bfloat16", 0.05, "dense"), ("int4", 0.2, "dense"), ("bfloat16", 0.5, "bitmap")],
)
def test_masks_of_packed_layers_hold_in_every_layout(values: str, sparsity: float, layout: str) -> None:
    model = tiny_model(num_hidden_layers=1)
    made = gs.sparsify(model, method="magnitude", sparsity=sparsity, values=values, skip="lm_head", pack=True)
    assert {m.matrix.layout for m in model.modules() if isinstance(m, StructuredLinear)} == {layout}
    tuning = SparseTuning(model, losses={"task": 1}, masks=made.masks, rate=0.05)
    tuning.loss(tiny_tokens(2, 16)).backward()
    tuning.step(0.3)
    tuned = tuning.merge()
    for name, mask in made.masks.items():
        assert not tuned[f"{name}.weight"].to_dense()[~mask].any()  # type: ignore[operator]
        assert tuned[f"{name}.weight"].describe()["layout"] == layout  # type: ignore[operator]


@pytest.mark.parametrize("sparsity", [0.05, 0.5])
def test_masks_that_are_not_those_of_packed_layers_are_refused(sparsity: float) -> None:
    model = tiny_model(num_hidden_layers=1)
    made = gs.sparsify(
        model, method="magnitude", sparsity=sparsity, values="bfloat16", skip="lm_head", pack=True
    )
    name = next(iter(made.masks))
    for mask, says in (
        (~made.masks[name], "another one" if sparsity == 0.5 else "not zero in the packed layer"),
        (made.masks[name][1:], r"is bool, got torch.bool \(63, 64\)"),
        (made.masks[name].float(), "is bool, got torch.float32"),
    ):
        with pytest.raises(ModelError, match=f"{name}: the mask .*{says}"):
            SparseTuning(model, losses={"task": 1}, masks={**made.masks, name: mask})


def test_the_dense_weight_of_any_linear_layer() -> None:
    conv = tiny_model("gpt2", num_hidden_layers=1).transformer.h[0].mlp.c_fc
    assert torch.equal(dense_weight(conv), conv.weight.detach().T)  # type: ignore[arg-type]
    linear = nn.Linear(64, 8)
    weight = linear.weight.detach()
    assert torch.equal(dense_weight(linear), weight)  # type: ignore[arg-type]
    layer = StructuredLinear(Packed.pack(weight.bfloat16().float(), "bf16"))
    assert torch.equal(dense_weight(layer), weight.bfloat16().float())  # type: ignore[arg-type]
    assert dense_weight(nn.Embedding(8, 8)) is None
    with pytest.raises(AttributeError, match="leave it unpacked"):
        _ = layer.weight


def test_another_teacher_of_the_same_name_is_told(
    sparse_int4: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tiny_folder(tmp_path / "tiny", seed=9, num_hidden_layers=2)
    assert other.name == dense.name

    def stopped(self: SparseTuning, fraction: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SparseTuning, "step", stopped)
        with pytest.raises(KeyboardInterrupt):
            gs.finetune(sparse_int4, tmp_path / "out", teacher=dense, **BUDGET)
    with pytest.raises(ResumeError, match="it differs in teacher"):
        gs.finetune(sparse_int4, tmp_path / "out", teacher=other, **BUDGET)
