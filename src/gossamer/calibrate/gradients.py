"""Gradients of the language model's loss, one block in memory at a time: forward once, then back.

On the way forward the hidden states between blocks are kept on disk; on the way back each block runs again on
what it read, window by window, and hands the gradient of its inputs on to the block before. In memory: one
block, the activations of one window in it, and its sums (as many float32 as it has weights, twice). On disk:
blocks x windows x seqlen x hidden numbers of the walk's dtype, freed block by block on the way back, and the
sums, 8 bytes a weight.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.calibrate.statistics import Gram, Statistic
from gossamer.calibrate.stream import fast_dtype, outside_blocks
from gossamer.calibrate.work import Inputs, WorkFolder
from gossamer.errors import CalibrationError, OutputError
from gossamer.models.skeleton import WeightFiles, materialize, release
from gossamer.models.walk import (
    Block,
    ModelParts,
    each_block_inputs,
    find_parts,
    finish,
    prunable,
    run_block,
    weight_of,
)
from gossamer.nn.experts import inside_experts
from gossamer.nn.views import is_conv1d
from gossamer.progress import Progress, silent

if TYPE_CHECKING:
    from transformers import PreTrainedModel

POSITIONS = 256  # positions whose logits and their gradients are in memory at once


class Gradient(Statistic):
    """Of the mean loss over the next tokens of a window: ``mean``, the absolute value of the weight's
    gradient averaged over windows, and ``squares``, the average of its square, float32 ``(out, in)``;
    ``outputs``, the squared gradient of each output, summed over tokens and averaged over windows, float32
    ``(out,)``, or None where outputs were not seen. ``reached``: whether any token came by; else it is that
    of `unreached`."""

    name = "gradient"
    passes = "gradient"
    averaged: ClassVar[str] = "absolute"

    def __init__(
        self, mean: Tensor, squares: Tensor, outputs: Tensor | None = None, reached: bool = True
    ) -> None:
        super().__init__(mean.shape[1])
        self.mean, self.squares, self.outputs, self.reached = mean, squares, outputs, reached

    @classmethod
    def unreached(cls, beside: Sequence[Gradient]) -> Gradient:
        """That of an expert's layer that no token reached: the same for all its weights, so that they alone
        decide, and as large as in the experts ``beside`` it on average, so that it competes with others."""

        def level(parts: Sequence[Tensor]) -> Tensor:
            size = torch.stack([part.abs().mean() for part in parts]).mean()
            return torch.full_like(parts[0], float(size))

        mean, squares = level([one.mean for one in beside]), level([one.squares for one in beside])
        outputs = level([one.outputs for one in beside if one.outputs is not None])
        return cls(mean, squares, outputs, reached=False)

    def squared_outputs(self, gram: Gram) -> Tensor:
        """``outputs``; where they were not seen, what the weights' gradients say of them, ``gram`` of the
        layer's inputs: tokens taken as independent, the squared gradients of an output's weights sum up to
        that of the output times the squared length of an input (the factors of K-FAC, Martens & Grosse
        2015)."""
        if self.outputs is not None:
            return self.outputs
        length = gram.matrix.diagonal().sum() / gram.tokens
        return (self.squares.double().sum(dim=1) / length).float()

    def select(self, inputs: Tensor) -> Gradient:
        return type(self)(self.mean[:, inputs], self.squares[:, inputs], self.outputs, self.reached)

    @staticmethod
    def of_window(gradient: Tensor) -> Tensor:
        """What ``mean`` averages of the gradient of one window."""
        return gradient.abs()

    def to_bytes(self) -> bytes:
        assert self.outputs is not None
        parts = (self.mean, self.squares, self.outputs, torch.tensor([float(self.reached)]))
        data = b"".join(part.numpy().tobytes() for part in parts)
        return data + zlib.crc32(data).to_bytes(4, "little")

    @classmethod
    def read(cls, path: Path, shape: tuple[int, int]) -> Gradient:
        """What `gather` left for a layer of ``shape`` (out, in) at ``gradient_file``; raises OutputError."""
        out, features = shape
        lengths = [out * features, out * features, out, 1]
        try:
            data = path.read_bytes()
        except OSError as error:
            raise OutputError(
                f"{path.name} vanished from {path.parent.name}; delete that to make it anew"
            ) from error
        whole, crc = memoryview(data)[:-4], int.from_bytes(data[-4:], "little")
        if len(whole) != 4 * sum(lengths) or zlib.crc32(whole) != crc:
            raise OutputError(f"{path.name} is damaged; delete {path.parent.name}")
        numbers = torch.frombuffer(bytearray(whole), dtype=torch.float32)
        mean, squares, outputs, reached = torch.split(numbers, lengths)
        return cls(mean.reshape(shape), squares.reshape(shape), outputs, bool(reached))


class SignedGradient(Gradient):
    """A `Gradient` whose ``mean`` is that of the gradient itself, so that windows may cancel out. A method
    names it in ``needs`` beside `Gradient`, and finds it there."""

    name = "signed_gradient"
    averaged = "signed"

    @staticmethod
    def of_window(gradient: Tensor) -> Tensor:
        return gradient


def gradient_kind(needs: Iterable[type[Statistic]]) -> type[Gradient]:
    """What a gradient pass for ``needs`` gathers."""
    return SignedGradient if SignedGradient in needs else Gradient


def gradient_file(work: WorkFolder, name: str) -> Path:
    """Where the gradients of the layer ``name`` lie."""
    return work.path / f"{name}.gradient"


def gather(
    model: PreTrainedModel,
    files: WeightFiles,
    work: WorkFolder,
    windows: Tensor,
    *,
    kind: type[Gradient] = Gradient,
    dtype: torch.dtype | None = None,
    progress: Progress = silent,
) -> None:
    """Leaves a `Gradient` of this ``kind`` of every prunable layer of the skeleton ``model`` at
    `gradient_file`.

    ``windows``: token ids ``(windows, seqlen)``, seqlen >= 2. ``work`` is a folder of its own; a call that
    was interrupted goes on with the block where it stopped, and one that was finished returns at once.
    Raises CalibrationError where gradients are not finite, or a layer that is no expert's was reached by no
    window.
    """
    if windows.shape[1] < 2:
        raise CalibrationError("gradients need windows of at least 2 tokens: one of them must be foretold")
    _Pass(model, files, work, windows, kind, dtype or fast_dtype(), progress).run()
    for rest in work.path.glob("*.states"):  # the gradient of the first block's inputs: nobody reads it
        rest.unlink(missing_ok=True)


class _Pass:
    """Steps 0 to n - 1: the n blocks forward; n: the loss; n + 1 to 2 n: the blocks backward."""

    def __init__(
        self,
        model: PreTrainedModel,
        files: WeightFiles,
        work: WorkFolder,
        windows: Tensor,
        kind: type[Gradient],
        dtype: torch.dtype,
        progress: Progress,
    ) -> None:
        self.model, self.files, self.work, self.windows = model, files, work, windows
        self.kind, self.dtype, self.progress = kind, dtype, progress
        self.parts: ModelParts = find_parts(model)
        self.streams: dict[str, Inputs] = {}

    def run(self) -> None:
        count = len(self.parts.blocks)
        if self.work.next_block > 2 * count:
            return
        with outside_blocks(self.model, self.parts, self.files, self.dtype):
            each = each_block_inputs(self.model, self.windows, parts=self.parts)
            first = next(each)
            self.kwargs, self.shape = first.kwargs, (*self.windows.shape, first.hidden.shape[-1])
            if self.work.next_block == 0:
                self._done(-1, "hidden0", (given.hidden for given in chain([first], each)))
        for step in range(self.work.next_block, 2 * count + 1):
            self.progress("gradients", step, 2 * count + 1)
            if step < count:
                with self._in_memory(self.parts.blocks[step]) as module:
                    self._done(step, f"hidden{step + 1}", self._forward(module, step))
            elif step == count:
                with outside_blocks(self.model, self.parts, self.files, self.dtype, head=True):
                    self._done(step, f"gradient{count}", self._of_loss(), drop=[f"hidden{count}"])
            else:
                index = 2 * count - step
                with self._in_memory(self.parts.blocks[index]) as module:
                    gone = [f"hidden{index}", f"gradient{index + 1}"]
                    self._done(step, f"gradient{index}", self._backward(module, index), drop=gone)
        self.progress("gradients", 2 * count + 1, 2 * count + 1)

    def _open(self, stream: str) -> Inputs:
        """What lies in a stream; its checksum is compared once, by the run that finds it there."""
        if stream not in self.streams:
            path = self.work.path / f"{stream}.states"
            self.streams[stream] = self.work.checked(path, stream, self.shape, self.dtype)
        return self.streams[stream]

    def _done(self, step: int, stream: str, parts: Iterator[Tensor], drop: list[str] | None = None) -> None:
        """Writes a stream; then the step is done, and the streams ``drop`` are of no more use."""
        known = {name: self._open(name) for name in self.work.streams()}
        known[stream] = Inputs(self.work.path / f"{stream}.states", self.shape, self.dtype).written(parts)
        gone = [known.pop(name) for name in drop or ()]
        self.streams = known
        self.work.block_done(step, **known)
        for inputs in gone:
            inputs.path.unlink(missing_ok=True)

    @contextmanager
    def _in_memory(self, block: Block) -> Iterator[nn.Module]:
        materialize(block.module, block.name, self.files, self.dtype, check_finite=True)
        try:
            yield block.module
        finally:
            release(block.module)

    @torch.no_grad()
    def _forward(self, module: nn.Module, index: int) -> Iterator[Tensor]:
        inputs = self._open(f"hidden{index}")
        for at in range(self.shape[0]):
            yield run_block(module, inputs.read(at, at + 1), self.kwargs[index])

    def _of_loss(self) -> Iterator[Tensor]:
        """The gradient of each window's mean loss over its next tokens, by what the last block gave."""
        states = self._open(f"hidden{len(self.parts.blocks)}")
        last = self.shape[1] - 1
        for at, ids in enumerate(self.windows):
            hidden = states.read(at, at + 1)
            found = torch.zeros_like(hidden)
            for start in range(0, last, POSITIONS):
                stop = min(start + POSITIONS, last)
                piece = hidden[:, start:stop].clone().requires_grad_()
                with torch.enable_grad():
                    logits = finish(self.model, piece, parts=self.parts, gradients=True)
                    loss = nn.functional.cross_entropy(
                        logits[0].float(), ids[start + 1 : stop + 1], reduction="sum"
                    )
                found[:, start:stop] = torch.autograd.grad(loss / last, piece)[0]
            if not torch.isfinite(found).all():
                raise CalibrationError(f"the gradient of the loss is not finite in calibration window {at}")
            yield found

    def _backward(self, module: nn.Module, index: int) -> Iterator[Tensor]:
        """Gradients of the block's inputs window by window, and at the end those of its layers in files."""
        inputs, above = self._open(f"hidden{index}"), self._open(f"gradient{index + 1}")
        layers = prunable(module)
        sums = {name: _Sums(layer, self.kind) for name, layer in layers.items()}
        handles = [layer.register_forward_hook(sums[name].see) for name, layer in layers.items()]
        try:
            for at in range(self.shape[0]):
                with torch.enable_grad():
                    hidden = inputs.read(at, at + 1).requires_grad_()
                    out = run_block(module, hidden, self.kwargs[index])
                used = [s for s in sums.values() if s.given]
                wanted = [hidden, *(s.weight for s in used), *(one for s in used for one in s.given)]
                found = torch.autograd.grad(out, wanted, above.read(at, at + 1), allow_unused=True)
                outputs = iter(found[1 + len(used) :])
                for s, weight in zip(used, found[1:], strict=False):
                    s.add(weight, [next(outputs) for _ in s.given])
                yield found[0]
        finally:
            for handle in handles:
                handle.remove()
        holders = inside_experts(module)
        alike: dict[tuple[nn.Module, str], list[Gradient]] = {}  # of experts side by side
        ordered = sorted(sums.items(), key=lambda item: item[1].windows == 0)  # those reached first
        for name, s in ordered:
            full = f"{self.parts.blocks[index].name}.{name}"
            holder = holders.get(layers[name])
            beside = [] if holder is None else alike.setdefault((holder, name.rpartition(".")[2]), [])
            if s.windows or not beside:
                statistic = s.finish(full, self.shape[0])
                beside.append(statistic)
            else:
                statistic = self.kind.unreached(beside)
            self.work.write(gradient_file(self.work, full).name, statistic.to_bytes())


