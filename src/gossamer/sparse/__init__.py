"""Patterns, masks and allocations."""

from gossamer.sparse.masks import check_mask, count_pruned, mask_from_scores
from gossamer.sparse.patterns import NM, Block, Channel, Pattern, Unstructured, parse_pattern

__all__ = [
    "NM",
    "Block",
    "Channel",
    "Pattern",
    "Unstructured",
    "check_mask",
    "count_pruned",
    "mask_from_scores",
    "parse_pattern",
]
