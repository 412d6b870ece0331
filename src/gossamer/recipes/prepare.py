"""A recipe beside a model and a text: everything that can be known to be wrong before any work starts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.errors import ModelError, RecipeError, TextError
from gossamer.matrices.atomic import check_free
from gossamer.models.manifest import is_checkpoint
from gossamer.models.place import check_layers
from gossamer.models.skeleton import WeightFiles, skeleton
from gossamer.models.sources import ModelFolder, resolve
from gossamer.models.text import Text, TextSource, check_shares, learned_tokens, read_text, tokenize
from gossamer.models.tokenizer import load_tokenizer
from gossamer.models.walk import find_parts, prunable, weight_of
from gossamer.paths import expanded
from gossamer.progress import Progress, silent
from gossamer.recipes.finetune import windows_to_tune
from gossamer.recipes.layer_shares import allocation_needs
from gossamer.recipes.load import check_context
from gossamer.recipes.recipe import Recipe
from gossamer.recipes.sample import check_prompts, exchanges, read_instructions
from gossamer.shrink import block_count
from gossamer.tune.self_data import Rewrites

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A recipe that can be applied: ``model`` and ``text`` as the stages take them, ``source`` and ``read``
    what they are, ``instructions`` those that the dense model answers anew, ``bare`` the model without
    weights, ``blocks`` how many of its blocks stay; ``reading``: the seconds that it took to cut the text
    into tokens."""

    recipe: Recipe
    model: str
    text: TextSource
    out: Path
    source: ModelFolder
    bare: PreTrainedModel
    files: WeightFiles
    read: Text
    blocks: int
    instructions: Text | None = None
    reading: float = 0.0

    @property
    def record(self) -> dict[str, Any]:
        """What the checkpoint says of its recipe: plain JSON, without times and paths."""
        return {
            "name": self.recipe.name,
            "sha256": self.recipe.sha256,
            "model": self.source.label,
            "text": self.read.label,
            "steps": self.recipe.steps,
        }


def prepare(
    recipe: Recipe,
    out: str | Path,
    *,
    model: str | Path | None = None,
    text: TextSource = None,
    progress: Progress = silent,
) -> Prepared:
    """Checks ``recipe`` against ``model``, ``text`` (None: those that it names) and the new folder ``out``.

    Nothing is written. Raises a GossamerError with a sentence: no model, or one that cannot be walked, taken
    apart or shortened so far; a text that is missing, or too short for a stage; windows longer than the
    model's context; an output that is taken.
    """
    recipe.check()
    out = Path(out)
    check_free(out)
    named = str(model) if model is not None else recipe.model
    if named is None:
        raise RecipeError(f"the recipe {recipe.name} names no model: give one")
    if is_checkpoint(expanded(named)):
        raise ModelError(f"{named} is a checkpoint already: a recipe starts from a dense model")
    named_text = [Path(one) for one in recipe.text] if isinstance(recipe.text, list) else recipe.text
    given = text if text is not None else named_text
    if given is None and _tune_reads(recipe):
        raise RecipeError(
            f"the recipe {recipe.name} tunes the whole model, for which the prose inside Python is too "
            "little: give a text"
        )
    read, instructions = read_text(given), _instructions(recipe)
    source = resolve(named, progress=progress)
    bare = skeleton(source.folder)
    parts = find_parts(bare)
    check_layers(parts)
    blocks = len(parts.blocks)
    if recipe.shrink is not None:
        blocks -= block_count(recipe.shrink.blocks, blocks)
    beside = None if recipe.tune is None else recipe.tune.chosen_beside()
    if beside is not None:
        for layer in prunable(parts.blocks[0]).values():
            out_features, width = weight_of(layer).shape
            beside.check((out_features, width))
    files = WeightFiles(source.folder)
    prepared = Prepared(recipe, named, given, out, source, bare, files, read, blocks, instructions)
    start = time.perf_counter()
    _check_windows(prepared)
    return replace(prepared, reading=time.perf_counter() - start)


