"""MaskLLM: which of a group's N:M masks is best is learned, by Gumbel softmax, while weights stand still."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from math import comb, prod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.matrices.values import Quantized
from gossamer.sparse import parse_pattern
from gossamer.sparse.patterns import NM
from gossamer.tune.ways.search import MaskSearch
from gossamer.tune.weights import WEIGHTS, check_kept, seed_of

MOST_CANDIDATES = 70  # masks of a group: those of 4:8
SPREAD = 0.01  # standard deviation of logits at the start


@dataclass(frozen=True)
class MaskLlmOptions:
    """``pattern``: the N:M of masks; ``hot``, ``cold``: the temperature τ at the start and at the end of the
    run; ``scale``, ``last_scale``: κ, what logits count, the same; ``prior``: α, how much the masks that the
    weights come with count at the start; ``keep``: λ of the reward for large weights that are kept."""

    pattern: str = "2:4"
    hot: float = 4.0
    cold: float = 0.05
    scale: float = 100.0
    last_scale: float = 500.0
    prior: float = 3.0
    keep: float = 1e-5

    def __post_init__(self) -> None:
        pattern = parse_pattern(self.pattern)
        if not isinstance(pattern, NM) or comb(pattern.m, pattern.n) > MOST_CANDIDATES:
            raise MethodError(
                f"maskllm learns N:M masks, at most {MOST_CANDIDATES} a group (2:4, 4:8), not {self.pattern}"
            )
        if min(self.hot, self.cold, self.scale, self.last_scale) <= 0 or min(self.prior, self.keep) < 0:
            raise MethodError("maskllm takes temperatures and scales above 0, a prior and keep of at least 0")


@WEIGHTS.register(
    "maskllm",
    cite="Fang et al. 2024, MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models",
)
class MaskLlmWeight(MaskSearch):
    """``W = W0 ⊙ Σ y S`` while it is trained: S are all masks of a group within the pattern, and
    ``y = softmax((κ logits + gumbel) / τ)`` with noise anew in each step. τ falls and κ rises linearly over
    the run. Only ``logits`` ``(out, groups, masks)`` are trained, at a rate of their own order (1e-4 in the
    paper, of thousands of steps). Without gradients, and at the end, each group has its likeliest mask.

    W0 are the dense model's weights (`fill`): give it as the teacher. The gradient has
    ``-λ ∇ ||W||²`` besides. Floats only: learn masks first, then quantize.
    """

    Options: ClassVar[type[Any]] = MaskLlmOptions
    accepts = "N:M, learned"
    claim = Claim(
        says="2:4 masks learned end to end beat those of one-shot methods, though no weight moves (Llama-2 "
        "7B: 6.72, others 10 or more, dense 5.12).",
        experiment=Experiment(
            pattern="2:4",
            sparsity=None,
            against=("magnitude", "wanda"),
            tuning={"tokens": 131_072, "seqlen": 256, "batch": 2, "norms": False},
            tuned={"maskllm": {"method": "maskllm", "losses": {"task": 1}, "rate": 1e-3}},
        ),
        metric="perplexity",
        than="obs",
    )
    steps: Tensor
    done: Tensor
    masks: Tensor

    def __init__(
        self,
        weight: Tensor,
        mask: Tensor | None,
        quantized: Quantized | None = None,
        options: MaskLlmOptions | None = None,
    ) -> None:
        super().__init__(weight, mask, quantized, options)
        pattern = self._pattern
        assert isinstance(pattern, NM)
        assert mask is not None
        out, width = weight.shape
        if width % pattern.m:
            raise MethodError(f"{width} inputs are no whole groups of {pattern}")
        check_kept(mask, out * width // pattern.m * pattern.n, pattern)
        self._seed = seed_of(self.latent)  # of the noise too
        kept = torch.tensor(list(combinations(range(pattern.m), pattern.n)))
        self.register_buffer(
            "masks", torch.zeros(len(kept), pattern.m).scatter_(1, kept, 1), persistent=False
        )
        start = torch.randn(
            (out, width // pattern.m, len(kept)), generator=torch.Generator().manual_seed(self._seed)
        )
        alike = mask.reshape(out, -1, pattern.m).float() @ self.masks.mT
        # σ(logits) α (similarity - its mean)
        near = self.options.prior * (alike - alike.mean(-1, keepdim=True))
        self.logits = nn.Parameter(SPREAD * (start + near))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("done", torch.zeros((), dtype=torch.float64))
        self._noise: tuple[int, Tensor] | None = None
        self._learns = False

    @classmethod
    def state_bytes(cls, shape: tuple[int, int], options: MaskLlmOptions) -> float:
        """The weight and its gradient; of every mask of a group a logit, its gradient, moments and noise."""
        pattern = parse_pattern(options.pattern)
        assert isinstance(pattern, NM)
        return (8 + 20 * comb(pattern.m, pattern.n) / pattern.m) * prod(shape)

    def size(self) -> float:
        return float(self.logits.detach().abs().mean())

    def forward(self, dtype: torch.dtype = torch.float32) -> Tensor:
        if self._learns != torch.is_grad_enabled():
            self._kept, self._learns = None, torch.is_grad_enabled()
        return super().forward(dtype)

    def dense(self) -> Tensor:
        if not self._learns:
            return self.latent * self.likeliest()
        done, options = float(self.done), self.options
        heat = options.hot + done * (options.cold - options.hot)
        scale = options.scale + done * (options.last_scale - options.scale)
        shares: Tensor = ((scale * self.logits + self._gumbel()) / heat).softmax(-1)
        return self.latent * (shares @ self.masks).reshape(self.latent.shape)

    def likeliest(self) -> Tensor:
        """The mask of the largest logit in each group, bool ``(out, in)``."""
        chosen = self.masks[self.logits.detach().argmax(-1)].reshape(self.latent.shape)
        return chosen.bool()

    def gradients(self, grad: Tensor, latent: Tensor) -> tuple[Tensor, Tensor | None]:
        to_dense, _ = super().gradients(grad, latent)
        return to_dense.add_(latent, alpha=-2 * self.added(self.options.keep)), None

    def settle(self) -> None:
        self._learns = True  # as in the passes whose gradients these are
        super().settle()
        self._noise = None

    def after_step(self, fraction: float) -> None:
        self._noise = None
        self.steps += 1
        self.done.fill_(min(max(fraction, 0.0), 1.0))

    def _gumbel(self) -> Tensor:
        """The noise of this step, the same however often it is asked for."""
        step = int(self.steps)
        if self._noise is None or self._noise[0] != step:
            generator = torch.Generator().manual_seed(self._seed + 1_000_003 * (step + 1))
            uniform = torch.rand(self.logits.shape, generator=generator).clamp_(1e-10, 1 - 1e-7)
            self._noise = step, uniform.log_().neg_().log_().neg_()
        return self._noise[1]
