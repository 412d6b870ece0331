"""Removes the run of blocks that turns the hidden state least."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.calibrate.work import Inputs
from gossamer.claim import Claim
from gossamer.errors import CalibrationError
from gossamer.shrink.method import DEPTH, TENTH, Choice, DepthMethod, Subject


@DEPTH.register("angular", cite="Gromov et al. 2024, The Unreasonable Ineffectiveness of the Deeper Layers")
@dataclass
class Angular(DepthMethod):
    """The n consecutive blocks whose input and output are nearest in angle, at a window's last token.

    ``measured["distances"][l]``: d(x_l, x_{l+n}), the mean over windows, for every first block l.
    """

    claim = Claim(
        says="A tenth of the blocks, neighbours of the least angle, can go for little: less than half more "
        "perplexity.",
        experiment=TENTH,
        metric="perplexity",
        than="dense",
        factor=1.5,
    )

    def choose(self, subject: Subject, count: int) -> Choice:
        for visit in subject.visits():
            assert visit.calls is not None
            if visit.index == 0:
                _keep(subject, 0, visit.calls.inputs)
            _keep(subject, visit.index + 1, visit.calls.targets)
        total = len(subject.parts.blocks)
        states = [_kept(subject, index) for index in range(total + 1)]
        distances = [
            float(angular_distance(states[first], states[first + count]).mean())
            for first in range(total - count + 1)
        ]
        if not all(map(math.isfinite, distances)):
            raise CalibrationError("hidden states hold NaN or infinity: no angle between them exists")
        first = distances.index(min(distances))
        return Choice(tuple(range(first, first + count)), {"distances": distances})


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """arccos of the cosine between ``x`` and ``y`` ``(..., features)``, over pi: 0 to 1 (section 3.2)."""
    cosine = torch.nn.functional.cosine_similarity(x.double(), y.double(), dim=-1)
    return cosine.clamp(-1, 1).arccos() / math.pi


def _keep(subject: Subject, index: int, states: Inputs) -> None:
    """The last token's hidden states before block ``index``, into the work folder."""
    last = torch.cat([states.read(at, at + 1)[:, -1] for at in range(states.shape[0])]).float()
    subject.work.write(f"last-{index:03d}.f32", last.numpy().tobytes())


def _kept(subject: Subject, index: int) -> Tensor:
    data = bytearray((subject.work.path / f"last-{index:03d}.f32").read_bytes())
    return torch.frombuffer(data, dtype=torch.float32).reshape(len(subject.windows), -1)
