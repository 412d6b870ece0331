"""Finds the native module and says which instruction set its kernels use."""

from __future__ import annotations

import os
from functools import cache
from importlib import import_module
from typing import Any

from gossamer.errors import KernelError

_BUILD = (
    "build it with `pip install .` in a checkout, or in place with `cmake -S . -B build/dev -G Ninja && "
    "cmake --build build/dev && cmake --install build/dev --prefix src`"
)


@cache
def native() -> Any:
    """The extension module ``gossamer.kernels._native``; raises KernelError saying how to build it."""
    # Our kernels run on PyTorch's threads, which exist once torch is loaded.
    import torch  # noqa: F401

    try:
        return import_module("gossamer.kernels._native")
    except ImportError as error:
        raise KernelError(f"the native kernels cannot be loaded ({error}); {_BUILD}") from error


def native_available() -> bool:
    """Whether the native kernels can be loaded."""
    try:
        native()
    except KernelError:
        return False
    return True


def available() -> tuple[str, ...]:
    """Instruction sets that kernels run on here, from ``portable`` to the fastest."""
    return tuple(native().available())


@cache
def tier(name: str | None) -> int:
    """Index of an instruction set in the native table; None = the one in use. Raises KernelError."""
    name = isa() if name is None else name
    index: int = native().tier(name)
    if index >= 0:
        return index
    if name in native().compiled():
        raise KernelError(
            f"this machine does not run {name}; kernels run here on: {', '.join(available())} "
            "(see the environment variable GOSSAMER_ISA)"
        )
    raise KernelError(
        f"unknown instruction set {name!r}; there are: {', '.join(native().compiled())} "
        "(see the environment variable GOSSAMER_ISA)"
    )


@cache
def isa() -> str:
    """The instruction set in use: the fastest, or the one that ``GOSSAMER_ISA`` forces.

    The variable is read once. Raises KernelError where it names what does not exist or cannot run here.
    """
    forced = os.environ.get("GOSSAMER_ISA", "")
    if not forced:
        return available()[-1]
    tier(forced)
    return forced
