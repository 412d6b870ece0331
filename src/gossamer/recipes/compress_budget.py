"""What a compression's budget leaves its layers, and what each of them costs at every sparsity.

A budget of bytes is one of the whole weight file: linears as they are packed, embeddings, head, norms and the
header; one of bits is of the linears alone, on average over their weights. A budget of time is one of a
token's products with the linears, as timed on this machine.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from gossamer.bench.token_times import token_times
from gossamer.errors import MethodError, ResumeError
from gossamer.matrices import most_bytes, value_type
from gossamer.matrices.geometry import GROUP, PANEL, SECTION_DTYPES
from gossamer.matrices.storage import file_bytes
from gossamer.models.checkpoint_writer import METADATA
from gossamer.models.skeleton import WeightFiles, stored_dtype
from gossamer.progress import Progress
from gossamer.prune import Combination
from gossamer.sparse import NM, Block
from gossamer.sparse.allocate import LayerInfo
from gossamer.sparse.budget import Budget, amount_text
from gossamer.sparse.masks import most_kept

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARSEST = 0.95  # of every layer: the least that a budget may ask for
TIMED = (0.25, 0.5, 0.75, SPARSEST)  # sparsities at which products are timed, and straight lines between
ROUNDED = 1 + 1e-9  # sums of times and bits are
TIMINGS = "timings.json"  # in the work folder, so that a resumed run has the same

Shape = tuple[int, ...]
Choice = float | str  # a sparsity, or one of the formats that compete
Cost = Callable[[Any], float]


@dataclass(frozen=True)
class Prices:
    """``costs``: of a layer of each shape by sparsity, or by format where several compete, bytes or seconds,
    of which the budget's unit is ``unit``; ``beside``: bytes of all that is no linear; ``timings``: what was
    measured, as JSON; ``fixed``: the pattern's own sparsity, if it has one; ``formats``: those that
    compete."""

    budget: Budget
    layers: tuple[LayerInfo, ...]
    costs: Mapping[Shape, Cost]
    beside: float = 0.0
    timings: Any = None
    fixed: float | None = None
    formats: tuple[str, ...] = ()
    unit: float = 1.0

    @property
    def amount(self) -> float:
        """What all may cost together."""
        exact = self.budget.amount * self.unit
        return exact if self.budget.measure == "bytes" else exact * ROUNDED

    @property
    def left(self) -> float:
        """What the linears may cost together."""
        return self.amount - self.beside

    def cost(self, layer: LayerInfo, choice: Choice) -> float:
        """What ``layer`` costs: bytes, or seconds of a token, which goes to some of a mixture's experts."""
        return self.costs[layer.shape](choice) * (layer.reached if self.budget.measure == "seconds" else 1)

    def total(self, choices: Mapping[str, Any]) -> float:
        """What all costs with ``choices`` of the linears (None: dense)."""
        return self.beside + math.fsum(self.cost(layer, choices[layer.name] or 0.0) for layer in self.layers)

    def uniform(self, choice: Choice) -> float:
        """What all costs with the same ``choice`` of every linear."""
        return self.total({layer.name: choice for layer in self.layers})

    @property
    def ends(self) -> tuple[Choice, Choice]:
        """The choice with which all costs least, and that with which it costs most."""
        if self.formats:
            return min(self.formats, key=self.uniform), max(self.formats, key=self.uniform)
        return SPARSEST if self.fixed is None else self.fixed, 0.0

    @property
    def least(self) -> float:
        return self.uniform(self.ends[0])

    @property
    def most(self) -> float:
        return self.uniform(self.ends[1])

    def sparsity(self) -> float:
        """The least sparsity, in hundredths of a percent, that keeps the budget where all layers have it."""
        if self.formats or self.fixed is not None:
            return self.fixed or 0.0
        low, high = -1, round(SPARSEST * 10_000)
        while high - low > 1:
            middle = (low + high) // 2
            kept = self.uniform(middle / 10_000) <= self.amount
            low, high = (low, middle) if kept else (middle, high)
        return high / 10_000

    def check(self) -> None:
        """Raises MethodError where the budget is out of reach, with what is in reach."""
        if self.least <= self.amount <= self.most * ROUNDED**2:
            return
        kind, dense, instead = self.budget.measure, "dense", "--sparsity 0 quantizes only"
        pruned = f"all pruned to {100 * SPARSEST:g} %" if self.fixed is None else "all in the pattern"
        asked = "no pruning"
        if self.formats:
            low, high = self.ends
            pruned, dense, asked = f"all in {low}", f"in {high}", f"no fewer bits than {high}"
            instead = f"--values {high} --sparsity 0 is that"
        what = "the weight file takes"
        if kind == "bits":
            what = "a weight in the linears takes"
        if kind == "seconds":
            what = "a token's products with the linears take on this machine"
        least, most = (amount_text(amount / self.unit, kind) for amount in (self.least, self.most))
        if self.amount > self.most:
            raise MethodError(
                f"the budget {self.budget} asks for {asked}: {what} {most} with all layers {dense}; {instead}"
            )
        rest = f"; all but linears takes {amount_text(self.beside, kind)} of it" if kind == "bytes" else ""
        raise MethodError(
            f"the budget {self.budget} is out of reach: "
            f"{what} from {least} ({pruned}) to {most} (all {dense}){rest}"
        )

    def record(self, choices: Mapping[str, Any]) -> dict[str, Any]:
        """What a checkpoint says of its budget: bytes or bits at most, or seconds as timed."""
        told: dict[str, Any] = {"asked": self.budget.text, "measure": self.budget.measure}
        found = {"expected": self.total(choices), "least": self.least, "most": self.most}
        told |= {name: amount / self.unit for name, amount in found.items()}
        return told if self.timings is None else {**told, "timings": self.timings}


