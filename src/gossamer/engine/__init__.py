"""The native decoder: Llama-family models run whole in C++ over packed weights."""

from gossamer.engine.decoder import Decoder, why_not
from gossamer.engine.session import NativeSession

__all__ = ["Decoder", "NativeSession", "why_not"]
