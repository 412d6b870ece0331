"""Scales alone: integers stand still, and what each group counts is tuned through the whole model."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.matrices.values import Quantized
from gossamer.tune.weights import WEIGHTS, TunedWeight, stored_scales

SHARE_OF_SIZE = 0.1  # scales move at a tenth of the rate that weights would


@WEIGHTS.register(
    "scales",
    cite="Zeng et al. 2025, GQSA: Group Quantization and Sparsity (its second stage, E2E-OQP); Chen et al. "
    "2024, EfficientQAT (E2E-QP)",
)
class ScalesWeight(TunedWeight):
    """``W = factors ⊙ codes``: of a quantized weight only ``factors`` ``(out, groups)``, its scales, are
    trained; integers and masks stay as they are.

    A first stage tunes weights and scales block by block (`blockwise`; BQPO in GQSA, Block-AP in
    EfficientQAT), where a block is all that lies in memory; this second one follows the whole model, and
    trains a 64th of its numbers. GQSA prunes groups of 16 inputs of one output; what our layouts keep or
    leave whole are steps of 16 outputs x 4 inputs, the pattern ``16x4``. Factors are rounded to float16 as
    they are stored, gradients passing straight through. Their rate is the one of weights, ``rate``.
    """

    accepts = "any, and dense; integers"
    takes = "integers"
    claim = Claim(
        says="After tuning block by block, tuning the scales alone through the whole model wins more back.",
        experiment=Experiment(
            pattern="16x4",
            sparsity=0.3,
            values="int4",
            against=("obs",),
            windows=16,
            compressed={"blockwise": {"method": "obs", "tune": "blockwise"}},
            start="blockwise",
            tuning={"tokens": 65_536, "seqlen": 256, "batch": 2},
            tuned={"scales": {"method": "scales", "losses": {"kl": 1}}},
        ),
        metric="perplexity",
        than="blockwise",
    )
    codes: Tensor

    def __init__(
        self, weight: Tensor, mask: Tensor | None, quantized: Quantized | None = None, options: Any = None
    ) -> None:
        super().__init__(weight, mask, None, options)  # floats, to what makes and follows them
        if quantized is None:
            raise MethodError("scales are tuned where values are integers, and these are floats")
        self.freeze()
        self.values, self.group = quantized.values, quantized.group
        self.factors = nn.Parameter(quantized.scales.float())
        self.register_buffer("codes", quantized.q, persistent=False)

    @classmethod
    def state_bytes(cls, shape: tuple[int, int], options: Any) -> float:
        """The weight, its gradient, mask and codes; scales are few."""
        return 10 * math.prod(shape)

    def size(self) -> float:
        return SHARE_OF_SIZE * float(self.factors.detach().abs().mean())

    def dense(self) -> Tensor:
        straight = stored_scales(self.factors) + (self.factors - self.factors.detach())
        wide = straight.repeat_interleave(self.group, dim=1)[:, : self.codes.shape[1]]
        return wide * self.codes

    @torch.no_grad()
    def finished(self) -> tuple[Tensor, Quantized | None]:
        assert self.values is not None
        found = Quantized(self.codes.clone(), stored_scales(self.factors).half(), self.group, self.values)
        return found.to_dense(), found