def find_prices(
    budget: Budget,
    combination: Combination,
    layers: Sequence[LayerInfo],
    beside: Mapping[str, Tensor],
    work: Path,
    progress: Progress,
) -> Prices:
    """The prices of ``layers``, checked against ``budget``. ``beside``: all else that will be stored, on the
    meta device; ``work``: the folder that may hold timings of an earlier run. Raises MethodError where the
    budget is out of reach."""
    fixed = combination.pattern.sparsity if isinstance(combination.pattern, NM) else None
    shapes = Counter(layer.shape for layer in layers)
    timings, rest, unit = None, 0.0, 1.0
    costs: dict[Shape, Cost]
    if budget.measure != "seconds":
        price = _format_bytes if combination.formats else _bytes_of
        costs = {shape: price(shape, combination) for shape in shapes}
        if budget.measure == "bytes":
            rest = float(_bytes_beside(layers, beside, combination))
        else:
            unit = sum(layer.size for layer in layers) / 8
    else:
        timings = _timings(shapes, combination, fixed, work, progress)
        at = timings["sparsities"]
        costs = {tuple(one["shape"]): _seconds_of(at, one["seconds"]) for one in timings["products"]}
    formats = tuple(values.name for values in combination.formats)
    prices = Prices(budget, tuple(layers), costs, rest, timings, fixed, formats, unit)
    prices.check()
    return prices


def stored_beside(
    model: PreTrainedModel,
    files: WeightFiles,
    edges: Mapping[str, Sequence[str]],
    layers: Sequence[LayerInfo],
    values: str,
    group: int,
) -> dict[str, Tensor]:
    """All tensors but the linears' as a checkpoint of the skeleton ``model`` will hold them, on the meta
    device: ``edges`` (names that share one tensor) dense in ``values``, all others as they are."""
    found: dict[str, Tensor] = {}
    packed = {name for names in edges.values() for name in names} | {f"{la.name}.weight" for la in layers}
    for name in edges:
        out, width = model.get_parameter(name).shape
        sizes = most_bytes((out, width), out * width, value_type(values), "dense", group)
        found |= _sections(name, sizes)
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in packed:
            found[name] = torch.empty(tensor.shape, dtype=stored_dtype(tensor, name, files), device="meta")
    return found


