"""What runs beside every claim of pruning: random and magnitude masks, and the dense model in equal bytes."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from gossamer.claim import Experiment
from gossamer.matrices import most_bytes, value_type
from gossamer.matrices.values import ValueType
from gossamer.prune import METHODS, check_combination
from gossamer.sparse import Block
from gossamer.sparse.allocate import ALLOCATIONS

DENSE = ("bfloat16", "int8", "nl4", "nl3")  # the widest first, of equal widths the nearest to the model
SHAPE = (1024, 1024)  # a weight of which bytes are counted
PREFIX = "dense_"


def with_baselines(name: str, experiment: Experiment) -> Experiment:
    """The experiment of the claim of ``name``, of a pruning method or an allocation with its baselines."""
    if name not in METHODS and name not in ALLOCATIONS:
        return experiment
    against = (*experiment.against, "random", "magnitude")
    values = equal_bytes(experiment)
    if values is None:
        return replace(experiment, against=against)
    dense = {"method": "obs", "pattern": "unstructured", "sparsity": 0.0, "values": values}
    contender = f"{PREFIX}{values}"
    return replace(
        experiment,
        against=(*against, contender),
        compressed={**experiment.compressed, contender: {**dense, "allocation": "uniform"}},
    )


def equal_bytes(experiment: Experiment) -> str | None:
    """The widest number format in which all weights take no more bytes than those that the experiment keeps;
    None where nothing is pruned, or no format is so narrow."""
    asked = check_combination(
        "magnitude", pattern=experiment.pattern, sparsity=experiment.sparsity, values=experiment.values
    )
    if not asked.sparsity:
        return None
    pattern = asked.pattern
    steps = isinstance(pattern, Block) and pattern.rows % 16 == 0 and pattern.cols % 4 == 0
    room = _bytes(1 - asked.sparsity, asked.values, "16x4" if steps else "bitmap")
    return next((one for one in DENSE if _bytes(1.0, value_type(one), "dense") <= room), None)


def _bytes(density: float, values: ValueType, layout: str) -> int:
    return sum(most_bytes(SHAPE, round(density * prod(SHAPE)), values, layout).values())
