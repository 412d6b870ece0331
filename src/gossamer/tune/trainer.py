"""Fine-tuning under masks in Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from gossamer.errors import MethodError
from gossamer.tune.sparse import SparseTuning

UNASKED = {"every_n_layers": 1, "offload": False}  # what a Trainer gives where nobody asked for anything


class TuningModule(nn.Module):
    """What a Trainer trains: its forward pass gives the loss of ``tuning``.

        tuning = SparseTuning(model, teacher=dense, losses={"kl": 1})
        module = TuningModule(tuning)
        Trainer(module, args, train_dataset=..., callbacks=[TuningCallback(tuning)],
                optimizers=(tuning.optimizer, module.schedule(steps))).train()
        tuning.merge()

    With ``max_grad_norm`` as ``clip`` and the same batches the weights are those of a loop of one's own. What
    the Trainer saves is what is tuned, without the model around it.
    """

    def __init__(self, tuning: SparseTuning) -> None:
        super().__init__()
        self.model = tuning.model
        self.tuning = tuning

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The loss of a batch; see `SparseTuning.loss`."""
        batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        return {"loss": self.tuning.loss(batch, defer=False)}

    def state_dict(self, *args: Any, **rest: Any) -> dict[str, Tensor]:  # type: ignore[override]
        """What is tuned alone: what a Trainer saves, though weights of the model be tied."""
        return self.tuning.values()

    def load_state_dict(self, state_dict: Mapping[str, Any], *args: Any, **rest: Any) -> Any:
        """Comes back to what `state_dict` gave."""
        self.tuning.load_values(state_dict)
        return super().load_state_dict({}, strict=False)._replace(missing_keys=[])

    def train(self, mode: bool = True) -> TuningModule:
        """Leaves the model in evaluation mode: no dropout."""
        self.training = mode
        return self

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None
    ) -> None:
        """Runs blocks again in backward passes (`SparseTuning.checkpoint_gradients`); raises MethodError for
        options other than ``use_reentrant=False``, which is how."""
        if dict(gradient_checkpointing_kwargs or {}) not in ({}, {"use_reentrant": False}):
            raise MethodError(
                "gradients are checkpointed block by block with use_reentrant=False, not with "
                f"{dict(gradient_checkpointing_kwargs or {})}: leave these options out"
            )
        self.tuning.checkpoint_gradients(True)

    def gradient_checkpointing_disable(self) -> None:
        """Keeps what blocks computed for backward passes."""
        self.tuning.checkpoint_gradients(False)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **rest: Any
    ) -> None:
        """`gradient_checkpointing_enable`, as newer versions of transformers call it; ``rest``: which layers
        do so, and where they keep what they read. Raises MethodError unless it is all, and here."""
        asked = {name: value for name, value in rest.items() if value != UNASKED.get(name)}
        self.gradient_checkpointing_enable({**(activation_checkpointing_kwargs or {}), **asked})

    def activation_checkpointing_disable(self) -> None:
        """`gradient_checkpointing_disable`."""
        self.gradient_checkpointing_disable()

    def schedule(self, steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        """The rate's rise and fall over ``steps`` steps."""
        return torch.optim.lr_scheduler.LambdaLR(
            self.tuning.optimizer, lambda step: self.tuning.factor((step + 0.5) / steps)
        )


class TuningCallback(TrainerCallback):  # type: ignore[misc]
    """Does what a method does around an optimizer's step, such as moving masks."""

    def __init__(self, tuning: SparseTuning) -> None:
        self.tuning = tuning

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.tuning.set_passes(args.gradient_accumulation_steps)

    def on_step_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.tuning.before_step((state.global_step + 0.5) / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        self.tuning.after_step((state.global_step - 0.5) / state.max_steps)
