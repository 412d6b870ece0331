"""What methods do that nobody's settings say: the code that figures were made by."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gossamer.dynamic.activations import METHODS as ACTIVATIONS
from gossamer.dynamic.attention import POLICIES
from gossamer.dynamic.cache import CACHES
from gossamer.matrices.checksums import checksums_of
from gossamer.prune import ALIASES, FORMATS, METHODS
from gossamer.recipes.catalogue import methods
from gossamer.shrink import DEPTH
from gossamer.tune import TUNERS, WEIGHTS
from gossamer.tune.losses import LOSSES
from gossamer.tune.self_data import PROMPTS

REGISTRIES = (METHODS, FORMATS, DEPTH, TUNERS, WEIGHTS, LOSSES, PROMPTS, ACTIVATIONS, POLICIES, CACHES)


def code_of(names: Iterable[str]) -> dict[str, Any]:
    """By kind and name, the defaults of the options and the checksum of the source file of each method that
    is called one of ``names``; other names are left out."""
    known = {ALIASES.get(name, name) for name in names}
    defaults = {method.name: method.options for method in methods() if method.name in known}
    found = {}
    for registry in REGISTRIES:
        for name in sorted(known.intersection(registry)):
            source = getattr(sys.modules[registry[name].__module__], "__file__", None)
            found[f"{registry.kind} {name}"] = [defaults[name], source and checksums_of(Path(source)).sha256]
    return found
