"""What a model is tuned on: windows of tokens, and which of their tokens count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from gossamer.errors import MethodError

IGNORED = -100  # transformers' label of a token that no loss counts


@dataclass(frozen=True)
class Windows:
    """``ids``: int64 ``(n, seqlen)``; ``labels``: the same, `IGNORED` where no loss counts. In every window a
    token behind the first counts, else MethodError."""

    ids: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if self.ids.ndim != 2 or self.ids.shape[1] < 2 or self.labels.shape != self.ids.shape:
            raise MethodError(
                f"windows to tune on are token ids (n, seqlen >= 2) and as many labels, not "
                f"{tuple(self.ids.shape)} and {tuple(self.labels.shape)}"
            )
        if not len(self) or not bool((self.labels[:, 1:] != IGNORED).any(1).all()):
            raise MethodError("there is a window to tune on in which nothing is learned, or none at all")

    @classmethod
    def of(cls, ids: Tensor, learned: Tensor | None = None) -> Windows:
        """``learned``: bool of the shape of ``ids`` (None: all count)."""
        if learned is None or bool(learned.all()):
            return cls(ids, ids)
        return cls(ids, ids.masked_fill(~learned, IGNORED))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, which: Tensor | slice) -> Windows:
        ids = self.ids[which]
        return Windows(ids, ids if self.labels is self.ids else self.labels[which])

    def parts(self, micro: int) -> Iterator[tuple[Windows, float]]:
        """``micro`` windows at a time, and of all the tokens that count the share that count there."""
        whole = self._counted()
        for start in range(0, len(self), micro):
            part = self[start : start + micro]
            yield part, part._counted() / whole

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All that tells these windows from others."""
        return (self.ids,) if self.labels is self.ids else (self.ids, self.labels)

    @property
    def share(self) -> float:
        """Of the tokens behind each window's first, those that count."""
        return self._counted() / self.labels[:, 1:].numel()

    @property
    def batch(self) -> Mapping[str, Tensor]:
        """As transformers' models take it."""
        return {"input_ids": self.ids, "labels": self.labels}

    def _counted(self) -> int:
        return int((self.labels[:, 1:] != IGNORED).sum())
