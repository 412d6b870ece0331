"""The walk: one block in memory at a time, its inputs summed into statistics, its outputs the next inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.calibrate.inputs import InputSums, Statistics, summed
from gossamer.calibrate.statistics import Statistic
from gossamer.calibrate.work import Inputs, WorkFolder
from gossamer.errors import CalibrationError
from gossamer.models.skeleton import WeightFiles, materialize, read_parameter, release
from gossamer.models.walk import (
    ModelParts,
    each_block_inputs,
    find_parts,
    head_inputs,
    prunable,
    run_block,
    set_weight,
)
from gossamer.nn.experts import inside_experts
from gossamer.nn.views import is_conv1d, linear_view
from gossamer.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = 2048  # tokens a forward pass: products near full speed, activations still in cache


@dataclass(frozen=True)
class Calls:
    """How a block is called on one of the calibration windows: on its ``inputs``, with the other arguments
    ``kwargs``; ``targets``: what the dense block gives in the dense model."""

    inputs: Inputs
    targets: Inputs
    kwargs: dict[str, Any]


@dataclass
class Visit:
    """One block on the walk. ``layers`` maps full names to its prunable modules; ``statistics`` holds
    what their inputs were. Weights put in by :meth:`replace` are what the next blocks see. ``calls``: how
    it is run, where the walk was asked for it."""

    index: int
    name: str
    module: nn.Module
    layers: dict[str, nn.Module]
    files: WeightFiles
    statistics: dict[str, dict[type[Statistic], Statistic]] = field(default_factory=dict)
    calls: Calls | None = None

    def weight(self, name: str) -> Tensor:
        """The layer's own weight, float32 ``(out, in)``, whatever type the walk multiplies in."""
        layer = self.layers[name]
        assert isinstance(layer.weight, Tensor)
        weight = read_parameter(layer.weight, f"{name}.weight", self.files, torch.float32)
        return weight.T.contiguous() if is_conv1d(layer) else weight

    def replace(self, name: str, weight: Tensor) -> None:
        """Puts ``weight`` ``(out, in)`` into the layer for the rest of the walk."""
        set_weight(self.layers[name], weight)


