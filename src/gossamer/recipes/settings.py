"""Settings that people write, checked against their model: one sentence in place of a validator's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from gossamer.errors import GossamerError

M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], settings: Mapping[str, Any], where: str = "the setting") -> M:
    """``settings`` as a ``model``; raises GossamerError that names the first wrong one and what it may be."""
    try:
        return model.model_validate(dict(settings))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(_owner(model, first["loc"]).model_fields))
            raise GossamerError(f"{where} {name}: there is no such setting (there are: {known})") from None
        raise GossamerError(f"{where} {name}: {first['msg']}") from None


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
