"""What a tuning method is: it takes the compressed weights of one block and gives better ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.calibrate import Visit
from gossamer.claim import Claim
from gossamer.registry import Registry, with_options
from gossamer.tune.weights import TunedWeight


@dataclass(frozen=True)
class Outcome:
    """``before`` and ``after``: the method's loss on windows that it did not tune on (on those it did, where
    there are too few); ``tokens``: that it was shown, counted each time."""

    before: float
    after: float
    tokens: int


@dataclass
class Tuner:
    """Base of all. A tuner changes values, and never a mask: what was pruned stays zero."""

    name: ClassVar[str] = ""
    claim: ClassVar[Claim | None] = None

    def tune(self, visit: Visit, weights: dict[str, TunedWeight], seed: int) -> Outcome:
        """Tunes ``weights``, by the names of ``visit.layers``, in place. The same ``seed`` gives the same
        result, whatever ran before. Never worse than before by the outcome's loss."""
        raise NotImplementedError


TUNERS: Registry[Tuner] = Registry("tuning method", {"blockwise": "gossamer.tune.blockwise"})


def tuner(name: str, **options: Any) -> Tuner:
    """The tuner called ``name`` with its options; raises MethodError for an unknown name or option."""
    found = TUNERS[name]
    return with_options(found, options, f"the tuning method {name}")
