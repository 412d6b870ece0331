"""What tests of tuning share: a short run on the prose inside Python, and a tiny model with masks."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.sparse import mask_from_scores, parse_pattern
from gossamer.tune import SparseTuning
from tiny import tiny_model

TEXT = "".join(topics.values())[:20_000]
RUN: dict[str, Any] = {
    "text": [TEXT],
    "seqlen": 32,
    "batch": 2,
    "held_out": 2,
    "tokens": 4 * 64,
    "rate": 1e-3,
}


class Stopped:
    """Until ``at`` calls of `SparseTuning.step`, which the last of them stops; ``calls`` go on counting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.calls, step = 0, SparseTuning.step

        def counted(tuning: SparseTuning, fraction: float) -> None:
            self.calls += 1
            if self.calls == at:
                raise KeyboardInterrupt
            step(tuning, fraction)

        monkeypatch.setattr(SparseTuning, "step", counted)


def same_files(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same bytes."""
    return all(
        (one / file).read_bytes() == (other / file).read_bytes()
        for file in ("gossamer.safetensors", "gossamer.json")
    )


def masked(pattern: str = "2:4") -> tuple[Any, dict[str, torch.Tensor | None]]:
    model = tiny_model(num_hidden_layers=2)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n}
    return model, {
        n: mask_from_scores(m.weight.detach().abs(), parse_pattern(pattern)) for n, m in layers.items()
    }


class Toy:
    """A layer whose best 2:4 masks are known: groups count by themselves, and all masks of each are tried.
    Neighbouring inputs stand in for each other, which magnitude does not see."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.dense, self.inputs = torch.randn(6, 16), torch.randn(64, 16)
        self.inputs[:, 1::4] += 2 * self.inputs[:, ::4]
        candidates = [
            torch.zeros(4).index_fill_(0, torch.tensor(kept), 1) for kept in combinations(range(4), 2)
        ]
        tried = [self.groups(self.dense * one.repeat(4)) for one in candidates]
        self.best = torch.stack(tried).amin(0).sum()
        self.start = self.lost(self.dense * mask_from_scores(self.dense.abs(), parse_pattern("2:4")))

    def groups(self, weight: torch.Tensor) -> torch.Tensor:
        """What each group loses, ``(out, groups)``."""
        x, d = self.inputs.reshape(64, 4, 4), (weight - self.dense).reshape(6, 4, 4)
        return torch.einsum("ngi,ogi->nog", x, d).square().mean(0)

    def lost(self, weight: torch.Tensor) -> torch.Tensor:
        return self.groups(weight).sum()
