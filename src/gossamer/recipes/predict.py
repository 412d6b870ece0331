"""What a recipe will take on this machine: times from rates of one block, memory from shapes.

Times are meant to hold within a factor of two (other work on the machine and writing to disk are not in
them), memory within a half.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gossamer.bench.machine import read_bandwidth
from gossamer.bench.memory import resident_bytes
from gossamer.calibrate import Gradient, Gram, fast_dtype
from gossamer.calibrate.stream import BATCH_TOKENS
from gossamer.engine import why_not
from gossamer.models.checkpoint import sketch_of
from gossamer.models.skeleton import stored_dtype
from gossamer.models.tokenizer import encode_prompt, load_tokenizer
from gossamer.models.walk import find_parts, prunable, weight_of
from gossamer.paths import expanded
from gossamer.progress import Progress, silent
from gossamer.recipes.compress_settings import CompressSettings
from gossamer.recipes.finetune import open_to_tune, teacher_sketch
from gossamer.recipes.finetune_settings import FinetuneSettings
from gossamer.recipes.layer_shares import allocation_needs, tries
from gossamer.recipes.prepare import Prepared
from gossamer.recipes.rates import Bench, input_widths, parameters_of
from gossamer.recipes.sample import SampleSettings, exchanges
from gossamer.recipes.settings import checked
from gossamer.recipes.shrink import ShrinkSettings
from gossamer.shrink import block_count
from gossamer.tune.blockwise import Blockwise
from gossamer.tune.self_data import Rewrites

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOOKED_AT = 64  # instructions whose tokens are counted
LEFT_OVER = 4  # bytes a tuned weight of temporaries whose memory the C library keeps: 3 to 5, measured
MOST_GAINED = 4  # times the speed of one text by itself, where several are written at once (docs/figures.md)


@dataclass(frozen=True)
class StagePrediction:
    """``seconds`` and ``bytes`` (resident memory at its peak) of one stage."""

    stage: str
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Prediction:
    """Of the stages of a recipe, in order."""

    stages: tuple[StagePrediction, ...]

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    @property
    def bytes(self) -> int:
        return max(stage.bytes for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        stages = [asdict(stage) for stage in self.stages]
        return {"seconds": self.seconds, "bytes": self.bytes, "stages": stages}


def predict(prepared: Prepared) -> Prediction:
    """Times one block of the model for a few seconds, and counts."""
    recipe, blocks = prepared.recipe, prepared.blocks
    sizes = _Sizes(prepared.bare, blocks)
    found: list[StagePrediction] = []

    def add(stage: str, seconds: float, needed: int) -> None:
        found.append(StagePrediction(stage, prepared.reading + seconds, needed))

    with Bench(prepared) as bench:
        if (shrink := recipe.shrink) is not None:
            add("shrink", _shrink_seconds(bench, shrink, sizes.all_blocks), _shrink_bytes(sizes, shrink))
        compress = recipe.compress
        add("compress", _compress_seconds(bench, compress, blocks), _compress_bytes(sizes, compress))
        if recipe.sample is not None:
            add("sample", *_sample(bench, prepared, recipe.sample, sizes))
        if (tune := recipe.tune) is not None:
            pattern = compress.combination().pattern_name
            needed = _tune_bytes(sizes, tune, pattern, teacher=sizes.model(sizes.all_blocks, 1))
            add("tune", _tune_seconds(bench, tune, blocks, sizes.all_blocks), needed)
        if recipe.quantize is not None:
            quantize = recipe.quantize.compress()
            add("quantize", _compress_seconds(bench, quantize, blocks), _compress_bytes(sizes, quantize))
    return Prediction(tuple(found))


def finetune_bytes(
    checkpoint: Path, teacher: str | Path | None = None, *, progress: Progress = silent, **settings: Any
) -> int:
    """Resident memory that `finetune` will take at its peak; raises what it raises for these arguments."""
    chosen = checked(FinetuneSettings, settings)
    chosen.check()
    contents = open_to_tune(expanded(checkpoint), "none")
    bare, pattern = sketch_of(contents), contents.manifest.made.get("pattern")
    needed = any(loss.needs_teacher for loss, _ in chosen.chosen_losses())
    read = needed or chosen.brings_back(pattern)
    dense = parameters_of(teacher_sketch(contents, teacher, progress)) if read else 0
    return _tune_bytes(_Sizes(bare, len(find_parts(bare).blocks)), chosen, pattern, dense)


class _Sizes:
    """Numbers of a model of which ``blocks`` blocks stay, and what a process takes without it."""

    def __init__(self, bare: PreTrainedModel, blocks: int) -> None:
        parts, config = find_parts(bare), bare.config.get_text_config()
        block = parts.blocks[0].module
        self.base = resident_bytes()
        self.all_blocks, self.blocks = len(parts.blocks), blocks
        self.block, layers = parameters_of(block), prunable(block).values()
        self.shapes = [(out, width) for out, width in (weight_of(layer).shape for layer in layers)]
        self.linear = sum(out * features for out, features in self.shapes)
        grams = sorted(width**2 for width in input_widths(prunable(block)))
        self.grams = sum(grams)
        self.solved = sum(grams[-torch.get_num_threads() :])  # of the inputs of the layers solved at once
        self.edge = int(config.vocab_size) * int(config.hidden_size)
        self.edges = self.edge * (1 if parts.tied else 2)
        self.vocabulary, self.hidden = int(config.vocab_size), int(config.hidden_size)
        self.wide = sum(out for out, _ in self.shapes) + 6 * self.hidden  # numbers a token within a block
        self.item = fast_dtype().itemsize

    def model(self, blocks: int, item: int) -> int:
        return (self.edges + blocks * self.block) * item


def _shrink_seconds(bench: Bench, settings: ShrinkSettings, blocks: int) -> float:
    windows = settings.windows or settings.chosen().windows
    forward = bench.rates(settings.seqlen).forward * windows
    if settings.method != "loss":
        return blocks * forward
    count = block_count(settings.blocks, blocks)
    heads = bench.head() * settings.seqlen * windows
    return sum(left * left / 2 * forward + left * heads for left in range(blocks, blocks - count, -1))


def _shrink_bytes(sizes: _Sizes, settings: ShrinkSettings) -> int:
    windows = settings.windows or settings.chosen().windows
    tokens = windows * settings.seqlen if settings.method == "loss" else BATCH_TOKENS
    streams = sizes.all_blocks if settings.method == "loss" else 2
    held = sizes.edges + sizes.block + streams * tokens * sizes.hidden + BATCH_TOKENS * sizes.wide
    return sizes.base + held * sizes.item


def _compress_seconds(bench: Bench, settings: CompressSettings, blocks: int) -> float:
    chosen, tuner, rates = settings.combination(), settings.tuner(), bench.rates(settings.seqlen)
    tokens, forward = settings.windows * settings.seqlen, rates.forward * settings.windows
    shares, solve = allocation_needs(chosen), bench.solve()
    block = solve + 2 * forward * bool(tuner)
    for needs in (settings.layer_needs(), shares):  # each a walk of its own
        if any(kind.passes == "streaming" for kind in needs):
            block += 2 * forward + tokens * bench.statistics(needs)
    if Gradient in (*chosen.method.needs, *shares):
        block += forward + settings.windows * rates.backward
    if chosen.allocation == "sensitivity":
        block += tries(chosen) * solve
    if isinstance(tuner, Blockwise):
        held = tuner.held_out * settings.windows
        block += tuner.epochs * (settings.windows - held) * (rates.backward + rates.update)
        block += (tuner.epochs + 1) * held * rates.forward
    return blocks * block


def _compress_bytes(sizes: _Sizes, settings: CompressSettings) -> int:
    """The larger of two moments: a block is solved (and tuned), the embedding is packed."""
    activations = BATCH_TOKENS * (2 * sizes.hidden + sizes.wide) * sizes.item
    block = sizes.block * sizes.item + 16 * sizes.linear + activations
    combination = settings.combination()
    needs = (*combination.method.needs, *allocation_needs(combination))
    if Gram in needs:  # and two matrices, derived from one while layers that read it are solved
        block += 4 * (sizes.grams + 2 * sizes.solved)
    if Gradient in needs:  # sums of one block; what a window leaves for the way back, and its logits
        back = 2 * settings.seqlen * sizes.wide * sizes.item
        block = max(block, (sizes.block + sizes.linear) * sizes.item + 8 * sizes.linear + back)
    if settings.tune is not None:  # latents, gradients, two moments, the best so far, weights made
        block += 28 * sizes.linear + 2 * settings.seqlen * sizes.wide * 4
    before = sizes.edges * sizes.item + activations
    packing = 4 * sizes.edge * 4
    return sizes.base + max(block, before, packing)


def _sample(bench: Bench, prepared: Prepared, settings: SampleSettings, sizes: _Sizes) -> tuple[float, int]:
    """Seconds and bytes. All weights are read for every token, by the native decoder once for several texts;
    it has a copy of its own, of numbers that are bfloat16 or float32."""
    name, parameter = next(iter(prepared.bare.named_parameters()))
    stored = {
        "auto": stored_dtype(parameter, name, prepared.files),
        "fast": fast_dtype(),
    }.get(settings.dtype) or getattr(torch, settings.dtype)
    native = why_not(prepared.bare) is None
    item = stored.itemsize if stored == torch.bfloat16 or not native else torch.float32.itemsize
    held = sizes.model(sizes.all_blocks, item)
    gain = min(settings.together, MOST_GAINED) if native else 1
    loaded = sizes.model(sizes.all_blocks, stored.itemsize)
    seconds = settings.tokens * held / read_bandwidth() / gain
    if prepared.instructions is not None:
        asked, answered = _lengths(prepared, settings.max_new_tokens)
        read = bench.rates(round(asked)).forward * sizes.all_blocks
        seconds += settings.tokens / answered * read
    return seconds, sizes.base + loaded + 2 * held


def _lengths(prepared: Prepared, most: int) -> tuple[float, float]:
    """Mean tokens of the prompts that have instructions answered anew, and of the answers, were they as long
    as those given and ``most`` at most: of a few of them, evenly over the file."""
    assert prepared.instructions is not None
    tokenizer = load_tokenizer(prepared.source.folder)
    pairs = exchanges(prepared.instructions)
    some = pairs[:: math.ceil(len(pairs) / LOOKED_AT)]
    prompts, count = Rewrites(some, tokenizer), len(some)
    answers = [encode_prompt(tokenizer, pair.response, chat=False) for pair in some]
    asked = sum(len(prompts.prompt(index)) for index in range(count)) / count
    return asked, max(1.0, sum(min(most, len(answer)) for answer in answers) / count)


def _tune_seconds(bench: Bench, settings: FinetuneSettings, blocks: int, teacher_blocks: int) -> float:
    """The student's steps, the teacher's forwards and four products with the head, by the token budget; and
    held-out windows, which nothing is learned from."""
    rates = bench.rates(settings.seqlen, settings.micro)
    teacher = any(loss.needs_teacher for loss, _ in settings.chosen_losses())
    head = bench.head() * settings.seqlen * settings.micro
    part = blocks * rates.backward + teacher * (teacher_blocks * rates.forward + head) + 3 * head
    part += blocks * rates.update * settings.micro / settings.batch
    judged = (blocks + teacher * teacher_blocks) * rates.forward + (1 + teacher) * head
    loop = settings.loop()
    found = []
    if loop.tokens is not None:
        found.append(loop.tokens / settings.seqlen / settings.micro * part)
    if loop.minutes is not None:
        found.append(60 * loop.minutes)
    return min(found) + (settings.evaluations + 1) * settings.held_out / settings.micro * judged


def _tune_bytes(sizes: _Sizes, settings: FinetuneSettings, pattern: str | None, teacher: int) -> int:
    """All weights under tuning and those made of them, the model, the dense ones that are read beside it, and
    what backward keeps."""
    tokens, item = settings.seqlen * settings.micro, settings.dtype().itemsize
    depth = 2 if settings.gradient_checkpointing else sizes.blocks
    kept = tokens * (depth * sizes.wide * item * 2 + sizes.blocks * sizes.hidden * item)
    options = settings.chosen_options(pattern)
    state = sum(settings.weights().state_bytes(shape, options) for shape in sizes.shapes)
    tuned = int(sizes.blocks * (state + sizes.linear * (item + LEFT_OVER)))
    models = sizes.model(sizes.blocks, item)
    if any(loss.needs_teacher for loss, _ in settings.chosen_losses()):
        models += teacher * item
    if settings.brings_back(pattern):
        models += teacher * torch.float32.itemsize
    logits = 4 * 4 * min(tokens, 256) * sizes.vocabulary
    return sizes.base + tuned + models + kept + logits + sizes.edge * item
