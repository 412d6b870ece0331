"""Recipes for PyTorch modules: all the stages of a paper at once, each in one small file."""

from __future__ import annotations

from typing import Any

from gossamer.registry import Registry

MODULES: Registry[Any] = Registry("recipe for modules", {"gpusq": "gossamer.recipes.gpusq"})
"""Names to classes that say what such a recipe needs and accepts, the methods that it is ``made_of``, and
what its paper claims; ``Options``: the function that runs it."""
