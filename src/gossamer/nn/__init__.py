"""Modules that put structured matrices into PyTorch models."""

from gossamer.nn.embedding import StructuredEmbedding
from gossamer.nn.linear import StructuredLinear
from gossamer.nn.replace import replace_module

__all__ = ["StructuredEmbedding", "StructuredLinear", "replace_module"]
