"""Removes the blocks that change the hidden state least, each by itself."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass

import torch

from gossamer.calibrate.stream import Calls
from gossamer.claim import Claim
from gossamer.errors import CalibrationError
from gossamer.shrink.method import DEPTH, TENTH, Choice, DepthMethod, Subject


@DEPTH.register(
    "influence",
    cite="Men et al. 2024, ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
)
@dataclass
class Influence(DepthMethod):
    """The n blocks of lowest influence: 1 - cos(x_l, x_{l+1}), the mean over all tokens (equation 1)."""

    claim = Claim(
        says="The least influential tenth of the blocks can go for little: less than half more perplexity.",
        experiment=TENTH,
        metric="perplexity",
        than="dense",
        factor=1.5,
    )

    def choose(self, subject: Subject, count: int) -> Choice:
        for visit in subject.visits():
            assert visit.calls is not None
            influence = json.dumps(block_influence(visit.calls)).encode()
            subject.work.write(subject.work.block_file(visit.index, ".json").name, influence)
        total = range(len(subject.parts.blocks))
        found = [float(json.loads(subject.work.block_file(i, ".json").read_text())) for i in total]
        if not all(map(math.isfinite, found)):
            raise CalibrationError("hidden states hold NaN or infinity: no angle between them exists")
        least = sorted(total, key=found.__getitem__)[:count]
        return Choice(tuple(sorted(least)), {"influence": found})


def block_influence(calls: Calls) -> float:
    """The mean over all tokens of 1 - the cosine between a block's input and its output."""
    windows = calls.inputs.shape[0]
    means = []
    for at in range(windows):
        before, after = (states.read(at, at + 1).double() for states in (calls.inputs, calls.targets))
        means.append(float(1 - torch.nn.functional.cosine_similarity(before, after, dim=-1).mean()))
    return math.fsum(means) / windows
