"""Settings that people write, checked against their model: one sentence in place of a validator's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from gossamer.errors import GossamerError
from gossamer.registry import did_you_mean

M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], settings: Mapping[str, Any], where: str = "the setting") -> M:
    """``settings`` as a ``model``; raises GossamerError that names each wrong one, a line each, and what it
    may be: unknown names first, since one that is misspelt is missing too."""
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        found = sorted(error.errors(), key=lambda one: one["type"] != "extra_forbidden")
        told = [f"{where} {_sentence(model, one['type'], one['loc'], one['msg'])}" for one in found]
        raise GossamerError("\n".join(told)) from None


def _sentence(model: type[BaseModel], kind: str, place: tuple[int | str, ...], message: str) -> str:
    name = ".".join(map(str, place))
    if kind != "extra_forbidden":
        return f"{name}: {message}"
    known = sorted(_owner(model, place).model_fields)
    told = [did_you_mean(str(place[-1]), known), f"there are: {', '.join(known)}"]
    return f"{name}: there is no such setting ({' '.join(filter(None, told))})"


def _owner(model: type[BaseModel], place: tuple[int | str, ...]) -> type[BaseModel]:
    """The model within ``model`` that has, or lacks, the last name of ``place``."""
    for name in place[:-1]:
        field = model.model_fields.get(str(name))
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return model
        model = inner[0]
    return model
