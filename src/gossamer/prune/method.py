"""What a pruning method is: scores or a solver, what it needs, what it accepts, what its paper claims."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from gossamer.calibrate import InputNorm, Statistic
from gossamer.claim import Claim
from gossamer.errors import MethodError, ModelError
from gossamer.matrices.values import Quantized, ValueType, check_group, quantize, value_types
from gossamer.registry import Registry, with_options
from gossamer.sparse import NM, Block, Channel, Pattern, Unstructured, mask_from_scores, parse_pattern
from gossamer.sparse.allocate import Allocation, allocation
from gossamer.sparse.allocate.uniform import UNIFORM
from gossamer.sparse.budget import Budget, parse_budget
from gossamer.sparse.masks import resolve_sparsity

S = TypeVar("S", bound=Statistic)


@dataclass
class Layer:
    """One linear layer as a method sees it: ``weight`` float32 ``(out, in)`` and its statistics."""

    name: str
    weight: Tensor
    statistics: dict[type[Statistic], Statistic] = field(default_factory=dict)

    def __getitem__(self, kind: type[S]) -> S:
        if kind not in self.statistics:
            raise MethodError(f"{self.name} has no {kind.__name__}: the method must name it in `needs`")
        found = self.statistics[kind]
        assert isinstance(found, kind)
        return found


@dataclass
class Pruned:
    """What a method makes of a layer: the new ``weight`` (float32, as it will be multiplied), its
    ``mask`` (None: dense), its integer codes where the values are integers, and what it recorded.
    ``outliers``: bool ``(in,)``, inputs whose columns are kept apart in bfloat16 (None: none are); codes are
    of the others alone."""

    weight: Tensor
    mask: Tensor | None
    quantized: Quantized | None = None
    record: dict[str, Any] = field(default_factory=dict)
    outliers: Tensor | None = None


@dataclass
class Method:
    """Base of all methods: declares what it needs and accepts, so that a bad combination fails at once."""

    name: ClassVar[str] = ""
    needs: ClassVar[tuple[type[Statistic], ...]] = ()
    accepts: ClassVar[tuple[type[Pattern], ...]] = (Unstructured, NM, Block, Channel)
    comparison_group: ClassVar[str] = "row"  # what plain "unstructured" means in the method's paper
    finds_masks: ClassVar[bool] = False  # in the weights themselves: neither pattern nor sparsity is asked
    claim: ClassVar[Claim | None] = None

    def scores(self, layer: Layer) -> Tensor:
        """How much each weight is worth keeping, float32 ``(out, in)``, higher = keep; of methods that find
        their masks otherwise there are none."""
        raise NotImplementedError

    @property
    def has_scores(self) -> bool:
        """Whether masks come from scores, so that layers may compete by them."""
        return type(self).scores is not Method.scores

    def prune(
        self,
        layer: Layer,
        pattern: Pattern,
        sparsity: float,
        values: ValueType,
        group: int,
    ) -> Pruned:
        """The layer pruned to ``sparsity`` in ``pattern``, its kept weights in ``values`` (scales per
        ``group`` inputs where they are integers)."""
        raise NotImplementedError


class ScoreMethod(Method):
    """A method that is its scores: the mask keeps the highest, the values are rounded to nearest."""

    def prune(
        self,
        layer: Layer,
        pattern: Pattern,
        sparsity: float,
        values: ValueType,
        group: int,
    ) -> Pruned:
        mask = None if sparsity == 0 else mask_from_scores(self.scores(layer), pattern, sparsity)
        importance = layer[InputNorm].norm.square() if InputNorm in layer.statistics else None
        return round_values(layer.weight, mask, values, group, importance)


def round_values(
    weight: Tensor, mask: Tensor | None, values: ValueType, group: int, importance: Tensor | None = None
) -> Pruned:
    """``weight`` under ``mask``, rounded to nearest in ``values``; the scales of integers minimise the
    squared error weighted by ``importance`` ``(in,)``."""
    kept = weight if mask is None else weight * mask
    if values.is_integer:
        codes = quantize(kept, values, group=group, mask=mask, importance=importance)
        return Pruned(codes.to_dense(), mask, codes, {"clamped_scales": codes.clamped})
    return Pruned(kept.to(getattr(torch, values.name)).float(), mask)


METHODS: Registry[Method] = Registry(
    "pruning method",
    {
        "random": "gossamer.prune.random",
        "random_search": "gossamer.prune.random_search",
        "magnitude": "gossamer.prune.magnitude",
        "wanda": "gossamer.prune.wanda",
        "ria": "gossamer.prune.ria",
        "taylor": "gossamer.prune.taylor",
        "fisher": "gossamer.prune.fisher",
        "dsnot": "gossamer.prune.dsnot",
        "obs": "gossamer.prune.obs",
        "admm": "gossamer.prune.admm",
        "zeros": "gossamer.prune.zeros",
    },
)
FORMATS: Registry[Any] = Registry("number format", {"llm_int8": "gossamer.prune.outliers"})
ALIASES = {"sparsegpt": "obs", "gptq": "obs"}


def _own(name: str) -> str:
    return ALIASES.get(name, name)


def method(name: str, **options: Any) -> Method:
    """The method called ``name`` with its options; raises MethodError for an unknown name or option."""
    found = METHODS[_own(name)]
    return with_options(found, options, f"the method {name}")


def seeded(name: str, seed: int, options: Mapping[str, Any]) -> Method:
    """The `method` with its ``options``; ``seed`` is that of one that draws, unless they have one."""
    draws = any(one.name == "seed" for one in fields(METHODS[ALIASES.get(name, name)]))
    return method(name, **({"seed": seed} if draws else {}) | dict(options))


@dataclass(frozen=True)
class Combination:
    """A checked combination of method, pattern, sparsity, allocation and values. ``budget``: what decides
    the sparsity, which is 0 (or N:M's own) then; ``formats``: where it decides each layer's values in its
    place, those to choose from, ``values`` the first of them; ``split``: the allocation with its options."""

    method: Method
    pattern: Pattern
    sparsity: float
    allocation: str
    values: ValueType
    group: int
    budget: Budget | None = None
    formats: tuple[ValueType, ...] = ()
    split: Allocation = UNIFORM

    @property
    def stored(self) -> tuple[ValueType, ...]:
        """All formats that layers may get."""
        return self.formats or (self.values,)

    @property
    def pattern_name(self) -> str | None:
        """The pattern as checkpoints tell it: none where masks are found in the weights."""
        return None if self.method.finds_masks else str(self.pattern)

    @property
    def prunes(self) -> bool:
        """Whether anything may be pruned."""
        return (self.budget is not None and not self.formats) or self.sparsity > 0


DEFAULT_PATTERN = "32:64"  # of jobs that are asked for neither a pattern nor a sparsity


def pattern_asked(
    method_name: str, pattern: str | None, sparsity: float | None, budget: str | None = None
) -> str | None:
    """The ``pattern``, or where nothing says how sparse layers become DEFAULT_PATTERN; None for a method that
    finds masks."""
    if (pattern, sparsity, budget) != (None, None, None) or METHODS[_own(method_name)].finds_masks:
        return pattern
    return DEFAULT_PATTERN


def check_combination(
    method_name: str,
    *,
    pattern: str | Pattern | None = None,
    sparsity: float | None = None,
    allocation_name: str = "uniform",
    allocation_options: Mapping[str, Any] | None = None,
    values: str = "float32",
    group: int = 64,
    options: dict[str, Any] | None = None,
    budget: str | None = None,
    seed: int = 0,
) -> Combination:
    """Everything that can be known to be wrong before any work starts.

    ``pattern`` None means unstructured; plain ``"unstructured"`` takes the comparison group of the
    method's paper, or with the allocation global the whole model. ``sparsity`` None is for N:M, which says
    its own, and budgets; where nothing is pruned, the allocation is uniform. ``budget``: bytes, bits a weight
    or time a token, which the allocation sensitivity splits; N:M layers are then dense or in the pattern.
    ``values``: several, such as ``nl4,nl3``, where a budget of bytes or bits chooses one for each layer, all
    dense. ``seed``: of methods that draw, unless their options have one. Raises PatternError, SparsityError,
    MatrixError or MethodError with a sentence.
    """
    chosen = seeded(method_name, seed, options or {})
    if chosen.finds_masks:
        if (pattern, sparsity, budget, allocation_name) != (None, None, None, "uniform"):
            raise MethodError(
                f"{chosen.name} prunes what is zero already: leave pattern, sparsity, allocation and budget "
                "out"
            )
        sparsity = 0.0
    wanted = None if budget is None else parse_budget(budget)
    formats = value_types(values)
    if len(formats) > 1:
        _check_formats(formats, wanted, pattern)
    if wanted is not None and allocation_name != "sensitivity":
        raise MethodError(
            f"the budget {wanted} is split by what each layer's pruning costs: it needs the allocation "
            f"sensitivity, not {allocation_name}"
        )
    if wanted is not None and sparsity is not None:
        raise MethodError(f"the budget {wanted} decides how sparse layers become: leave the sparsity out")
    if pattern is None or pattern == "unstructured":
        pattern = Unstructured("model" if allocation_name == "global" else chosen.comparison_group)
    elif isinstance(pattern, str):
        pattern = parse_pattern(pattern)
    if sparsity is None and not isinstance(pattern, NM):
        if wanted is None:
            raise MethodError(f"{pattern} says no sparsity: give one, such as 0.5 (0 leaves layers dense)")
        sparsity = 0.0
    sparsity = resolve_sparsity(pattern, sparsity)
    if not isinstance(pattern, chosen.accepts):
        accepted = ", ".join(kind.__name__ for kind in chosen.accepts)
        raise MethodError(f"the method {chosen.name} does not accept the pattern {pattern} (only {accepted})")
    if wanted is not None and isinstance(pattern, Channel):
        raise MethodError(
            f"a budget takes unstructured, N:M and block patterns, not {pattern}: no layout is made for it"
        )
    split = allocation(allocation_name, allocation_options)
    if allocation_name != "uniform" and isinstance(pattern, NM) and wanted is None:
        raise MethodError(
            f"{pattern} fixes every layer's sparsity: it cannot be allocated {allocation_name}, save under a "
            "budget, where layers may stay dense"
        )
    compared = getattr(pattern, "group", "")
    if allocation_name != "global" and compared == "model":
        raise MethodError("the comparison group 'model' lets layers compete: it needs allocation 'global'")
    if allocation_name == "global" and compared == "row":
        raise MethodError(
            f"{pattern} gives every row the same sparsity, and the allocation global lets rows compete: use "
            "the comparison group model"
        )
    check_group(group)
    if sparsity == 0 and wanted is None:
        allocation_name, split = "uniform", UNIFORM
    if allocation_name == "global" and not chosen.has_scores:
        raise MethodError(
            f"the masks of {chosen.name} do not come from scores, by which the allocation global lets layers "
            "compete: use another allocation"
        )
    several = formats if len(formats) > 1 else ()
    return Combination(chosen, pattern, sparsity, allocation_name, formats[0], group, wanted, several, split)


def _check_formats(formats: Sequence[ValueType], budget: Budget | None, pattern: object) -> None:
    """Raises MethodError where several formats cannot be chosen from."""
    names = ",".join(one.name for one in formats)
    if len({one.name for one in formats}) < len(formats):
        raise MethodError(f"values name a format twice: {names}")
    if budget is None or budget.measure == "seconds":
        raise MethodError(
            f"the values {names} are several, of which each layer gets one: that takes a budget of bytes "
            "or bits, such as 65MB or 3.5bits, and the allocation sensitivity"
        )
    if pattern is not None:
        raise MethodError(
            f"the values {names} are several, and layers keep all their weights then: leave the pattern "
            f"{pattern} out"
        )


def check_finite(layer: Layer) -> None:
    """Raises ModelError where a weight is NaN or infinite, before it spreads."""
    if not torch.isfinite(layer.weight).all():
        raise ModelError(f"the weight of {layer.name} holds NaN or infinite values: the model is damaged")
