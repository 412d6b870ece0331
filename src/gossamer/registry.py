"""Names to classes, imported only when asked for: hundreds of methods cost nothing at start."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import is_dataclass
from importlib import import_module
from inspect import signature
from math import isfinite
from types import NoneType
from typing import Any, Generic, TypeVar, get_args, get_type_hints

from gossamer.errors import MethodError

T = TypeVar("T")


class Registry(Generic[T]):
    """A lazy table of named classes.

    ``index`` maps each name to the module that registers it. A module registers its class with
    ``@registry.register(name, cite=...)`` when it is imported, which happens at the first look-up.
    """

    def __init__(self, kind: str, index: dict[str, str]) -> None:
        self.kind = kind
        self.index = dict(index)
        self.citations: dict[str, str] = {}
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str, *, cite: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: adds the class under ``name``; raises MethodError where the name is taken."""

        def add(cls: type[T]) -> type[T]:
            taken = self._classes.get(name)
            if taken is not None and (taken.__module__, taken.__qualname__) != (
                cls.__module__,
                cls.__qualname__,
            ):
                raise MethodError(f"the {self.kind} {name!r} is registered twice: {taken} and {cls}")
            self._classes[name] = cls
            self.index.setdefault(name, cls.__module__)
            self.citations[name] = cite
            cls.name = name  # type: ignore[attr-defined]
            return cls

        return add

    def __getitem__(self, name: str) -> type[T]:
        if name not in self._classes:
            if name not in self.index:
                meant = did_you_mean(name, self.index)
                hint = f"; {meant}" if meant else ""
                raise MethodError(
                    f"unknown {self.kind} {name!r}{hint} (there are: {', '.join(sorted(self.index))})"
                )
            import_module(self.index[name])
        return self._classes[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.index))

    def __contains__(self, name: object) -> bool:
        return name in self.index


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A question with the one of ``known`` that is most like ``name``; empty where none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean {near[0]!r}?" if near else ""


def with_options(kind: Callable[..., T], options: Mapping[str, Any], what: str) -> T:
    """``kind(**options)``; raises MethodError, in which ``what`` names the kind, for options that it does not
    have, with those that it has, and for values of another type."""
    known = list(signature(kind).parameters)
    for name in options:
        if name not in known:
            there_are = f"there are: {', '.join(known)}" if known else "it has none"
            raise MethodError(f"{what} does not take these options: there is no {name!r} ({there_are})")
    _check_types(kind, options, what)
    try:
        return kind(**options)
    except TypeError as error:
        told = ", ".join(f"{name}={value!r}" for name, value in options.items())
        raise MethodError(f"{what} does not take these options: {told} ({error})") from None


_PLAIN = {
    bool: "true or false",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    NoneType: "none",
}


def _check_types(kind: Callable[..., Any], options: Mapping[str, Any], what: str) -> None:
    """Raises MethodError for a value that is none of the plain types which its field of a dataclass names."""
    if not is_dataclass(kind):
        return
    hints = get_type_hints(kind)
    for name, value in options.items():
        wanted = get_args(hints[name]) or (hints[name],)
        if all(one in _PLAIN for one in wanted) and not any(_is_one(value, one) for one in wanted):
            allowed = " or ".join(_PLAIN[one] for one in wanted)
            raise MethodError(f"{what} takes as {name} {allowed}, got {value!r}")


def _is_one(value: Any, wanted: type[Any]) -> bool:
    if wanted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value)
    return type(value) is wanted
