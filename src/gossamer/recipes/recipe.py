"""A recipe: what to make of a model in several stages, as one YAML file that is checked as a whole.

    name: mine
    shrink:   {method: angular, blocks: 0.25}       # optional
    compress: {pattern: 32:64, values: int4, tune: blockwise}
    sample:   {tokens: 200000}                      # optional; the dense model writes what is tuned on
    tune:     {losses: {kl: 1}, tokens: 1000000}    # optional; the dense model teaches
    quantize: {values: int4}                        # optional; of what was tuned in bfloat16, zeros kept

Stages run in this order; their settings are those of the functions of the same names.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from gossamer.errors import MethodError, RecipeError
from gossamer.matrices.values import value_types
from gossamer.paths import expanded
from gossamer.prune.method import Combination
from gossamer.recipes.compress_settings import CompressSettings, QuantizeSettings
from gossamer.recipes.finetune_settings import FinetuneSettings
from gossamer.recipes.sample import SampleSettings
from gossamer.recipes.settings import checked
from gossamer.recipes.shrink import ShrinkSettings
from gossamer.recipes.strict_yaml import parse_yaml
from gossamer.tune.losses import StateLoss

SHIPPED = Path(__file__).with_name("shipped")
STAGES = ("shrink", "compress", "sample", "tune", "quantize")


class Recipe(BaseModel):
    """``model`` and ``text`` may be left to whoever applies it: the dense model, and what is calibrated and
    tuned on, one text or several."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    about: str = ""
    model: str | None = None
    text: str | list[str] | None = None
    shrink: ShrinkSettings | None = None
    compress: CompressSettings
    sample: SampleSettings | None = None
    tune: FinetuneSettings | None = None
    quantize: QuantizeSettings | None = None

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that it has, in order."""
        return tuple(stage for stage in STAGES if getattr(self, stage) is not None)

    @property
    def steps(self) -> dict[str, Any]:
        """The settings of its stages, defaults included: all that is done, whatever it is done to."""
        return {stage: getattr(self, stage).model_dump() for stage in self.stages}

    @property
    def sha256(self) -> str:
        """Of `steps` as canonical JSON: recipes that do the same have the same."""
        text = json.dumps(self.steps, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def check(self) -> None:
        """Raises a GossamerError with a sentence where settings do not fit together."""
        combination = self.compress.combination()
        self.compress.tuner()
        if self.shrink is not None:
            self.shrink.chosen()
        if self.sample is not None:
            self._check_sample(self.sample)
        if self.quantize is not None:
            self._check_quantize(self.quantize)
        if self.tune is None:
            return
        if self.compress.outlier_columns() is not None:
            raise MethodError("layers with outliers apart cannot be tuned yet: leave tune or outliers out")
        self.tune.check()
        self._check_way(self.tune, combination)
        states = [one.name for one, _ in self.tune.chosen_losses() if isinstance(one, StateLoss)]
        if self.shrink is not None and states:
            raise MethodError(
                f"the loss {states[0]} pairs the blocks of model and teacher, and shrink takes some away: "
                "use losses of what comes out (kl, task)"
            )
        self._check_rounding(self.tune, any(one.is_integer for one in combination.stored))

    def _check_way(self, tune: FinetuneSettings, combination: Combination) -> None:
        """Whether the way to tune takes what compress makes."""
        kind, values = tune.weights(), tune.values or self.compress.values
        integers = {one.is_integer for one in value_types(values)}
        chosen = tune.chosen_options(combination.pattern_name)
        if kind.takes != "any" and integers != {kind.takes == "integers"}:
            raise MethodError(f"the method {tune.method} tunes {kind.takes}, and compress makes {values}")
        if kind.needs_masks and not (combination.prunes or combination.method.finds_masks):
            raise MethodError(f"the method {tune.method} moves masks, and compress prunes nothing")
        if self.shrink is not None and tune.brings_back(combination.pattern_name):
            named = (
                f"the method {tune.method}" if kind.brings_back(chosen) else "beside, which begins as lost,"
            )
            raise MethodError(
                f"{named} brings back dense weights by the names of layers, and shrink "
                "takes some away: leave one of them out"
            )

    def _check_rounding(self, tune: FinetuneSettings, integers: bool) -> None:
        """Whether integers are rounded once, whichever stage does it."""
        made = self.compress.values
        if tune.values is not None and integers:
            raise MethodError(
                f"compress makes {made}, which tune.values would round a second time: compress to bf16, or "
                "leave tune.values out"
            )
        if integers and tune.group not in (None, self.compress.group):
            raise MethodError(
                f"compress makes {made} in groups of {self.compress.group}, which groups of {tune.group} "
                "would round a second time: set compress.group, and leave tune.group out"
            )
        if tune.group is not None and tune.values is None and not integers:
            raise MethodError(f"compress makes {made}, which has no scales: leave tune.group out")

    def _check_quantize(self, quantize: QuantizeSettings) -> None:
        """Whether all weights are floats until then, each layer's one matrix."""
        quantize.compress().combination()
        quantize.compress().tuner()
        tuned = None if self.tune is None else self.tune.values
        for setting, values in (
            ("compress.values", self.compress.values),
            ("compress.head_values", self.compress.head_values),
            ("tune.values", tuned or "bfloat16"),
        ):
            if any(one.is_integer for one in value_types(values)):
                raise MethodError(
                    f"{setting} are {values}, which quantize would round a second time: set them to bf16, or "
                    "leave quantize out"
                )
        if self.tune is not None and self.tune.beside is not None:
            raise MethodError("quantize takes a layer as one matrix: leave tune.beside out")

    def _check_sample(self, sample: SampleSettings) -> None:
        sample.sampling()
        if self.tune is None:
            raise MethodError("sample lets the dense model write what tune reads, and there is no tune")
        if sample.rewrite is not None:
            return  # what is tuned on has the instructions besides
        least = self.tune.seqlen * (self.tune.held_out + self.tune.batch)
        if sample.tokens < least:
            raise MethodError(
                f"tune needs {least:,} tokens of text (held_out and batch, windows of {self.tune.seqlen}), "
                f"but sample.tokens is {sample.tokens:,}"
            )


