"""What methods do that nobody's settings say: the code that figures were made by."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gossamer.matrices.checksums import checksums_of
from gossamer.prune import ALIASES
from gossamer.recipes.catalogue import FAMILIES, methods


def code_of(names: Iterable[str]) -> dict[str, Any]:
    """By family and name, the defaults of the options and the checksum of the source file of each method that
    is called one of ``names``; other names are left out."""
    known = {ALIASES.get(name, name) for name in names}
    found = {}
    for method in methods():
        if method.name in known:
            made = FAMILIES[method.family][method.name]
            source = getattr(sys.modules[made.__module__], "__file__", None)
            files = [Path(source)] if source else []
            if method.family == "allocation":  # they share what splits
                files = sorted(file for one in files for file in one.parent.glob("*.py"))
            found[f"{method.family} {method.name}"] = [
                method.options,
                *(checksums_of(file).sha256 for file in files),
            ]
    return found
