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


def trained(tuning: SparseTuning, folder: Path, **more: Any) -> dict[str, torch.Tensor]:
    """What a Trainer makes of ``tuning`` in STEPS steps of two windows."""
    module = TuningModule(tuning)
    arguments = TrainingArguments(
        output_dir=str(folder), per_device_train_batch_size=2, max_steps=STEPS, max_grad_norm=tuning.clip,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no", **more,
    )  # fmt: skip
    InOrder(
        module,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in IDS],
        optimizers=(tuning.optimizer, module.schedule(STEPS)),
        callbacks=[TuningCallback(tuning)],
    ).train()
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
