"""Compressed and selectively read caches of keys and values, as transformers caches: one file a method."""

from gossamer.dynamic.cache.method import CACHES, CacheMethod, KeptCache
from gossamer.dynamic.cache.select import reading

__all__ = ["CACHES", "CacheMethod", "KeptCache", "reading"]
