"""The methods as data: what each needs and accepts, its paper, and what that claims."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gossamer.dynamic.activations import METHODS as ACTIVATIONS
from gossamer.dynamic.attention import POLICIES
from gossamer.dynamic.cache import CACHES
from gossamer.prune import ALIASES, METHODS, Claim
from gossamer.sparse import NM, Block, Channel, Unstructured

_WORDS = {Unstructured: "unstructured", NM: "N:M", Block: "RxC blocks", Channel: "channels"}


@dataclass(frozen=True)
class MethodFacts:
    """One method. ``aliases``: its other names; ``family``: ``prune`` (weights, once), ``activations``
    (inputs, at run time), ``attention`` (keys, at run time) or ``cache`` (how keys and values are kept);
    ``needs``: what is calibrated, none for methods without data; ``patterns``: those it accepts, or what it
    drops, looks at or keeps; ``comparison_group``: what plain "unstructured" means, or
    where scores compete."""

    name: str
    aliases: tuple[str, ...]
    family: str
    says: str
    needs: tuple[str, ...]
    patterns: tuple[str, ...]
    comparison_group: str
    cite: str
    claim: Claim | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def methods() -> list[MethodFacts]:
    """All methods, by family and name."""
    found = []
    for name in METHODS:
        cls = METHODS[name]
        found.append(
            MethodFacts(
                name=name,
                aliases=tuple(sorted(alias for alias, meant in ALIASES.items() if meant == name)),
                family="prune",
                says=(cls.__doc__ or "").partition("\n")[0],
                needs=tuple(kind.__name__ for kind in cls.needs),
                patterns=tuple(_WORDS[kind] for kind in cls.accepts),
                comparison_group=cls.comparison_group,
                cite=METHODS.citations[name],
                claim=cls.claim,
            )
        )
    for name in ACTIVATIONS:
        gating = ACTIVATIONS[name]
        thresholds = gating.selection == "threshold"
        found.append(
            MethodFacts(
                name=name,
                aliases=(),
                family="activations",
                says=(gating.__doc__ or "").partition("\n")[0],
                needs=("Quantiles",) if thresholds else (),
                patterns=(gating.gates,),
                comparison_group="layer" if thresholds else "token",
                cite=ACTIVATIONS.citations[name],
                claim=None,
            )
        )
    for name in POLICIES:
        found.append(
            MethodFacts(
                name=name,
                aliases=(),
                family="attention",
                says=(POLICIES[name].__doc__ or "").partition("\n")[0],
                needs=(),
                patterns=("blocks of keys",),
                comparison_group="block of queries",
                cite=POLICIES.citations[name],
                claim=None,
            )
        )
    for name in CACHES:
        caching = CACHES[name]
        found.append(
            MethodFacts(
                name=name,
                aliases=(),
                family="cache",
                says=(caching.__doc__ or "").partition("\n")[0],
                needs=caching.needs,
                patterns=(caching.keeps,),
                comparison_group=caching.reads,
                cite=CACHES.citations[name],
                claim=None,
            )
        )
    return found
