"""What every kernel must compute, in plain PyTorch: the definition that native code is tested against."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64  # inputs per activation scale, and per panel-group of the packed layouts


def quantize_activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 symmetric codes of ``x`` and one float32 scale per row and 64 inputs.

    ``x``: float ``(rows, in_features)``. Returns codes int8 ``(rows, groups, 64)`` (zero-padded) and
    scales float32 ``(rows, groups)``: ``scale = max|x| / 127``, ``code = round_half_even(x / scale)``,
    computed as ``x * (127 / max|x|)``. Codes are 0 where ``127 / max|x|`` is not a finite number (a group
    of zeros, or of magnitudes below 3.74e-37) or is 0 (an infinite activation), and where max|x| is NaN.
    """
    rows, cols = x.shape
    groups = -(-cols // GROUP)
    padded = torch.zeros(rows, groups * GROUP, dtype=torch.float32)
    padded[:, :cols] = x
    padded = padded.reshape(rows, groups, GROUP)
    top = padded.abs().amax(dim=2)
    # a true division: `127.0 / top` would multiply by a rounded reciprocal
    inverse = (torch.full_like(top, 127.0) / top).nan_to_num(nan=0.0, posinf=0.0)
    codes = torch.round(padded * inverse[..., None]).nan_to_num(nan=0.0).to(torch.int8)
    return codes, top * (1.0 / 127.0)


def matmul_int(q: Tensor, scales: Tensor, x: Tensor, group: int = GROUP) -> Tensor:
    """``y = x Wᵀ`` for integer weights ``q`` and int8 activations.

    ``q``: integer ``(out, in)`` (0 where pruned); ``scales``: float16 ``(out, ceil(in / group))``, group
    32 or 64; ``x``: float ``(rows, in)``. Sums within a group are exact integers; groups are added in
    order in float32: ``y += (scale_w * scale_x) * sum``. Returns float32 ``(rows, out)``.
    """
    out, cols = q.shape
    codes, scales_x = quantize_activations(x)
    groups = codes.shape[1]
    padded = torch.zeros(out, groups * GROUP, dtype=torch.float64)
    padded[:, :cols] = q
    parts = GROUP // group
    # float64 holds these integer sums exactly and has a fast matmul
    weights = padded.reshape(out, groups * parts, group)
    acts = codes.to(torch.float64).reshape(-1, groups * parts, group)
    y = torch.zeros(x.shape[0], out, dtype=torch.float32)
    for part in range(scales.shape[1]):
        sums = (acts[:, part] @ weights[:, part].T).to(torch.float32)
        scale = scales[:, part].float()[None, :] * scales_x[:, part // parts][:, None]
        y += scale * sums
    return y


def matmul_float(weight: Tensor, x: Tensor) -> Tensor:
    """``y = x Wᵀ`` for a float32 or bfloat16 weight ``(out, in)``: with bfloat16 weights the activations
    are rounded to bfloat16 too; products are summed in float32. Returns float32 ``(rows, out)``."""
    if weight.dtype == torch.bfloat16:
        x = x.to(torch.bfloat16)
    return x.float() @ weight.float().T


class Weight(NamedTuple):
    """A packed weight as plain tensors: ``weight`` as `matmul_float` or, with ``scales`` in groups of
    ``group``, as `matmul_int` takes it; ``inputs``: which of the activations it reads (None: all)."""

    weight: Tensor
    scales: Tensor | None = None
    group: int = GROUP
    inputs: Tensor | None = None


def matmul(w: Weight, x: Tensor) -> Tensor:
    """``y = x Wᵀ``: float32 ``(rows, out)``."""
    if w.inputs is not None:
        x = x[:, w.inputs]
    if w.scales is None:
        return matmul_float(w.weight, x)
    return matmul_int(w.weight, w.scales, x, w.group)


def matmul_blocks(w: Weight, blocks: int, x: Tensor) -> Tensor:
    """``y = x Wᵀ`` for the block-diagonal W whose blocks ``w`` holds below each other: block b gives the b-th
    part of the outputs from the b-th part of the inputs."""
    scales = [None] * blocks if w.scales is None else w.scales.chunk(blocks)
    parts = zip(w.weight.chunk(blocks), scales, x.chunk(blocks, dim=1), strict=True)
    made = (matmul(w._replace(weight=weight, scales=scale), part) for weight, scale, part in parts)
    return torch.cat(list(made), dim=1)


def run_program(stages: Sequence[Iterable[tuple[Weight, int, int]]], x: Tensor) -> Tensor:
    """The result of a program (`gossamer.kernels.make_program`) whose terms are (weight, blocks, source), for
    ``x`` ``(rows, in)``: float32 ``(rows, out)``. Terms are added in order."""
    sums: list[Tensor] = []
    for stage in stages:
        first, *rest = (
            matmul_blocks(w, blocks, x if source < 0 else sums[source]) for w, blocks, source in stage
        )
        for term in rest:
            first = first + term
        sums.append(first)
    return sums[-1]
