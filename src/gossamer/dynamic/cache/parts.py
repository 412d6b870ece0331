"""States of caches: trees of dataclasses, lists and tensors, counted and changed as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar

from torch import Tensor

Part = TypeVar("Part")
ROOM = 256  # positions that room is made for at once, at least


def tensors(part: Any) -> Iterator[Tensor]:
    """All tensors of a state."""
    if isinstance(part, Tensor):
        yield part
    elif isinstance(part, (list, tuple)):
        for one in part:
            yield from tensors(one)
    elif is_dataclass(part) and not isinstance(part, type):
        for field in fields(part):
            yield from tensors(getattr(part, field.name))


def mapped(part: Part, change: Callable[[Tensor], Tensor]) -> Part:
    """The state with each of its tensors changed."""
    if isinstance(part, Tensor):
        return change(part)  # type: ignore[return-value]
    if isinstance(part, (list, tuple)):
        return type(part)(mapped(one, change) for one in part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: mapped(getattr(part, f.name), change) for f in fields(part)})
    return part


def nbytes(part: Any) -> int:
    """Bytes of the memory behind all tensors of a state, of which views may show but a part."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors(part)}
    return sum(storage.nbytes() for storage in storages.values())


@dataclass(frozen=True)
class Grown:
    """Positions ``(batch, heads, length, dim)`` in a buffer that has room for more."""

    buffer: Tensor
    length: int = 0

    @property
    def filled(self) -> Tensor:
        return self.buffer[:, :, : self.length]

    def append(self, x: Tensor) -> Grown:
        """With ``x`` behind: in place where there is room, else in a buffer an eighth larger."""
        length, buffer = self.length + x.shape[2], self.buffer
        if length > buffer.shape[2]:
            room = max(length + length // 8, length + ROOM)
            buffer = x.new_empty((*x.shape[:2], room, x.shape[3]))
            buffer[:, :, : self.length] = self.filled
        buffer[:, :, self.length : length] = x
        return Grown(buffer, length)

    def cut(self, length: int) -> Grown:
        return Grown(self.buffer, min(length, self.length))


def split(x: Tensor, dim: int, *sizes: int) -> Tensor:
    """``x`` with its dimension ``dim`` (not negative) as several of ``sizes``, one of which may be -1."""
    return x.reshape(*x.shape[:dim], *sizes, *x.shape[dim + 1 :])
