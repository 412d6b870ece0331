"""What `finetune` is asked for, checked as a whole before any work starts."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field

from gossamer.calibrate import fast_dtype
from gossamer.errors import MethodError
from gossamer.matrices.values import check_group, value_type
from gossamer.tune import WEIGHTS, Loop, TunedWeight
from gossamer.tune.beside import BesideOptions
from gossamer.tune.losses import Loss, loss

DEFAULT_TOKENS = 500_000


class FinetuneSettings(BaseModel):
    """How a whole checkpoint is tuned.

    ``method``: which weights move, with ``options``: ``full`` (all that are kept), ``lora``, ``scales``; or
    masks: ``ast``, ``maskllm``, ``jackpot``; ``losses``: weights by name (0 leaves one out), with
    ``loss_options`` by name; ``values``: other values than the checkpoint's, such as int4 for one in
    bfloat16, in groups of ``group`` inputs a scale; ``beside``: options of low-rank parameters that are tuned
    beside each weight (`BesideOptions`), ``{rank: 16}`` or ``{sums: 16}``; ``norms``: norms and biases of the
    blocks are tuned too; ``rate``: None takes each layer's own (`SparseTuning`).
    ``tokens`` or ``minutes``: the budget (neither: 500,000 tokens; both: what ends first); what else a run
    takes stands in :class:`gossamer.tune.Loop`.
    ``bfloat16``: whether the models compute in it (None: where the machine does it fast).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "full"
    options: dict[str, Any] = Field(default_factory=dict)
    losses: dict[str, float] = Field(default_factory=lambda: {"kl": 1.0})
    loss_options: dict[str, dict[str, Any]] = Field(default_factory=dict)
    values: str | None = None
    group: int | None = None
    beside: dict[str, Any] | None = None
    norms: bool = True
    tokens: int | None = Field(default=None, ge=1)
    minutes: float | None = Field(default=None, gt=0)
    seqlen: int = Field(default=512, ge=2)
    batch: int = Field(default=8, ge=1)
    micro: int = Field(default=1, ge=1)
    rate: float | None = Field(default=None, gt=0)
    scale_rate: float = Field(default=0.1, ge=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip: float = Field(default=1.0, gt=0)
    held_out: int = Field(default=8, ge=1)
    evaluations: int = Field(default=10, ge=1)
    patience: int | None = Field(default=None, ge=1)
    seed: int = 0
    gradient_checkpointing: bool = False
    bfloat16: bool | None = None

    def check(self) -> None:
        """Raises a GossamerError with a sentence where parts do not fit together."""
        self.chosen_losses()
        self.weights()
        self.chosen_beside()
        if self.group is not None:
            check_group(self.group)
        if self.values is not None and value_type(self.values).is_integer is False and self.group is not None:
            raise MethodError(f"{self.values} values have no scales: leave out the group")
        if self.batch % self.micro:
            raise MethodError(f"a step's {self.batch} windows do not split into parts of {self.micro}")

    def chosen_losses(self) -> list[tuple[Loss, float]]:
        """Losses with their weights; raises MethodError."""
        for name, weight in self.losses.items():
            if not 0 <= weight < float("inf"):
                raise MethodError(f"the weight of the loss {name} is at least 0, got {weight}")
        if unused := set(self.loss_options) - set(self.losses):
            raise MethodError(
                f"there are options of losses that are not asked for: {', '.join(sorted(unused))}"
            )
        chosen = [(loss(name, **self.loss_options.get(name, {})), w) for name, w in self.losses.items()]
        chosen = [(one, weight) for one, weight in chosen if weight > 0]
        if not chosen:
            raise MethodError("no loss is left: give at least one a weight above 0")
        return chosen

    def weights(self) -> type[TunedWeight]:
        """The kind of tuned weight; raises MethodError for an unknown name or option."""
        kind = WEIGHTS[self.method]
        kind.chosen(self.options)
        return kind

    def chosen_beside(self) -> BesideOptions | None:
        """Of low-rank parameters; raises MethodError."""
        return BesideOptions.of(self.beside)

    def brings_back(self, pattern: str | None) -> bool:
        """Whether the dense model's weights are read, of a checkpoint in such a ``pattern``."""
        beside = self.chosen_beside()
        lost = beside is not None and beside.begin == "lost"
        return lost or self.weights().brings_back(self.chosen_options(pattern))

    def options_within(self, pattern: str | None) -> dict[str, Any]:
        """The method's options, with the ``pattern`` of a checkpoint for one that moves masks within it."""
        return self.weights().within(pattern, self.options)

    def chosen_options(self, pattern: str | None) -> Any:
        """`options_within` as the method takes them; raises MethodError."""
        return self.weights().chosen(self.options_within(pattern))

    def dtype(self) -> torch.dtype:
        """What the models compute in."""
        if self.bfloat16 is None:
            return fast_dtype()
        return torch.bfloat16 if self.bfloat16 else torch.float32

    def loop(self) -> Loop:
        """How long the loop runs, and when it looks."""
        tokens = DEFAULT_TOKENS if self.tokens is None and self.minutes is None else self.tokens
        return Loop(
            tokens=tokens,
            minutes=self.minutes,
            batch=self.batch,
            micro=self.micro,
            evaluations=self.evaluations,
            patience=self.patience,
            seed=self.seed,
        )
