"""The native decoder: Llama-family models run whole in C++ over packed weights."""

from gossamer.engine.caches import PackedCache
from gossamer.engine.decoder import Decoder, pack_in_place, why_not
from gossamer.engine.policy import Look, Looks
from gossamer.engine.session import NativeSession

__all__ = ["Decoder", "Look", "Looks", "NativeSession", "PackedCache", "pack_in_place", "why_not"]
