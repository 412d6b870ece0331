"""LLM.int8(): the few input features whose activations are outliers are multiplied in bfloat16.

An outlier sets the scale of all activations that share one with it, and takes their bits. So the product is
taken apart by inputs, W x = W_o x_o + W_r x_r, the first in bfloat16, the second in integers which never see
an outlier. The paper finds outliers of each input while it runs; here they are found once, on calibration
text, and stored (as a `Sum` of two `Selected`). The paper's size of 6.0 is of large models: in SmolLM2-135M
it takes a quarter of what down projections read, and a share of each layer's inputs took fewer and won more.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.calibrate import InputPeak, Statistic
from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.matrices import Matrix, Packed, Selected, Sum, packed_bytes, value_type
from gossamer.matrices.values import ValueType
from gossamer.prune.method import FORMATS, Layer, Method, Pruned
from gossamer.sparse import Pattern

OWN = value_type("bfloat16")  # in which outliers are kept


@FORMATS.register(
    "llm_int8",
    cite="Dettmers et al. 2022, LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale",
)
@dataclass(frozen=True)
class OutlierColumns:
    """Columns of inputs with an activation of at least ``threshold`` stay bfloat16, all others are integers.

    ``share``: of a layer's inputs at most so many are outliers, those of the largest activations; one input
    at least stays with the integers.
    """

    threshold: float = 6.0
    share: float = 1.0
    name: ClassVar[str]
    needs: ClassVar[tuple[type[Statistic], ...]] = (InputPeak,)
    claim: ClassVar[Claim] = Claim(
        says="Models of up to 175B parameters lose no quality, with more than 99.9 % of values multiplied in "
        "8 bit, where int8 alone fails from 6.7B on.",
        experiment=Experiment(
            sparsity=0.0,
            values="int8",
            against=("int8",),
            compressed={
                "llm_int8": {"method": "magnitude", "outliers": 6.0},
                "int8": {"method": "magnitude"},
            },
        ),
        metric="kl",
        than="int8",
        factor=0.5,
    )

    def __post_init__(self) -> None:
        if not self.threshold >= 0:
            raise MethodError(
                f"outliers are activations of at least a size of 0 or more, not {self.threshold}"
            )
        if not 0 < self.share <= 1:
            raise MethodError(f"the share of inputs that are outliers is in (0, 1], not {self.share}")

    def columns(self, peak: Tensor) -> Tensor:
        """Which inputs are outliers, bool ``(in,)``, by their largest activations ``peak`` ``(in,)``."""
        most = min(int(self.share * len(peak)), len(peak) - 1)
        largest = torch.argsort(peak, descending=True, stable=True)[:most]
        found = torch.zeros(len(peak), dtype=torch.bool)
        found[largest] = peak[largest] >= self.threshold
        return found

    def prune(
        self, method: Method, layer: Layer, pattern: Pattern, sparsity: float, values: ValueType, group: int
    ) -> Pruned:
        """The layer with its outliers apart, the rest made by ``method`` as a layer of its own."""
        outliers = self.columns(layer[InputPeak].peak)
        if not outliers.any():
            plain = method.prune(layer, pattern, sparsity, values, group)
            return replace(plain, record={**plain.record, "outliers": 0})
        rest = Layer(
            layer.name,
            layer.weight[:, ~outliers].contiguous(),
            {kind: found.select(~outliers) for kind, found in layer.statistics.items()},
        )
        pruned = method.prune(rest, pattern, sparsity, values, group)
        weight = layer.weight.to(OWN.dtype).float()
        weight[:, ~outliers] = pruned.weight
        mask = None
        if pruned.mask is not None:
            mask = torch.ones_like(layer.weight, dtype=torch.bool)
            mask[:, ~outliers] = pruned.mask
        record = {**pruned.record, "outliers": int(outliers.sum())}
        return Pruned(weight, mask, pruned.quantized, record, outliers)


def outlier_columns(threshold: float | None, share: float | None, values: ValueType) -> OutlierColumns | None:
    """Which inputs of layers in ``values`` are kept apart, None where neither is given; a share alone takes
    the largest. Raises MethodError for a size or share that is none, and beside floats."""
    if threshold is None and share is None:
        return None
    if not values.is_integer:
        raise MethodError(f"outliers are kept apart from integers, and the values are {values.name}")
    return OutlierColumns(threshold or 0.0, 1.0 if share is None else share)


def needs_of(method: Method, outliers: OutlierColumns | None) -> tuple[type[Statistic], ...]:
    """What must be known of a layer to prune and round it, ``outliers`` apart."""
    return method.needs if outliers is None else (*method.needs, *outliers.needs)


def pack_apart(pruned: Pruned) -> Matrix:
    """A layer with outliers as the sum of its integers and its bfloat16 columns, each in the layout of the
    fewest bytes."""
    outliers, codes = pruned.outliers, pruned.quantized
    assert outliers is not None
    assert codes is not None
    rest = Packed.pack(codes, mask=None if pruned.mask is None else pruned.mask[:, ~outliers].contiguous())
    columns = pruned.weight[:, outliers].contiguous()
    kept = torch.ones_like(columns, dtype=torch.bool)
    layout = min(("dense", "16x4"), key=lambda name: packed_bytes(kept, OWN, name))
    own = Packed.pack(columns, OWN.name, layout)
    return Sum(Selected(rest, ~outliers), Selected(own, outliers))
