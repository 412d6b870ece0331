"""Fewer blocks: which of a decoder's blocks can go, one small file a method."""

from gossamer.shrink.method import DEPTH, Choice, DepthMethod, Subject, block_count, depth_method

__all__ = ["DEPTH", "Choice", "DepthMethod", "Subject", "block_count", "depth_method"]
