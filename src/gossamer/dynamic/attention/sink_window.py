"""StreamingLLM: the first tokens, which attention falls back on, and the latest ones."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from gossamer.claim import Claim
from gossamer.dynamic.attention.policy import (
    LONG,
    POLICIES,
    Policy,
    blocks_back,
    check_counts,
    latest,
    numbers,
)
from gossamer.engine import Look
from gossamer.kernels import BLOCK


@POLICIES.register("sink_window", cite="Xiao et al. 2024, Efficient Streaming Language Models with Sinks")
@dataclass(frozen=True)
class SinkWindow(Policy):
    """The first ``sink`` positions and the last ``window`` before each query, in whole blocks.

    The paper numbers positions within its cache, so that a text may be longer than the context that the model
    was trained on, and forgets the keys between. Here keys keep their positions and stay in the cache, and
    nothing goes past the context: it is attention that looks at less, not endless streaming. The paper keeps
    4 sink tokens; a block is the least that is kept here.
    """

    claim = Claim(
        says="Without the first tokens a window fails (Llama-2 13B, 1,024 keys: 5,158), with four of "
        "them it reads on (5.40).",
        experiment=LONG,
        metric="perplexity",
        than="window",
        factor=0.5,
    )
    static = True

    sink: int = 4
    window: int = 1024

    def __post_init__(self) -> None:
        check_counts(self, sink=0, window=1)

    def blocks(self, queries: Tensor, keys: Tensor, *, scaling: float, layer: int) -> Tensor:
        row, column = numbers(queries.shape[1], keys.shape[1])
        chosen = (column < -(-self.sink // BLOCK)) | latest(row, column, self.window)
        return chosen.expand(len(queries), -1, -1)

    def look(self, layer: int, head: int) -> Look:
        return Look("static", sink=-(-self.sink // BLOCK), window=blocks_back(self.window))