def _sections(name: str, sizes: Mapping[str, int]) -> dict[str, Tensor]:
    return {
        f"{name}.{section}": torch.empty(
            size // SECTION_DTYPES[section].itemsize, dtype=SECTION_DTYPES[section], device="meta"
        )
        for section, size in sizes.items()
    }


def _bytes_beside(layers: Sequence[LayerInfo], beside: Mapping[str, Tensor], combination: Combination) -> int:
    """Bytes of the weight file without the linears, its header with their names included."""
    layout, found = "dense" if combination.formats else "bitmap", 0
    for values in combination.stored:
        linears: dict[str, Tensor] = {}
        for layer in layers:
            sizes = most_bytes(_plain(layer.shape), layer.size, values, layout, combination.group)
            linears |= _sections(f"{layer.name}.weight", sizes)
        whole = file_bytes({**beside, **linears}, metadata=METADATA)
        found = max(found, whole - sum(tensor.nbytes for tensor in linears.values()))
    return found


def _format_bytes(shape: Shape, combination: Combination) -> Cost:
    """Bytes of a dense linear in each of the formats that compete."""
    plain, size, group = _plain(shape), math.prod(shape), combination.group
    found = {v.name: sum(most_bytes(plain, size, v, "dense", group).values()) for v in combination.formats}
    return found.__getitem__


def _bytes_of(shape: Shape, combination: Combination) -> Cost:
    """Bytes at most of a linear in the layout that `choose_layout` takes."""
    plain, c, pattern = _plain(shape), combination, combination.pattern
    dense = sum(most_bytes(plain, math.prod(plain), c.values, "dense", c.group).values())
    # by chance or in one group of inputs a layout of fixed size is taken, which stores padded outputs
    layout, covered, first = "bitmap", (-(-plain[0] // PANEL) * PANEL, plain[1]), 0.0
    if isinstance(pattern, NM):
        first = pattern.sparsity
        if GROUP % pattern.m == 0 and plain[1] >= GROUP and pattern.n < pattern.m:
            layout = f"{GROUP // pattern.m * pattern.n}:64"
    elif isinstance(pattern, Block) and pattern.rows % 16 == 0 and pattern.cols % 4 == 0:
        layout = "16x4"  # stores blocks that a border cuts off whole
        covered = (-(-plain[0] // pattern.rows) * pattern.rows, -(-plain[1] // pattern.cols) * pattern.cols)

    def cost(sparsity: float) -> float:
        if sparsity == 0 or sparsity < first:
            return dense
        kept = most_kept(covered, pattern, sparsity)
        return min(dense, sum(most_bytes(plain, kept, c.values, layout, c.group).values()))

    return cost


def _timings(
    shapes: Mapping[Shape, int], combination: Combination, fixed: float | None, work: Path, progress: Progress
) -> dict[str, Any]:
    """Seconds of products, dense and at some sparsities: those of an earlier run in ``work``, or measured."""
    path = work / TIMINGS
    try:
        if path.exists():
            held: dict[str, Any] = json.loads(path.read_text())
            return held
    except (OSError, ValueError) as error:
        raise ResumeError(f"{TIMINGS} in {work.name} is damaged; delete {work.name}") from error
    c, sparsities = combination, TIMED if fixed is None else (fixed,)
    counts = {_plain(shape): count for shape, count in shapes.items()}
    found = token_times(counts, c.values.name, str(c.pattern), sparsities, c.group, progress=progress)
    products = [{"shape": list(shape), "seconds": seconds} for shape, seconds in found.seconds.items()]
    return {"sparsities": list(sparsities), "products": products, "other_work": found.other_work}


def _seconds_of(sparsities: Sequence[float], seconds: Sequence[float]) -> Cost:
    """Seconds of a product: dense or sparse, whichever is faster, straight lines between what was timed.
    Below the least sparsity that was timed: dense; noise that lets time rise with sparsity is levelled."""
    dense, *sparse = seconds
    falling = list(accumulate(sparse, min))

    def cost(sparsity: float) -> float:
        if sparsity < sparsities[0]:
            return dense
        return min(dense, float(np.interp(sparsity, sparsities, falling)))

    return cost


def _plain(shape: Shape) -> tuple[int, int]:
    out, width = shape
    return out, width