def needs_text(recipe: Recipe) -> bool:
    """Whether a stage of ``recipe`` reads the text."""
    reads = _compress_reads(recipe) or recipe.shrink is not None or recipe.quantize is not None
    return reads or _tune_reads(recipe)


def _compress_reads(recipe: Recipe) -> bool:
    chosen = recipe.compress.combination()
    needs = (*recipe.compress.layer_needs(), *allocation_needs(chosen))
    return bool(needs) or recipe.compress.tune is not None


def _tune_reads(recipe: Recipe) -> bool:
    """Whether what is tuned on is the text, or begins with it."""
    return recipe.tune is not None and (recipe.sample is None or recipe.sample.rewrite is None)


def _instructions(recipe: Recipe) -> Text | None:
    if recipe.sample is None or recipe.sample.rewrite is None:
        return None
    with _told("sample"):
        return read_instructions(recipe.sample.rewrite)


def _check_windows(prepared: Prepared) -> None:
    """Every stage's windows fit the model's context, and the text has enough of them."""
    recipe, label = prepared.recipe, prepared.source.label
    drawn: dict[str, tuple[int, int]] = {}  # windows and their tokens, by stage
    if (shrink := recipe.shrink) is not None:
        drawn["shrink"] = (shrink.windows or shrink.chosen().windows, shrink.seqlen)
    if _compress_reads(recipe):
        drawn["compress"] = (recipe.compress.windows, recipe.compress.seqlen)
    if (quantize := recipe.quantize) is not None:
        drawn["quantize"] = (quantize.windows, quantize.seqlen)
    needed = {stage: seqlen for stage, (_, seqlen) in drawn.items()}
    if recipe.sample is not None and prepared.instructions is None:
        needed["sample"] = recipe.sample.prompt_tokens
    windows = needed if recipe.tune is None else {**needed, "tune": recipe.tune.seqlen}
    for stage, seqlen in windows.items():
        with _told(stage):
            check_context(prepared.bare.config, seqlen, label)
    if not windows:
        return
    tokenizer = load_tokenizer(prepared.source.folder)
    _check_instructions(prepared, tokenizer)
    if not needs_text(recipe):
        return
    tunes = recipe.tune if recipe.sample is None else None
    learned = None if tunes is None else learned_tokens(prepared.read, tokenizer)
    for stage, (count, _) in drawn.items():
        with _told(stage):
            check_shares(len(prepared.read.sources), count)
    for source in prepared.read.sources or (prepared.read,):
        known = learned if source is prepared.read else None
        tokens = len(tokenize(source, tokenizer) if known is None else known[0])
        for stage, seqlen in needed.items():
            if tokens < seqlen + 1:
                raise TextError(
                    f"{stage}: the text {source.label} has {tokens:,} tokens, but a window of {seqlen:,} "
                    f"needs {seqlen + 1:,}: give more text, or shorter windows"
                )
    if tunes is not None and learned is not None:
        with _told("tune"):
            windows_to_tune(prepared.read, learned, tunes)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """Inside, errors begin with ``where`` they were met."""
    try:
        yield
    except (ModelError, TextError) as error:
        raise type(error)(f"{where}: {error}") from None


def _check_instructions(prepared: Prepared, tokenizer: PreTrainedTokenizerBase) -> None:
    """The instructions that are answered anew fit the model's context, and are enough to tune on, answers as
    given, where every one of the model's takes as many tokens as it may."""
    settings, tune, pairs = prepared.recipe.sample, prepared.recipe.tune, prepared.instructions
    if settings is None or tune is None or pairs is None:
        return
    fewest = math.ceil(settings.tokens / settings.max_new_tokens)
    some = replace(pairs, documents=tuple(islice(cycle(pairs.documents), fewest)))
    with _told("sample"):
        check_prompts(Rewrites(exchanges(pairs), tokenizer), prepared.bare.config, settings.tokens)
    with _told(f"sample.tokens of {settings.tokens:,} may be too few"):
        windows_to_tune(some, learned_tokens(some, tokenizer), tune)
