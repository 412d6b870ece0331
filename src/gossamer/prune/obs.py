"""The OBS sweep: SparseGPT at sparsity > 0, GPTQ at sparsity 0 with integer values, and both at once.

One pass over the input columns. Column j is pruned and rounded, and what that costs is made good by all
columns still to come: with H = X Xᵀ and U the upper Cholesky factor of its inverse (H⁻¹ = Uᵀ U),

    e_j = (w_j - q_j) / U_jj          w_k -= e_j U_jk   for k > j

which is Optimal Brain Surgeon's update with the columns before j frozen. Work goes in blocks of columns,
so that far columns are updated by one matrix product a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.calibrate import Gram
from gossamer.claim import Claim, Experiment
from gossamer.errors import CalibrationError, MethodError
from gossamer.matrices.values import Quantized, ValueType, choose_scales, quantize_codes
from gossamer.prune.method import METHODS, Layer, Method, Pruned, round_values
from gossamer.sparse import NM, Pattern, Unstructured, mask_from_scores


@METHODS.register(
    "obs",
    cite="Frantar & Alistarh 2023, SparseGPT; Frantar et al. 2023, GPTQ; Hassibi & Stork 1993, OBS",
)
@dataclass
class OBS(Method):
    """Prune and round column by column, each error compensated by the columns that follow.

    ``damping``: added to the diagonal of H, as a fraction of its mean; raised tenfold as often as the
    factorization fails, which the record says. ``order``: ``natural``; ``activation`` (columns with the
    largest inputs first; masks and scales are then chosen before the sweep); or ``auto``, the better of
    both as measured: activation where nothing is pruned (int4 layer error 0.6x that of natural), natural
    where the mask is chosen on the way (0.7x that of a mask chosen before, at 50 %).
    """

    damping: float = 0.01
    order: str = "auto"
    needs = (Gram,)
    comparison_group = "columns:128"
    claim = Claim(
        says="OPT-175B at 50 %: perplexity 8.21 (dense 8.35) where magnitude collapses; "
        "2:4 and 50 % + 4 bit cost little more.",
        experiment=Experiment(against=("random", "magnitude", "wanda")),
        metric="perplexity",
        than="wanda",
        factor=1.0,
    )

    def __post_init__(self) -> None:
        if self.order not in ("auto", "natural", "activation"):
            raise MethodError(f"the sweep's order is auto, natural or activation, not {self.order!r}")
        if not 0 < self.damping < 10:
            raise MethodError(f"damping is a small fraction of the mean diagonal, got {self.damping}")

    def scores(self, layer: Layer) -> Tensor:
        """OBS saliency w² / [H⁻¹]_jj, with no column frozen."""
        factor = inverse_factor(layer[Gram], self.damping, "natural")
        return layer.weight.masked_fill(factor.dead, 0.0).square() / factor.upper.square().sum(dim=0)

    def prune(self, layer: Layer, pattern: Pattern, sparsity: float, values: ValueType, group: int) -> Pruned:
        if sparsity == 0 and not values.is_integer:
            return round_values(layer.weight, None, values, group)  # floats round by themselves
        order = self.order
        if order == "auto":
            order = "activation" if sparsity == 0 else "natural"
        factor = inverse_factor(layer[Gram], self.damping, order)
        weight = layer.weight.masked_fill(factor.dead, 0.0)
        chooser = mask_chooser(pattern, sparsity) if sparsity > 0 else None
        static_mask = None
        if sparsity > 0 and (chooser is None or order != "natural"):
            saliency = weight.square() / factor.upper.square().sum(dim=0)[factor.rank]
            static_mask, chooser = mask_from_scores(saliency, pattern, sparsity), None
        return self._swept(weight, factor, order, static_mask, chooser, values, group)

    def under(self, layer: Layer, mask: Tensor | None, values: ValueType, group: int) -> Pruned:
        """The layer rounded under a ``mask`` that is given (None: dense); an input that was always zero has
        no weights."""
        order = "activation" if self.order == "auto" else self.order
        factor = inverse_factor(layer[Gram], self.damping, order)
        weight = layer.weight.masked_fill(factor.dead, 0.0)
        return self._swept(weight, factor, order, mask, None, values, group)

    def _swept(
        self,
        weight: Tensor,
        factor: InverseFactor,
        order: str,
        mask: Tensor | None,
        chooser: MaskChooser | None,
        values: ValueType,
        group: int,
    ) -> Pruned:
        rounder = Rounder(values, group, weight, mask, factor)
        swept = sweep(weight, factor, mask, chooser, rounder)
        record = {"order": order, "damping": factor.damping, "dead_inputs": int(factor.dead.sum())}
        if not values.is_integer:
            return Pruned(swept.weight, swept.mask, None, record)
        codes = Quantized(swept.codes, rounder.scales, group, values, rounder.clamped)
        return Pruned(codes.to_dense(), swept.mask, codes, record | {"clamped_scales": rounder.clamped})


@dataclass(frozen=True)
class InverseFactor:
    """``upper``: U with H⁻¹ = Uᵀ U, columns in processing order; ``order[p]`` is the input processed at
    step p and ``rank`` its inverse; ``dead``: inputs that were always zero; ``damping``: what it took."""

    upper: Tensor
    order: Tensor
    rank: Tensor
    dead: Tensor
    damping: float


def inverse_factor(gram: Gram, damping: float, order: str) -> InverseFactor:
    """The factor of ``gram``'s damped inverse, made once and shared by all layers with these inputs.

    Raises CalibrationError where damping raised up to the whole mean diagonal does not make H positive
    definite: its statistics are damaged.
    """
    key = (damping, order)
    if key in gram.factors:
        found: InverseFactor = gram.factors[key]
        return found
    diagonal = gram.matrix.diagonal().clone()
    dead = diagonal == 0
    # as large as the others, so that these set no scale
    diagonal[dead] = 1.0 if dead.all() else diagonal[~dead].mean()
    columns = torch.arange(len(diagonal))
    if order == "activation":
        columns = torch.argsort(diagonal, descending=True, stable=True)
    upper = gram.matrix.new_empty(gram.matrix.shape).T  # by columns: all that is made of H lies in its place
    used = damping
    while True:
        upper.copy_(gram.matrix if order == "natural" else gram.matrix[columns[:, None], columns])
        upper.diagonal().copy_(diagonal[columns])
        upper.diagonal().add_(used * float(upper.diagonal().mean()))
        if _upper_of_inverse(upper):
            break
        used *= 10
        if used > 1:
            raise CalibrationError(
                f"the Gram matrix of the inputs is not positive definite even with damping {used / 10:g}: "
                "the calibration inputs are damaged (NaN, infinite or overflowed)"
            )
    factor = InverseFactor(upper, columns, torch.argsort(columns), dead, used)
    gram.factors[key] = factor
    return factor


def invert(H: Tensor) -> bool:
    """Puts the inverse of a symmetric matrix, which lies by columns, in its place; False where it is not
    positive definite, and lost."""
    _, info = torch.linalg.cholesky_ex(H, out=(H, torch.empty((), dtype=torch.int32)))
    if int(info) != 0:
        return False
    torch.cholesky_inverse(H, out=H)
    return True


def _upper_of_inverse(H: Tensor) -> bool:
    """`invert`, and the upper Cholesky factor of that, in its place."""
    if not invert(H):
        return False
    _, info = torch.linalg.cholesky_ex(H, upper=True, out=(H, torch.empty((), dtype=torch.int32)))
    return int(info) == 0 and all(bool(bound.isfinite()) for bound in H.T.aminmax())


@dataclass(frozen=True)
class MaskChooser:
    """Chooses a mask for ``width`` columns at a time, from what they are when the sweep comes to them."""

    width: int
    choose: Callable[[Tensor], Tensor]


def mask_chooser(pattern: Pattern, sparsity: float) -> MaskChooser | None:
    """How ``pattern`` is chosen within the sweep; None where its groups span all columns, and the mask
    is chosen beforehand."""
    if isinstance(pattern, NM):
        return MaskChooser(pattern.m, lambda scores: mask_from_scores(scores, pattern, sparsity))
    if isinstance(pattern, Unstructured) and pattern.group.startswith("columns:"):
        width = int(pattern.group.removeprefix("columns:"))
        return MaskChooser(width, lambda s: mask_from_scores(s, Unstructured("tensor"), sparsity))
    return None


class Rounder:
    """Rounds columns to a value type; scales of integers are chosen when the sweep enters their group."""

    def __init__(
        self, values: ValueType, group: int, weight: Tensor, mask: Tensor | None, factor: InverseFactor
    ) -> None:
        self.values, self.group = values, group
        self.clamped = 0
        self.dtype = None if values.is_integer else getattr(torch, values.name)
        self.importance = factor.upper.diagonal().square().reciprocal()
        if values.is_integer:
            out, cols = weight.shape
            self.scales = torch.zeros(out, -(-cols // group), dtype=torch.float16)
            self.static = not torch.equal(factor.order, torch.arange(cols))
            if self.static:
                importance = self.importance[factor.rank]
                for start in range(0, cols, group):
                    stop = min(start + group, cols)
                    self._scale(weight, mask, start, stop, importance)

    def _scale(self, weight: Tensor, mask: Tensor | None, start: int, stop: int, importance: Tensor) -> None:
        part = None if mask is None else mask[:, start:stop]
        scale, clamped = choose_scales(
            weight[:, start:stop].contiguous(), self.values, part, importance[start:stop]
        )
        self.scales[:, start // self.group] = scale
        self.clamped += clamped

    def enter(self, columns: Tensor, mask: Tensor | None, start: int) -> None:
        """Called with the group of columns ``(width, out)`` about to be rounded."""
        if not self.values.is_integer or self.static:
            return
        part = None if mask is None else mask.T.contiguous()
        importance = self.importance[start : start + len(columns)]
        scale, clamped = choose_scales(columns.T.contiguous(), self.values, part, importance)
        self.scales[:, start // self.group] = scale
        self.clamped += clamped

    def round(self, column: Tensor, index: int, kept: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The values that column ``index`` (its place in the weight) will have, and its codes; it is zero
        where it is not ``kept``."""
        if self.dtype is not None:
            return (column if self.dtype == torch.float32 else column.to(self.dtype).float()), None
        scale = self.scales[:, index // self.group]
        codes = quantize_codes(column[:, None], scale, self.values)[:, 0]
        if kept is not None and not self.values.has_zero:
            codes *= kept
        return codes.float() * scale.float(), codes


@dataclass
class Swept:
    weight: Tensor
    mask: Tensor | None
    codes: Tensor


def sweep(
    weight: Tensor,
    factor: InverseFactor,
    mask: Tensor | None,
    chooser: MaskChooser | None,
    rounder: Rounder,
) -> Swept:
    """Prunes and rounds ``weight`` ``(out, in)`` column by column; returns new tensors of that shape.

    ``mask`` is fixed beforehand, or chosen on the way by ``chooser``, or None (nothing is pruned).
    """
    order, U = factor.order, factor.upper
    W = weight.T[order].contiguous()  # (in, out): one input column is one contiguous row
    M = mask.T[order].contiguous() if mask is not None else None
    if chooser is not None:
        M = torch.ones(W.shape, dtype=torch.bool)
    codes = torch.zeros(W.shape if rounder.values.is_integer else (0, 0), dtype=torch.int8)
    d = U.diagonal()
    width = chooser.width if chooser is not None else 1
    block = block_width(width, rounder.group if rounder.values.is_integer else 1)
    group = rounder.group
    cols = len(W)
    places = order.tolist()
    for start in range(0, cols, block):
        stop = min(start + block, cols)
        errors = torch.empty(stop - start, W.shape[1])
        for j in range(start, stop):
            if chooser is not None and j % width == 0:
                assert M is not None
                M[j : j + width] = chooser.choose((W[j : j + width] / d[j : j + width, None]).square().T).T
            if j % group == 0:
                look = W[j : j + group]
                seen = None if M is None else M[j : j + group]
                if chooser is not None and width < group:
                    # masks further on are not chosen yet: judge the scale by what they would be now
                    seen = _tile(chooser, (look / d[j : j + group, None]).square())
                rounder.enter(look, seen, j)
            w = W[j]
            kept = w if M is None else w * M[j]
            q, code = rounder.round(kept, places[j], None if M is None else M[j])
            error = (w - q) / d[j]
            W[j + 1 : stop].addr_(U[j, j + 1 : stop], error, alpha=-1)
            errors[j - start] = error
            W[j] = q
            if code is not None:
                codes[j] = code
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    rank = factor.rank
    return Swept(
        W[rank].T.contiguous(),
        None if M is None else M[rank].T.contiguous(),
        codes[rank].T.contiguous() if len(codes) else codes,
    )


def _tile(chooser: MaskChooser, scores: Tensor) -> Tensor:
    """The masks that ``chooser`` would give each of its groups in ``scores`` ``(columns, out)``."""
    return torch.cat([chooser.choose(part.T).T for part in torch.split(scores, chooser.width)])


def block_width(mask_width: int, scale_group: int) -> int:
    """Columns a block: about 128, and a multiple of both widths where that stays below 512, so that
    masks and scales are chosen on columns that are up to date."""
    both = math.lcm(mask_width, scale_group)
    if both > 512:
        both = mask_width if mask_width <= 512 else 128
    return both * max(1, 128 // both)
