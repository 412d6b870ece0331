"""What searches for masks share: weights stand still, and what is pruned of them may come back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.errors import MethodError
from gossamer.matrices.values import Quantized
from gossamer.sparse import parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.tune.weights import SHARE, TunedWeight


class MaskSearch(TunedWeight):
    """Base of ways that choose masks of ``options.pattern`` and leave weights as they are, which are the
    dense model's (`fill`): give it as the teacher. Floats only: search first, then quantize."""

    takes = "floats"
    needs_masks = True
    frees_masks = True

    @classmethod
    def brings_back(cls, options: Any) -> bool:
        return True

    def __init__(
        self, weight: Tensor, mask: Tensor | None, quantized: Quantized | None, options: Any
    ) -> None:
        super().__init__(weight, None, None, options)
        self._pattern = parse_pattern(self.options.pattern)
        if quantized is not None:
            raise MethodError(f"{self.name} finds masks of floats: tune first, and quantize what it gives")
        if mask is None:
            raise MethodError(f"{self.name} begins with masks, and this weight has none")
        check_mask(mask, self._pattern)
        self.freeze()

    @torch.no_grad()
    def fill(self, dense: Tensor) -> None:
        self.latent.copy_(dense.float())

    def share(self) -> float:
        return SHARE  # what is trained are no weights

    def likeliest(self) -> Tensor:
        """The mask that is best as far as is known, bool ``(out, in)``."""
        raise NotImplementedError

    def final_mask(self) -> Tensor:
        return self.likeliest()

    @torch.no_grad()
    def finished(self) -> tuple[Tensor, Quantized | None]:
        return self.latent * self.likeliest(), None
