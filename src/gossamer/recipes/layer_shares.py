"""What the allocations that measure ask of a layer of the dense model, whatever job it is pruned in."""

from __future__ import annotations

import math

from torch import Tensor

from gossamer.calibrate import Gradient, Gram, InputNorm, Statistic
from gossamer.matrices.values import ValueType, value_type
from gossamer.prune import Combination, Layer, method
from gossamer.prune.method import check_finite
from gossamer.sparse import NM
from gossamer.sparse.masks import unit_scores

Needs = tuple[type[Statistic], ...]


def allocation_needs(combination: Combination) -> Needs:
    """The statistics of the dense model that the allocation reads, none where it measures nothing."""
    method = combination.method.needs
    found: dict[str, Needs] = {
        "global": method,
        "owl": (InputNorm,),
        "sensitivity": tuple(dict.fromkeys((*method, Gram, Gradient))),
    }
    return found.get(combination.allocation, ())


def competing_scores(layer: Layer, combination: Combination) -> Tensor:
    """``global``: the method's scores of what the pattern keeps or prunes whole, flat float32."""
    check_finite(layer)
    return unit_scores(combination.method.scores(layer), combination.pattern).flatten().contiguous().float()


def outlier_scores(layer: Layer) -> Tensor:
    """``owl``: Wanda's |W_ij| ||x_j||, whose outliers are counted over a block's layers; a root of the mean
    square stands for the norm, since layers do not all read the same number of tokens."""
    check_finite(layer)
    return method("wanda").scores(layer) / math.sqrt(layer[InputNorm].tokens)


def curve(layer: Layer, combination: Combination) -> list[tuple[float, float]]:
    """``sensitivity``: what the method costs the layer at sparsities around the one asked for."""
    check_finite(layer)
    exact = value_type("float32")
    return [(s, loss_change(layer, combination, s, exact)) for s in levels(combination)]


def format_errors(layer: Layer, combination: Combination) -> list[tuple[str, float]]:
    """``sensitivity``: what each of the formats costs the dense layer, as the method rounds it."""
    check_finite(layer)
    return [(v.name, loss_change(layer, combination, 0.0, v)) for v in combination.formats]


def tries(combination: Combination) -> int:
    """How often each layer is tried for the allocation ``sensitivity``."""
    return len(combination.formats or levels(combination))


def levels(combination: Combination) -> list[float]:
    """Sparsities at which layers are tried: around the one asked for, or N:M's own."""
    sparsity = combination.sparsity
    if isinstance(combination.pattern, NM):
        return [sparsity]
    less = [sparsity * share for share in (0.4, 0.7, 0.85, 1.0)]
    return less + [1 - (1 - sparsity) * share for share in (0.8, 0.6, 0.4)]


def loss_change(layer: Layer, combination: Combination, sparsity: float, values: ValueType) -> float:
    """What pruning the layer to ``sparsity`` and rounding it to ``values`` adds to the loss, to second order,
    the method's own updates included: outputs that move by d cost sum_i g_i^2 d_i^2 / 2 a token, g the
    gradient of the loss by outputs, taken as independent of d and of each other (as in K-FAC, Martens &
    Grosse 2015).

    Sums of relative output errors, all layers alike, would let layers that matter little to the loss count
    as much as those that matter most."""
    pruned = combination.method.prune(layer, combination.pattern, sparsity, values, combination.group)
    change, gram = layer.weight - pruned.weight, layer[Gram]
    moved = ((change @ gram.matrix) * change).sum(dim=1) / gram.tokens
    return float((layer[Gradient].squared_outputs(gram).double() * moved.double()).sum() / 2)