class _Sums:
    """Sums over windows for one layer; ``given``: what it gave in the window at hand, call by call."""

    def __init__(self, layer: nn.Module, kind: type[Gradient]) -> None:
        assert isinstance(layer.weight, Tensor)
        self.kind, self.weight, self.turned = kind, layer.weight, is_conv1d(layer)
        shape = weight_of(layer).shape
        self.mean, self.squares = torch.zeros(shape), torch.zeros(shape)
        self.outputs = torch.zeros(shape[0])
        self.given: list[Tensor] = []
        self.windows = 0

    def see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.given.append(output)

    def add(self, weight: Tensor | None, outputs: Sequence[Tensor | None]) -> None:
        self.given = []
        if weight is None:
            return
        gradient = (weight.T if self.turned else weight).float()
        self.mean.add_(self.kind.of_window(gradient))
        self.squares.addcmul_(gradient, gradient)
        for output in outputs:
            if output is not None:
                self.outputs += output.float().reshape(-1, len(self.outputs)).square().sum(dim=0)
        self.windows += 1

    def finish(self, name: str, windows: int) -> Gradient:
        if self.windows == 0:
            raise CalibrationError(f"{name}: no calibration input reached this layer")
        found = self.kind(self.mean.div_(windows), self.squares.div_(windows), self.outputs.div_(windows))
        if not torch.isfinite(found.squares).all():
            raise CalibrationError(f"{name}: its gradients are not finite: NaN or infinite weights after it?")
        return found
