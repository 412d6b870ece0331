"""Which packed weights a model multiplies by, which are of one kind, and the layouts that could hold them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from gossamer.errors import EvaluationError
from gossamer.matrices import Packed, Quantized, packed_bytes, value_type
from gossamer.matrices.geometry import holds, parse_layout
from gossamer.models.walk import find_parts, prunable, weight_of
from gossamer.nn import StructuredLinear
from gossamer.sparse import mask_from_scores, parse_pattern


@dataclass(frozen=True)
class Kind:
    """Weights whose products take the same time.

    ``shape``: ``(out, in)``; ``values``, ``group``, ``layout``: of the packed weight as it is; ``keep``: how
    many of 64 weights it keeps, rounded; ``head``: it is the model's last layer, which sees only the last
    token of a prompt.
    """

    shape: tuple[int, int]
    values: str
    group: int
    layout: str
    keep: int
    head: bool = False

    def __str__(self) -> str:
        out, width = self.shape
        groups = f" in groups of {self.group}" if value_type(self.values).is_integer else ""
        kept = f", {self.keep} of 64 kept" if self.keep < 64 else ""
        return f"{out} x {width} {self.values}{groups}, {self.layout}{kept}"


@dataclass(frozen=True)
class Members:
    """The weights of one kind. ``names``: of the packed leaves, as modules of the model; ``nbytes``: of all
    of them; ``sample``: one of them; ``layouts``: those to choose from, the present one first."""

    names: tuple[str, ...]
    nbytes: int
    sample: Packed
    layouts: tuple[str, ...]


def candidate_layouts(leaves: list[Packed], zeros: bool = False) -> tuple[str, ...]:
    """The layouts that could hold the masks of all ``leaves``, which are of one kind: the present one first,
    dense among them. Sparse ones that would take no fewer bytes than dense are left out; ``zeros``: some
    activations are zero, so columns is a candidate too."""
    one = leaves[0]
    unmasked = ["columns", "dense"] if zeros and holds(parse_layout("columns"), one.value_type) else ["dense"]
    if one.masks is None:  # nothing says which weights were pruned
        return tuple(dict.fromkeys([one.layout, *unmasked]))
    most = max(leaf.most_kept for leaf in leaves)
    others = ["bitmap", *([f"{most}:64"] if 0 < most < 64 else [])]
    mask = one.mask()
    room = packed_bytes(mask, one.value_type, "dense", one.group)
    smaller = [name for name in others if packed_bytes(mask, one.value_type, name, one.group) < room]
    return tuple(dict.fromkeys([one.layout, *smaller, *unmasked]))


def group_leaves(named: Iterable[tuple[str, Packed, bool]], zeros: bool) -> dict[Kind, Members]:
    """Packed leaves by kind, in the order in which the kinds appear; ``named``: name, leaf, and whether it
    belongs to the head; ``zeros``: as :func:`candidate_layouts`."""
    found: dict[Kind, list[tuple[str, Packed]]] = {}
    for name, leaf, head in named:
        out, width = leaf.shape
        keep = round(64 * leaf.kept / (out * width))
        kind = Kind(leaf.shape, leaf.values_name, leaf.group, leaf.layout, keep, head)
        found.setdefault(kind, []).append((name, leaf))
    return {
        kind: Members(
            names=tuple(name for name, _ in members),
            nbytes=sum(leaf.nbytes for _, leaf in members),
            sample=members[0][1],
            layouts=candidate_layouts([leaf for _, leaf in members], zeros),
        )
        for kind, members in found.items()
    }


def packed_leaves(model: nn.Module) -> Iterator[tuple[str, Packed, bool]]:
    """Every packed leaf under a StructuredLinear, once for each product with it."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, StructuredLinear):
            for place, leaf in module.named_modules(prefix=name, remove_duplicate=False):
                if isinstance(leaf, Packed):
                    yield place, leaf, module is head


def made_up_leaves(
    model: nn.Module, values: str, pattern: str | None, sparsity: float | None, group: int
) -> Iterator[tuple[str, Packed, bool]]:
    """Stand-ins for the packed leaves that the prunable layers inside the blocks of ``model`` would become:
    random weights of their shapes, one object a shape. Their parameters may be on the meta device. Raises
    ModelError where the model cannot be walked, PatternError, SparsityError and MatrixError."""
    made: dict[tuple[int, int], Packed] = {}
    for block in find_parts(model).blocks:
        for name, layer in prunable(block).items():
            out, width = weight_of(layer).shape
            if (out, width) not in made:
                made[out, width] = made_up((out, width), values, pattern, sparsity, group)
            yield f"{block.name}.{name}.matrix", made[out, width], False


def made_up(
    shape: tuple[int, int], values: str, pattern: str | None, sparsity: float | None, group: int
) -> Packed:
    """A random weight of ``shape`` (out, in) as it would be packed; neither pattern nor sparsity: dense."""
    generator = torch.Generator().manual_seed(0)
    kind, mask = value_type(values), None
    if pattern is not None or sparsity:
        scores = torch.rand(shape, generator=generator)
        mask = mask_from_scores(scores, parse_pattern(pattern or "unstructured"), sparsity)
    if not kind.is_integer:
        return Packed.pack(torch.randn(shape, generator=generator), values, mask=mask)
    codes = kind.integers(torch.randint(0, 1 << kind.bits, shape, dtype=torch.uint8, generator=generator))
    scales = torch.full((shape[0], -(-shape[1] // group)), 0.01, dtype=torch.float16)
    return Packed.pack(Quantized(codes, scales, group, kind), mask=mask)


def leaves_of(
    model: nn.Module,
    values: str | None,
    pattern: str | None,
    sparsity: float | None,
    group: int,
    zeros: bool = False,
) -> dict[Kind, Members]:
    """What a plan of ``model`` decides on: its packed leaves, or, where ``values`` are named, what its plain
    layers would become; ``zeros``: as :func:`candidate_layouts`. Raises EvaluationError
    where it is the one and the other was asked for."""
    if values is None and (pattern is not None or sparsity is not None):
        raise EvaluationError("a pattern or sparsity is for models that are not packed yet: name values too")
    packed = list(packed_leaves(model))
    if values is None and not packed:
        raise EvaluationError(
            f"{type(model).__name__} holds no packed weights: name the values (and the pattern) that its "
            "layers would have, or plan a checkpoint"
        )
    if values is not None and packed:
        raise EvaluationError(
            f"{type(model).__name__} is packed already, and its own values and masks are planned: leave "
            "values out"
        )
    found = packed if values is None else made_up_leaves(model, values, pattern, sparsity, group)
    return group_leaves(found, zeros)
