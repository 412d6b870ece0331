"""What all allocations share: the layers that they see, their form, and the table of their names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gossamer.claim import Claim
from gossamer.registry import Registry, with_options

ANY_SPARSITY = ("unstructured", "RxC blocks", "channels")
OF_METHOD = "what the method needs"


@dataclass(frozen=True)
class LayerInfo:
    """What an allocation may know of a layer.

    ``shape``: (out, in), or (out, in, height, width) of a kernel. ``scores`` gives the layer's scores, one
    for each unit that the pattern keeps or prunes whole (weights, blocks or channels), as a flat float32
    tensor; it is called as often as needed, so that scores may lie on disk. ``outliers``: the share of
    outliers in the layer's ``block``. ``curve``: (sparsity, error) as measured, errors comparable between
    layers. ``formats``: in place of a curve, (name, error) of each number format that it may have, dense.
    ``costs``: what the layer costs at a sparsity, or in a format, in whatever a budget is of; never rising
    with sparsity, perhaps falling in steps (None: the weights that it keeps). ``reached``: the share of
    tokens that it reads.
    """

    name: str
    shape: tuple[int, ...]
    scores: Callable[[], Tensor] | None = None
    block: str = ""
    outliers: float | None = None
    curve: tuple[tuple[float, float], ...] = ()
    formats: tuple[tuple[str, float], ...] = ()
    costs: Callable[[Any], float] | None = None
    reached: float = 1.0

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def cost(self, choice: Any) -> float:
        """What the layer costs at a sparsity, or in a format."""
        return (1 - choice) * self.size if self.costs is None else self.costs(choice)


class Allocation:
    """A way to share one sparsity out over layers: ``(layers, sparsity) -> {name: sparsity}``, where None
    leaves a layer dense.

    ``needs``: what is measured beforehand; ``accepts``: patterns; ``group``: where scores compete. A budget
    of anything else that layers cost (bytes, time) is split by `least_error`, of which `Sensitivity` is the
    case of kept weights.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    accepts: ClassVar[tuple[str, ...]] = ANY_SPARSITY
    group: ClassVar[str] = "the method's own"
    claim: ClassVar[Claim]

    def __call__(self, layers: Sequence[LayerInfo], sparsity: float) -> dict[str, float | None]:
        raise NotImplementedError


ALLOCATIONS: Registry[Allocation] = Registry(
    "allocation",
    {
        "er": "gossamer.sparse.allocate.er",
        "erk": "gossamer.sparse.allocate.erk",
        "global": "gossamer.sparse.allocate.compete",
        "owl": "gossamer.sparse.allocate.owl",
        "sensitivity": "gossamer.sparse.allocate.sensitivity",
        "uniform": "gossamer.sparse.allocate.uniform",
    },
)


def allocation(name: str, options: Mapping[str, Any] | None = None) -> Allocation:
    """The allocation called ``name`` with its options; raises MethodError for an unknown name or option."""
    return with_options(ALLOCATIONS[name], options or {}, f"the allocation {name}")
