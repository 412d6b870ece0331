"""Layers that tests of solvers prune: weights at random, inputs that are mixed and of unequal size."""

from __future__ import annotations

import torch

from gossamer.calibrate import Gram
from gossamer.prune import Layer


def mixed_layer(out: int, cols: int, tokens: int, seed: int) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(cols, cols, generator=generator) * 0.2 + torch.eye(cols)
    inputs = torch.randn(tokens, cols, generator=generator) @ mixing
    inputs *= torch.rand(cols, generator=generator) * 2 + 0.1
    gram = Gram(cols)
    gram.update(inputs)
    gram.finish()
    return Layer("layer", torch.randn(out, cols, generator=generator), {Gram: gram})
