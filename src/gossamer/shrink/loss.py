"""Removes one block after the other, each time the one whose absence costs least."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.calibrate.stream import batch_size, fast_dtype
from gossamer.claim import Claim
from gossamer.errors import CalibrationError
from gossamer.models.skeleton import materialize, release
from gossamer.models.walk import capture_block_inputs, finish, run_block
from gossamer.shrink.method import DEPTH, TENTH, Choice, DepthMethod, Subject

CHUNK = 256  # positions whose logits are held at once


@DEPTH.register(
    "loss",
    cite="Song et al. 2024, SLEB: Streamlining LLMs through Redundancy Verification and Elimination of "
    "Transformer Blocks",
)
@dataclass
class Loss(DepthMethod):
    """Greedily the block without which perplexity is lowest, measured anew after every removal.

    ``measured["losses"]``: nats a token after each removal, in the order of ``measured["order"]``. A removal
    costs every block half as many runs as there are blocks; one block is in memory, and one stream of hidden
    states for each block that could go.
    """

    windows: ClassVar[int] = 8

    claim = Claim(
        says="Blocks that the loss chooses, one after the other, are missed less than those of similarity.",
        experiment=TENTH,
        metric="perplexity",
        than="influence",
    )

    def choose(self, subject: Subject, count: int) -> Choice:
        total = len(subject.parts.blocks)
        order, losses = _progress_so_far(subject)
        while len(order) < count:
            subject.progress("removing blocks", len(order), count)
            left = removal_losses(subject, [i for i in range(total) if i not in order])
            best = min(left, key=left.__getitem__)
            if not math.isfinite(left[best]):
                raise CalibrationError("the model's loss on the calibration text is NaN or infinite")
            order.append(best)
            losses.append(left[best])
            subject.work.write("removed.json", json.dumps([order, losses]).encode())
        subject.progress("removing blocks", count, count)
        return Choice(tuple(sorted(order)), {"order": order, "losses": losses})


@torch.inference_mode()
def removal_losses(subject: Subject, kept: Sequence[int]) -> dict[int, float]:
    """Mean negative log-likelihood, nats a token, of the model that has only the blocks ``kept``, less each
    one of them: by the block's index.

    One sweep: a model without block i is the whole one up to there, and a stream of its own from there on.
    """
    model, files, parts, windows = subject.model, subject.files, subject.parts, subject.windows
    dtype = fast_dtype()
    around = (*parts.embeddings, *parts.norms, *parts.others, *([parts.head] if parts.head else []))
    outside = [(name, model.get_submodule(name)) for name in around]
    for name, module in outside:
        materialize(module, name, files, dtype, check_finite=True)
    batch = batch_size(*windows.shape)
    try:
        given = capture_block_inputs(model, windows, batch=batch, parts=parts)
        whole, streams = given.hidden, dict[int, Tensor]()
        for index in kept:
            block = parts.blocks[index]
            materialize(block.module, block.name, files, dtype, check_finite=True)
            after = {
                i: _run(block.module, stream, batch, given.kwargs[index]) for i, stream in streams.items()
            }
            streams = {**after, index: whole}
            whole = _run(block.module, whole, batch, given.kwargs[index])
            release(block.module)
        return {index: _loss(subject, streams.pop(index)) for index in kept}
    finally:
        for _, module in outside:
            release(module)


def _run(module: torch.nn.Module, hidden: Tensor, batch: int, kwargs: dict[str, object]) -> Tensor:
    return torch.cat([run_block(module, part, kwargs) for part in torch.split(hidden, batch)])


def _loss(subject: Subject, hidden: Tensor) -> float:
    """Of hidden states after the last block, window by window."""
    total, parts = 0.0, subject.parts
    for states, ids in zip(hidden, subject.windows, strict=True):
        for at in range(0, len(ids) - 1, CHUNK):
            targets = ids[at + 1 : at + 1 + CHUNK]
            logits = finish(subject.model, states[None, at : at + len(targets)], parts=parts)[0]
            total += float(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum"))
    return total / (subject.windows.numel() - len(subject.windows))


def _progress_so_far(subject: Subject) -> tuple[list[int], list[float]]:
    path = subject.work.path / "removed.json"
    if not path.exists():
        return [], []
    order, losses = json.loads(path.read_text())
    return order, losses
