"""The methods as data: what each needs and accepts, its paper, and what that claims."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from importlib import import_module
from inspect import signature
from typing import Any

from gossamer.claim import Claim, Unclaimed
from gossamer.dynamic.activations import METHODS as ACTIVATIONS
from gossamer.dynamic.attention import POLICIES
from gossamer.dynamic.cache import CACHES
from gossamer.prune import ALIASES, FORMATS, METHODS
from gossamer.recipes.modules import MODULES
from gossamer.registry import Registry
from gossamer.shrink import DEPTH
from gossamer.sparse import NM, Block, Channel, Unstructured
from gossamer.sparse.allocate import ALLOCATIONS
from gossamer.tune import TUNERS, WEIGHTS
from gossamer.tune.losses import LOSSES
from gossamer.tune.self_data import PROMPTS

FAMILIES: dict[str, Registry[Any]] = {
    "prune": METHODS,
    "allocation": ALLOCATIONS,
    "format": FORMATS,
    "shrink": DEPTH,
    "tune": TUNERS,
    "finetune": WEIGHTS,
    "loss": LOSSES,
    "text": PROMPTS,
    "module": MODULES,
    "activations": ACTIVATIONS,
    "attention": POLICIES,
    "cache": CACHES,
}
WITHOUT_CLAIM = (
    "gossamer.evaluate.drop_point",
    "gossamer.matrices.compose",
    "gossamer.dynamic.activations.natural",
    "gossamer.dynamic.activations.orthogonal",
    "gossamer.dynamic.activations.sirius",
    "gossamer.dynamic.attention.seer",
    "gossamer.dynamic.attention.label_blocks",
    "gossamer.dynamic.cache.quantize",
    "gossamer.dynamic.cache.key_basis",
    "gossamer.dynamic.activations.ppl_p",
    "gossamer.evaluate.layer_error",
    "gossamer.evaluate.confidence",
    "gossamer.evaluate.probes",
    "gossamer.evaluate.task_scores",
    "gossamer.evaluate.bootstrap",
    "gossamer.models.sampling",
)
"""Modules of what is published and in no family; their ``UNCLAIMED`` says what it is."""
_WORDS = {Unstructured: "unstructured", NM: "N:M", Block: "RxC blocks", Channel: "channels"}


@dataclass(frozen=True)
class MethodFacts:
    """One method. ``aliases``: its other names; ``family``: ``prune`` (weights, once), ``allocation`` (how
    the sparsity is shared out over layers), ``format`` (how kept weights are stored), ``shrink`` (whole
    blocks), ``tune`` (what was kept, a block at a time), ``finetune`` (which weights of a checkpoint move),
    ``loss`` (what they are drawn to), ``text`` (what they are tuned on), ``module`` (recipes for PyTorch
    modules), ``activations`` (inputs, at run
    time), ``attention`` (keys, at run time) or ``cache`` (how keys and values are kept);
    ``options``: what ``--option`` and its like may set, with defaults (None: chosen by what there is);
    ``needs``: what is calibrated, none for methods without data; ``patterns``: those it accepts, or what
    it drops, looks at or keeps; ``comparison_group``: what plain "unstructured" means, or where scores
    compete.
    """

    name: str
    aliases: tuple[str, ...]
    family: str
    says: str
    needs: tuple[str, ...]
    patterns: tuple[str, ...]
    comparison_group: str
    cite: str
    claim: Claim | None
    options: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def methods() -> list[MethodFacts]:
    """All methods, by family and name."""
    found = []
    for name in METHODS:
        pruning = METHODS[name]
        needs = tuple(kind.__name__ for kind in pruning.needs)
        patterns = tuple(_WORDS[kind] for kind in pruning.accepts)
        aliases = tuple(sorted(alias for alias, meant in ALIASES.items() if meant == name))
        group = pruning.comparison_group
        found.append(_facts("prune", name, needs, patterns, group, aliases))
    for name in ALLOCATIONS:
        shares = ALLOCATIONS[name]
        found.append(_facts("allocation", name, shares.needs, shares.accepts, shares.group))
    for name in FORMATS:
        needs = tuple(kind.__name__ for kind in FORMATS[name].needs)
        found.append(_facts("format", name, needs, ("any, and dense",), "layer"))
    for name in DEPTH:
        found.append(_facts("shrink", name, ("calibration text",), ("blocks",), "model"))
    for name in TUNERS:
        found.append(_facts("tune", name, ("calibration text",), ("any, and dense",), "block"))
    for name in WEIGHTS:
        found.append(_facts("finetune", name, ("text",), (WEIGHTS[name].accepts,), "model"))
    for name in LOSSES:
        teacher = ("text", "teacher") if LOSSES[name].needs_teacher else ("text",)
        found.append(_facts("loss", name, teacher, ("any, and dense",), "model"))
    for name in PROMPTS:
        found.append(_facts("text", name, ("prompts", "teacher"), ("any, and dense",), "model"))
    for name in MODULES:
        found.append(_facts("module", name, MODULES[name].needs, MODULES[name].accepts, "model"))
    for name in ACTIVATIONS:
        gating = ACTIVATIONS[name]
        thresholds = gating.selection == "threshold"
        needs, within = (("Quantiles",), "layer") if thresholds else ((), "token")
        found.append(_facts("activations", name, needs, (gating.gates,), within))
    for name in POLICIES:
        found.append(_facts("attention", name, POLICIES[name].needs, ("blocks of keys",), "block of queries"))
    for name in CACHES:
        caching = CACHES[name]
        found.append(_facts("cache", name, caching.needs, (caching.keeps,), caching.reads))
    return found


def without_claim() -> list[Unclaimed]:
    """What is published beside the methods of the families, and why no claim of it runs."""
    return [import_module(module).UNCLAIMED for module in WITHOUT_CLAIM]


def _facts(
    family: str,
    name: str,
    needs: tuple[str, ...],
    patterns: tuple[str, ...],
    within: str,
    aliases: tuple[str, ...] = (),
) -> MethodFacts:
    registry = FAMILIES[family]
    paragraph = " ".join((registry[name].__doc__ or "").partition("\n\n")[0].split())
    says = re.split(r"(?<=[.])(?<!al[.])\s", paragraph)[0]  # its first sentence
    cite, claim = registry.citations[name], getattr(registry[name], "claim", None)
    options = {} if family in ("format", "text") else _options(registry[name])
    return MethodFacts(name, aliases, family, says, needs, patterns, within, cite, claim, options)


def _options(method: type[Any]) -> dict[str, Any]:
    """Names and defaults of what may be set of a method."""
    parameters = signature(getattr(method, "Options", method)).parameters.values()
    plain = (bool, int, float, str, tuple, type(None))
    return {one.name: one.default for one in parameters if isinstance(one.default, plain)}
