"""Budgets as people write them: bytes on disk, bits a weight, or time a token."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from gossamer.errors import MethodError

UNITS = {
    "bytes": {"B": 1.0, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30},
    "bits": {"bits": 1.0, "bit": 1.0},
    "seconds": {"us": 1e-6, "ms": 1e-3, "s": 1.0},
}


@dataclass(frozen=True)
class Budget:
    """``amount`` of ``measure``: ``bytes``, ``bits`` or ``seconds``; ``text``: as it was written."""

    text: str
    amount: float
    measure: str

    def __str__(self) -> str:
        return self.text


def parse_budget(text: str) -> Budget:
    """``"60MB"``, ``"57.2 MiB"``, ``"3.5 bits"`` or ``"2.5ms"`` as a budget; raises MethodError with the
    accepted forms."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]+)\s*", text)
    for measure, units in UNITS.items():
        amount = float(match[1]) * units.get(match[2], 0.0) if match else 0.0
        if 0 < amount < math.inf:
            return Budget(text.strip(), amount, measure)
    raise MethodError(
        f"cannot read the budget {text!r}: bytes are written 60MB (B, kB, MB, GB, KiB, MiB, GiB), bits a "
        "weight 3.5bits, time a token 2.5ms (us, ms, s)"
    )


def amount_text(amount: float, measure: str) -> str:
    """An amount for people to read: ``60.25 MB``, ``3.5 bits``, ``2.531 ms``."""
    if measure == "bits":
        return f"{amount:.4g} bits"
    steps = [(1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B")]
    if measure == "seconds":
        steps = [(1.0, "s"), (1e-3, "ms"), (1e-6, "us")]
    step, unit = next((pair for pair in steps if amount >= pair[0]), steps[-1])
    return f"{amount / step:.4g} {unit}"