def read_recipe(source: str | Path | Mapping[str, Any], changes: Mapping[str, Any] | None = None) -> Recipe:
    """The recipe in the file ``source``, one that ships by its name (`shipped`), or one given as a mapping.

    ``changes`` replaces settings by dotted names, such as ``{"compress.values": "int3", "tune": None}``.
    Raises RecipeError for a file that is missing or no YAML, and a GossamerError for whatever is wrong with
    its settings, alone or together.
    """
    if isinstance(source, Mapping):
        label, table = "the recipe", deepcopy(dict(source))
    else:
        path = _find(str(source))
        label = path.name
        table = _load(path)
    for name, value in (changes or {}).items():
        _change(table, name, value)
    recipe = checked(Recipe, table, f"{label}:")
    recipe.check()
    return recipe


def shipped() -> dict[str, Recipe]:
    """The recipes inside the package, by name."""
    return {path.stem: read_recipe(path) for path in sorted(SHIPPED.glob("*.yaml"))}


def parse_changes(pairs: list[str]) -> dict[str, Any]:
    """``KEY=VALUE`` pairs of a command line; values are YAML. Raises RecipeError."""
    found: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--set is written KEY=VALUE, such as compress.values=int3, got {pair!r}")
        found[key.strip()] = parse_yaml(value, f"the value of {key.strip()}")
    return found


def _find(source: str) -> Path:
    path = expanded(source)
    if path.is_file():
        return path
    inside = SHIPPED / f"{source}.yaml"
    if path.name == source and inside.is_file():
        return inside
    names = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.yaml")))
    raise RecipeError(f"there is no recipe {source!r}: name a YAML file, or one of {names}")


def _load(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read the recipe {path.name}: {error}") from error
    table = parse_yaml(text, path.name)
    if not isinstance(table, dict) or not all(isinstance(key, str) for key in table):
        raise RecipeError(f"{path.name} is no recipe: it needs name, compress and perhaps other stages")
    return table


def _change(table: dict[str, Any], name: str, value: Any) -> None:
    *above, last = name.split(".")
    for key in above:
        inner = table.get(key)
        if inner is None:
            inner = table[key] = {}
        if not isinstance(inner, dict):
            raise RecipeError(f"{name} cannot be set: {key} holds no settings")
        table = inner
    table[last] = value
