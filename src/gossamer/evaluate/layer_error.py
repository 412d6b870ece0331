"""How far a layer's outputs move when its weight is replaced: the error that pruning methods minimise."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.claim import Unclaimed
from gossamer.errors import EvaluationError

_BLOCK = 1024  # columns of the Gram matrix that are held in float64 at once
UNCLAIMED = Unclaimed(
    name="relative output error of a layer",
    cite="Frantar & Alistarh 2022, Optimal Brain Compression",
    figures="Grids",
    why="It is a measure: what pruning methods make small, layer by layer.",
)


def reconstruction_error(weight: Tensor, replaced: Tensor, gram: Tensor | None = None) -> float:
    """Relative error ``||(W - W') X||_F^2 / ||W X||_F^2`` of replacing ``W`` by ``W'``.

    ``weight``, ``replaced``: ``(out, in)`` of any float dtype. ``gram``: ``(in, in)``, the sum of x xᵀ (or
    any positive multiple) over calibration inputs; with H = X Xᵀ the numerator is tr((W - W') H (W - W')ᵀ).
    Without it X is the identity: ``||W - W'||_F^2 / ||W||_F^2``. Computed in float64.

    Returns 0 where nothing changed, and infinity where ``W X`` is zero but ``W' X`` is not.
    Raises EvaluationError for shapes that do not fit and for values that are not finite.
    Frantar and Alistarh 2022, Optimal Brain Compression, equation 1.
    """
    if weight.ndim != 2 or weight.shape != replaced.shape:
        raise EvaluationError(
            f"layer error needs two weights of one shape (out, in), got {tuple(weight.shape)} "
            f"and {tuple(replaced.shape)}"
        )
    if gram is not None and gram.shape != (weight.shape[1],) * 2:
        raise EvaluationError(
            f"the Gram matrix has shape {tuple(gram.shape)}, but the layer has {weight.shape[1]} inputs"
        )
    kept = weight.detach().to(torch.float64)
    change = kept - replaced.detach().to(torch.float64)
    error, energy = _energy(change, gram), _energy(kept, gram)
    if not (torch.isfinite(error) and torch.isfinite(energy)):
        raise EvaluationError("a weight or Gram matrix holds NaN or infinite values: no layer error exists")
    if error.item() <= 0.0:
        return 0.0
    return (error / energy).item() if energy.item() > 0.0 else float("inf")


def _energy(matrix: Tensor, gram: Tensor | None) -> Tensor:
    """tr(M H Mᵀ) of a float64 ``matrix`` (out, in), the Gram matrix widened a block of columns at a time."""
    if gram is None:
        return matrix.square().sum()
    total = torch.zeros((), dtype=torch.float64)
    for start in range(0, matrix.shape[1], _BLOCK):
        columns = slice(start, start + _BLOCK)
        total += ((matrix @ gram[:, columns].to(torch.float64)) * matrix[:, columns]).sum()
    return total
