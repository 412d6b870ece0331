"""Settings that people write, checked against their model: one sentence in place of a validator's report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from gossamer.errors import GossamerError

M = TypeVar("M", bound=BaseModel)


def checked(model: type[M], settings: Mapping[str, Any], where: str = "the setting") -> M:
    """``settings`` as a ``model``; raises GossamerError that names the first wrong one and what it may be."""
    try:
        return model(**settings)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        if first["type"] == "extra_forbidden":
            known = ", ".join(sorted(model.model_fields))
            raise GossamerError(f"{where} {name}: there is no such setting (there are: {known})") from None
        raise GossamerError(f"{where} {name}: {first['msg']}") from None
