"""Recipes for PyTorch modules: all the stages of a paper at once, each in one small file."""

from __future__ import annotations

from typing import Any

from gossamer.registry import Registry

MODULES: Registry[Any] = Registry("recipe for modules", {"gpusq": "gossamer.recipes.gpusq"})
"""Names to the losses that such a recipe draws a module to its dense self by."""
