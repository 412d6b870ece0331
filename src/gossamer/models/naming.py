"""Which stored tensors make up which tensor of a model: mostly the one of the same name.

Checkpoints of the bare body leave the prefix of the base model out; older ones have other names; mixtures of
experts are stored expert by expert and held fused. The rules for those are transformers' own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from gossamer.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Read(Protocol):
    """Gives a stored tensor by its name, or one member of it alone, by its place in the first dimension."""

    def __call__(self, name: str, index: int | None = None, /) -> Tensor: ...


@dataclass(frozen=True)
class Source:
    """The stored tensors, by name, that one tensor of a model is made of. ``convert`` makes it, given a
    function that reads stored tensors; None where the only one is taken as it is. ``member``: what one member
    of a stack that is converted is made of."""

    names: tuple[str, ...]
    convert: Callable[[_Read], Tensor] | None = None
    member: Callable[[int], Source] | None = None

    def read(self, read: _Read) -> Tensor:
        """The tensor; ``read`` gives a stored tensor by its name."""
        return read(self.names[0]) if self.convert is None else self.convert(read)

    def of_expert(self, index: int, turned: bool) -> Source:
        """Of a tensor that stacks experts the one at ``index``, ``turned``: transposed. Where experts are
        stored one by one, no other is read."""
        one = self.member(index) if self.member is not None else None

        def convert(read: _Read) -> Tensor:
            if one is not None:
                made = one.read(read)
            else:
                made = read(self.names[0], index) if self.convert is None else self.convert(read)[index]
            return made.T.contiguous() if turned else made

        return Source(self.names if one is None else one.names, convert)


def state_of(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter under each of its names, and every buffer that is saved."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield join(prefix, name), parameter
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield join(prefix, name), buffer


def join(prefix: str, name: str) -> str:
    """``prefix.name``, or ``name`` under an empty prefix."""
    return f"{prefix}.{name}" if prefix else name


def sources(model: PreTrainedModel, stored: Iterable[str]) -> dict[str, Source]:
    """Names in ``model`` to what they are made of. ``stored``: the names in the checkpoint; those that the
    model has no place for appear under a name that it does not have."""
    stored = list(stored)
    wanted = dict(state_of(model))
    found = {_with_prefix(name, model.base_model_prefix, wanted): Source((name,)) for name in stored}
    tied = {id(wanted[name]) for name in found if name in wanted}
    if all(id(tensor) in tied for tensor in wanted.values()):
        return found
    return _converted(model, stored, wanted)


def _with_prefix(name: str, base: str, wanted: dict[str, Tensor]) -> str:
    if name in wanted:
        return name
    for other in (f"{base}.{name}", name.removeprefix(f"{base}.")):
        if other in wanted:
            return other
    return name


def _converted(model: PreTrainedModel, stored: list[str], wanted: dict[str, Tensor]) -> dict[str, Source]:
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )
    except ImportError as error:
        raise ModelError(
            f"the weights of {type(model).__name__} are stored in another form than it holds them in, "
            f"and this release of transformers does not say how ({error})"
        ) from error

    rules = get_model_conversion_mapping(model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
    found: dict[str, Source] = {}
    collected: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters)
        target = _with_prefix(target, model.base_model_prefix, wanted)
        if target not in wanted and name in wanted:
            target, pattern = name, None
        if pattern is None:
            found[target] = Source((name,))
        else:
            collected.setdefault(target, []).append((name, pattern))
    for first, parts in collected.items():
        rule = by_pattern[parts[0][1]]
        names = tuple(name for name, _ in parts)
        for pattern in rule.target_patterns:
            target = first.replace(rule.target_patterns[0], pattern)
            convert = partial(_conversion, model, rule, first, target)
            found[target] = Source(names, convert(parts), partial(_member, convert, parts))
    return found


def _member(
    convert: Callable[[list[tuple[str, str]]], Callable[[_Read], Tensor]],
    parts: list[tuple[str, str]],
    index: int,
) -> Source:
    """Of tensors that are stored one by one and stacked, those at ``index``; of others the whole."""
    its = [(name, pattern) for name, pattern in parts if _number(name, pattern) in (index, None)]
    stacked = any(_number(name, pattern) == index for name, pattern in its)
    made = convert(its)
    return Source(tuple(name for name, _ in its), lambda read: made(read)[0 if stacked else index])


def _number(name: str, pattern: str) -> int | None:
    """What stands in ``name`` for the star of the rule's ``pattern``; None where there is none."""
    before, star, after = pattern.partition("*")
    found = re.search(f"{before}(\\d+){after}", name) if star else None
    return int(found.group(1)) if found else None


def _conversion(
    model: PreTrainedModel, rule: Any, first: str, target: str, parts: list[tuple[str, str]]
) -> Callable[[_Read], Tensor]:
    def convert(read: _Read) -> Tensor:
        ready = deepcopy(rule)
        for name, pattern in parts:
            ready.add_tensor(first, name, pattern, lambda name=name: read(name))
        try:
            made: Tensor | list[Tensor] = ready.convert(first, model=model, config=model.config)[target]
        except Exception as error:
            names = ", ".join(name for name, _ in parts[:3])
            raise ModelError(f"the tensor {target} cannot be made from {names}, ...: {error}") from error
        return made[0] if isinstance(made, list) else made

    return convert
