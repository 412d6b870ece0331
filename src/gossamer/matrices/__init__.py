"""Structured matrices, their packed layouts and number formats, and how they lie on disk."""

from gossamer.matrices.blocks import BlockDiagonal
from gossamer.matrices.compose import LowRank, Product, Sum
from gossamer.matrices.dense import Dense
from gossamer.matrices.inference import compile_matrix, stages_of
from gossamer.matrices.layouts import Unpacked, choose_layout, most_bytes, packed_bytes
from gossamer.matrices.matrix import Matrix, fit_error, from_description
from gossamer.matrices.packed import Packed, pack, pack_tree
from gossamer.matrices.selected import Selected
from gossamer.matrices.sparse import Sparse
from gossamer.matrices.values import (
    VALUES,
    Quantized,
    ValueType,
    choose_scales,
    quantize,
    quantize_codes,
    value_type,
)

__all__ = [
    "VALUES",
    "BlockDiagonal",
    "Dense",
    "LowRank",
    "Matrix",
    "Packed",
    "Product",
    "Quantized",
    "Selected",
    "Sparse",
    "Sum",
    "Unpacked",
    "ValueType",
    "choose_layout",
    "choose_scales",
    "compile_matrix",
    "fit_error",
    "from_description",
    "most_bytes",
    "pack",
    "pack_tree",
    "packed_bytes",
    "quantize",
    "quantize_codes",
    "stages_of",
    "value_type",
]
