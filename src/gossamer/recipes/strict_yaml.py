"""YAML as people mean it: the core of YAML 1.2, in which ``2:4`` is text and a key stands once."""

from __future__ import annotations

import re
from typing import Any

import yaml

from gossamer.errors import RecipeError


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """PyYAML reads YAML 1.1, where ``2:4`` is the number 124, ``no`` is false and ``1e-4`` is text."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML's own way to say it

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is a word", problem_mark=key.start_mark)
            if key.value in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key.value} is there twice", problem_mark=key.start_mark
                )
            seen.add(key.value)
        made: dict[Any, Any] = super().construct_mapping(node, deep)
        return made


_KINDS = {
    "null": (r"~|null|Null|NULL|", "~nN\0", lambda text: None),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF", lambda text: text.lower() == "true"),
    "int": (r"[-+]?[0-9]+", "-+0123456789", int),
    "float": (
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
        "-+.0123456789",
        float,
    ),
}
for _name, (_pattern, _first, _make) in _KINDS.items():
    _tag = f"tag:yaml.org,2002:{_name}"
    _starts = ["" if letter == "\0" else letter for letter in _first]
    _Loader.add_implicit_resolver(_tag, re.compile(rf"^(?:{_pattern})$"), _starts)
    _Loader.add_constructor(_tag, lambda loader, node, make=_make: make(loader.construct_scalar(node)))


def parse_yaml(text: str, name: str) -> Any:
    """The one document in ``text``, which errors call ``name``. Raises RecipeError with line and column."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = "" if mark is None else f" in line {mark.line + 1}, column {mark.column + 1}"
        raise RecipeError(f"{name} is no YAML{place}: {error.problem or error.context}") from error
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, AttributeError) as error:
        raise RecipeError(f"{name} is no YAML: {error}") from error
