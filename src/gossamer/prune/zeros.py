"""A model that is sparse already: its zeros stay, and nothing else goes."""

from __future__ import annotations

from dataclasses import dataclass

from gossamer.calibrate import Gram
from gossamer.matrices.values import ValueType
from gossamer.prune.method import METHODS, Layer, Method, Pruned, round_values
from gossamer.prune.obs import OBS
from gossamer.sparse import Pattern


@METHODS.register(
    "zeros",
    cite="Frantar et al. 2023, GPTQ; Kurtic et al. 2022, The Optimal BERT Surgeon (rounded when sparse)",
)
@dataclass
class Zeros(Method):
    """Weights that are zero are pruned, whatever pattern they make; the others are rounded to integers by the
    sweep of `obs` under that mask, and stay as they are in floats."""

    needs = (Gram,)
    finds_masks = True

    def prune(self, layer: Layer, pattern: Pattern, sparsity: float, values: ValueType, group: int) -> Pruned:
        mask = layer.weight != 0
        kept = None if mask.all() else mask
        if not values.is_integer or not mask.any():
            return round_values(layer.weight, kept, values, group)
        return OBS().under(layer, kept, values, group)
