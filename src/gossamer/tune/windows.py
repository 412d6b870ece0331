"""What a model is tuned on: windows of tokens, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

IGNORED = -100  # transformers' label of a token that no loss counts


@dataclass(frozen=True)
class Windows:
    """``ids``: int64 ``(n, seqlen)``; ``labels``: the same, `IGNORED` where no loss counts. In every window
    one behind the first counts."""

    ids: Tensor
    labels: Tensor

    @classmethod
    def of(cls, ids: Tensor, learned: Tensor | None = None) -> Windows:
        """``learned``: bool of the shape of ``ids`` (None: all count)."""
        if learned is None or bool(learned.all()):
            return cls(ids, ids)
        return cls(ids, ids.masked_fill(~learned, IGNORED))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: Tensor | slice) -> Windows:
        return Windows(self.ids[which], self.labels[which])

    def parts(self, micro: int) -> Iterator[tuple[Windows, float]]:
        """``micro`` windows at a time, and of all the tokens that count the share that count there."""
        whole = self._counted()
        for start in range(0, len(self), micro):
            part = self[start : start + micro]
            yield part, part._counted() / whole

    @property
    def share(self) -> float:
        """Of the tokens behind each window's first, those that count."""
        return self._counted() / max(1, self.labels[:, 1:].numel())

    @property
    def batch(self) -> Mapping[str, Tensor]:
        """As transformers' models take it."""
        return {"input_ids": self.ids, "labels": self.labels}

    def _counted(self) -> int:
        return int((self.labels[:, 1:] != IGNORED).sum())
