"""Natural sparsity: how many activations of a model are zero, or next to it, before any is dropped."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from gossamer.claim import Unclaimed
from gossamer.dynamic.activations.sites import linear_sites, run_body, tap
from gossamer.errors import CalibrationError, SparsityError

UNCLAIMED = Unclaimed(
    name="natural sparsity",
    cite="Li et al. 2023, The Lazy Neuron Phenomenon",
    figures="Dropped activations",
    why="It counts the zeros of a model and changes none, and the paper is of models with ReLU.",
)


def natural_sparsity(model: nn.Module, windows: Tensor, fraction: float = 0.0) -> dict[str, float]:
    """The share of inputs with ``|x_j| <= fraction * max_j |x_j|`` of their token, by linear layer.

    ``windows``: token ids ``(n, seqlen)``. With ``fraction`` 0 exact zeros count, as in the paper: Li et al.
    2023, The Lazy Neuron Phenomenon, which looks at what the second layer of an MLP reads after a ReLU.
    Raises SparsityError unless 0 <= fraction < 1, CalibrationError where an activation is NaN or infinite.
    """
    if not 0 <= fraction < 1:
        raise SparsityError(f"a fraction of the largest activation lies in [0, 1), got {fraction!r}")
    counts: dict[str, tuple[int, int]] = {}

    def see(name: str) -> Callable[[Tensor], None]:
        def count(x: Tensor) -> None:
            size = x.abs()
            if not torch.isfinite(size).all():
                raise CalibrationError(f"{name}: an activation is NaN or infinite")
            small, seen = counts.get(name, (0, 0))
            largest = size.amax(dim=-1, keepdim=True)
            counts[name] = (small + int((size <= fraction * largest).sum()), seen + x.numel())

        return count

    handles = [tap(site.module, see(name)) for name, site in linear_sites(model).items()]
    try:
        run_body(model, windows)
    finally:
        for handle in handles:
            handle.remove()
    return {name: small / seen for name, (small, seen) in counts.items()}
