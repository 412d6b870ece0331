"""Hugging Face's Trainer beside our own loop: checkpointed gradients, and methods besides full and ast."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainingArguments
from tuned_models import masked

from gossamer.errors import MethodError
from gossamer.tune import SparseTuning
from gossamer.tune.trainer import TuningCallback, TuningModule
from tiny import tiny_model, tiny_tokens

IDS, STEPS = tiny_tokens(8, 16), 4


class InOrder(Trainer):  # type: ignore[misc]
    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return SequentialSampler(train_dataset or self.train_dataset)


def trained(
    tuning: SparseTuning, folder: Path, passes: int = 1, resume: str | None = None, **more: Any
) -> dict[str, torch.Tensor]:
    """What a Trainer makes of ``tuning`` in STEPS steps of two windows, in one pass or two."""
    module = TuningModule(tuning)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2 // passes, gradient_accumulation_steps=passes,
        max_steps=STEPS, max_grad_norm=tuning.clip, report_to=[], use_cpu=True, disable_tqdm=True,
        logging_strategy="no", **{"save_strategy": "no", **more},
    )  # fmt: skip
    InOrder(
        module,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
        optimizers=(tuning.optimizer, module.schedule(STEPS)),
        callbacks=[TuningCallback(tuning)],
    ).train(resume_from_checkpoint=resume)
    return tuning.values()


def made(method: str = "full", values: str | None = "int4", **options: Any) -> SparseTuning:
    model, masks = masked()
    return SparseTuning(
        model, teacher=tiny_model(seed=4, num_hidden_layers=2), losses={"kl": 1, "squarehead": 0.5},
        masks=masks, values=values, rate=1e-3, method=method, options=options,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing")
def test_checkpointed_gradients_give_a_trainer_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    run: Callable[..., Any] = torch.utils.checkpoint.checkpoint

    def counted(*args: Any, **rest: Any) -> Any:
        nonlocal calls
        calls += 1
        return run(*args, **rest)

    plain = trained(made(), tmp_path)
    monkeypatch.setattr("gossamer.tune.sparse.checkpoint", counted)
    for options in (None, {"use_reentrant": False}):
        calls, tuning = 0, made()
        again = trained(tuning, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs=options)
        assert calls == 2 * STEPS  # the student's blocks alone
        assert all(torch.equal(tensor, again[name]) for name, tensor in plain.items())
    TuningModule(tuning).gradient_checkpointing_disable()
    tuning.loss(IDS[:2]).backward()
    assert calls == 2 * STEPS
    assert any(not torch.equal(tensor, made().values()[name]) for name, tensor in plain.items())


@pytest.mark.parametrize("options", [{"use_reentrant": True}, {"every_n_layers": 2}, {"offload": True}])
def test_other_ways_to_checkpoint_gradients_are_refused(options: dict[str, Any]) -> None:
    module = TuningModule(made())
    with pytest.raises(MethodError, match="leave these options out"):
        module.gradient_checkpointing_enable(options)
    with pytest.raises(MethodError, match="leave these options out"):
        module.activation_checkpointing_enable(**{"activation_checkpointing_kwargs": None, **options})


METHODS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("lora", "int4", {"rank": 4}),
    ("lora", None, {"rank": 4}),
    ("scales", "int4", {}),
    ("maskllm", None, {}),
    ("jackpot", None, {"every": 1, "rate": 0.05}),
]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize(("method", "values", "options"), METHODS)
def test_a_trainer_gives_the_weights_of_our_loop_by_every_method(
    method: str, values: str | None, options: dict[str, Any], passes: int, tmp_path: Path
) -> None:
    ours, theirs, first = (made(method, values, **options) for _ in range(3))
    for step in range(STEPS):
        for part in IDS[2 * step : 2 * step + 2].chunk(passes):
            (ours.loss(part) / passes).backward()
        ours.step((step + 0.5) / STEPS)
    found, start = trained(theirs, tmp_path, passes), first.values()
    for name, tensor in ours.values().items():
        if passes == 1:
            assert torch.equal(tensor, found[name]), name
        else:  # sums in another order
            close = torch.isclose(tensor.float(), found[name].float(), rtol=1e-3, atol=1e-6)
            assert close.float().mean() > 0.999, name
    moved = {
        name.rpartition(".")[2] for name, tensor in start.items() if not torch.equal(tensor, found[name])
    }
    wanted = {"lora": {"A", "B"}, "scales": {"factors"}, "maskllm": {"logits"}, "jackpot": {"kept"}}
    assert wanted[method] <= moved
    for weight in theirs.weights.values():
        assert not weight.finished()[0][~weight.final_mask()].any()  # type: ignore[operator]


@pytest.mark.parametrize(("method", "values", "options"), METHODS)
def test_a_trainer_goes_on_to_the_same_bits_by_every_method(
    method: str, values: str | None, options: dict[str, Any], tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(made(method, values, **options), tmp_path, **saving)
    resume = str(tmp_path / "checkpoint-2")
    again = trained(made(method, values, **options), tmp_path / "again", resume=resume)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