def fast_dtype() -> torch.dtype:
    """bfloat16 where the machine multiplies it fast (AVX-512 BF16, AMX), else float32."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)()
    return torch.bfloat16 if supported and torch.cpu._is_avx512_bf16_supported() else torch.float32


def walk(
    model: PreTrainedModel,
    files: WeightFiles,
    needs: tuple[type[Statistic], ...],
    work: WorkFolder,
    *,
    windows: Tensor | None = None,
    targets: bool = False,
    unchanged: bool = False,
    head: tuple[type[Statistic], ...] = (),
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
    stage: str = "blocks",
) -> Iterator[Visit]:
    """Visits each decoder block from ``work.next_block`` on, with statistics of ``needs``, and with ``head``
    at last the model's head, with those statistics of what it reads behind the blocks as they were left.

    ``model`` is a skeleton on the meta device; ``windows`` are token ids ``(windows, seqlen)``, and may
    be None only where nothing is needed. With ``targets`` the dense model's hidden states are kept beside,
    and each visit has its ``calls``; ``unchanged`` with it says that the caller leaves the weights as they
    are, so that a block's outputs are the next one's inputs and it runs once. When the caller asks for the
    next visit, the block runs again with the weights it was left with, and the work folder notes it as done:
    write results before that.
    Raises CalibrationError where inputs are not finite, and ModelError where blocks are called with more of
    the text than its hidden states.
    """
    parts = find_parts(model)
    total = len(parts.blocks)
    if not (needs or targets or head):
        for index in range(work.next_block, total):
            block = parts.blocks[index]
            progress(stage, index, total)
            yield _visit(index, block.name, block.module, files)
            work.block_done(index)
        progress(stage, total, total)
        return
    if windows is None:
        raise CalibrationError("this method needs calibration text, and there is none")
    dtype = dtype or fast_dtype()
    batch = batch_size(len(windows), windows.shape[1])
    with outside_blocks(model, parts, files, dtype):
        one: tuple[dict[str, Any], ...] = ()
        if targets:  # of every window, since each is tuned on by itself
            for given in each_block_inputs(model, windows, parts=parts):
                one = given.kwargs
        batches = each_block_inputs(model, windows, batch=batch, parts=parts)
        first = next(batches)
        if head:  # or says now, and not behind the last block, that it cannot be seen
            head_inputs(model, first.hidden[:1], parts=parts)
        shape = (*windows.shape, first.hidden.shape[-1])
        if work.next_block == 0:
            states = (given.hidden for given in chain([first], batches))
            work.block_done(-1, inputs=Inputs(work.inputs_file(0), shape, dtype).written(states))
    for index in range(work.next_block, total):
        block = parts.blocks[index]
        progress(stage, index, total)
        call = first.kwargs[index]
        inputs = work.open_inputs(shape, dtype)
        materialize(block.module, block.name, files, dtype, check_finite=True)
        visit = _visit(index, block.name, block.module, files)
        dense = None
        if targets:
            before = work.open_inputs(shape, dtype, "dense") if index and not unchanged else inputs
            stream = "inputs" if unchanged else "dense"
            dense = Inputs(work.inputs_file(index + 1, stream), shape, dtype)
            visit.calls = Calls(inputs, dense.written(_run(block.module, before, batch, call)), one[index])
        if needs:
            visit.statistics = _collect(visit, needs, inputs, batch, call)
        yield visit
        following = None
        if unchanged:
            following, dense = dense, None
        elif index + 1 < total or head:
            outputs = _run(block.module, inputs, batch, call)
            following = Inputs(work.inputs_file(index + 1), shape, dtype).written(outputs)
        release(block.module)
        work.block_done(index, inputs=following, dense=dense)
    progress(stage, total, total)
    if head:
        with outside_blocks(model, parts, files, dtype):
            visit = _visit_head(model, parts, files, work.open_inputs(shape, dtype), head, batch)
        yield visit


def batch_size(windows: int, seqlen: int) -> int:
    """Windows that run together: about BATCH_TOKENS tokens, and a divisor of ``windows``, so that what a
    model prepares for one batch fits all."""
    most = max(1, BATCH_TOKENS // seqlen)
    return max(size for size in range(1, min(most, windows) + 1) if windows % size == 0)


@contextmanager
def outside_blocks(
    model: PreTrainedModel,
    parts: ModelParts,
    files: WeightFiles,
    dtype: torch.dtype,
    *,
    head: bool = False,
) -> Iterator[None]:
    """Embeddings, norms and projections outside the blocks (and the head) are in memory within, and only
    there."""
    names = [*parts.embeddings, *parts.norms, *parts.others]
    if head and parts.head is not None:
        names.append(parts.head)
    outside = [model.get_submodule(name) for name in names]
    for name, module in zip(names, outside, strict=True):
        materialize(module, name, files, dtype, check_finite=True)
    try:
        yield
    finally:
        for module in outside:
            release(module)


@torch.inference_mode()
def _run(module: nn.Module, inputs: Inputs, batch: int, kwargs: dict[str, Any]) -> Iterator[Tensor]:
    for at in range(0, inputs.shape[0], batch):
        yield run_block(module, inputs.read(at, at + batch), kwargs)


def _visit(index: int, name: str, module: nn.Module, files: WeightFiles) -> Visit:
    layers = {f"{name}.{inner}": layer for inner, layer in prunable(module).items()}
    return Visit(index, name, module, layers, files)


def _visit_head(
    model: PreTrainedModel,
    parts: ModelParts,
    files: WeightFiles,
    inputs: Inputs,
    needs: tuple[type[Statistic], ...],
    batch: int,
) -> Visit:
    """The head as what follows the last block, whose outputs are ``inputs``."""
    assert parts.head is not None
    name, module = parts.head, model.get_submodule(parts.head)
    sums = InputSums([linear_view(name, module)], needs)
    for at in range(0, inputs.shape[0], batch):
        sums.see(module, (head_inputs(model, inputs.read(at, at + batch), parts=parts),))
        sums.next_batch()
    return Visit(len(parts.blocks), name, module, {name: module}, files, sums.finish())


def _collect(
    visit: Visit,
    needs: tuple[type[Statistic], ...],
    inputs: Inputs,
    batch: int,
    kwargs: dict[str, Any],
) -> dict[str, dict[type[Statistic], Statistic]]:
    """Runs the block over its inputs and sums up what each layer reads."""
    views = [linear_view(name, layer) for name, layer in visit.layers.items()]

    def walked(share: bool) -> dict[str, Statistics]:
        sums = InputSums(views, needs, spare=inside_experts(visit.module), share=share)
        handles = [layer.register_forward_pre_hook(sums.see) for layer in visit.layers.values()]
        try:
            for _ in _run(visit.module, inputs, batch, kwargs):
                sums.next_batch()
        finally:
            for handle in handles:
                handle.remove()
        return sums.finish()

    return summed(walked)
