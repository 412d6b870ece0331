"""Patterns read from text, and what cannot be read."""

from __future__ import annotations

import pytest

from gossamer.errors import PatternError
from gossamer.sparse import NM, Block, Channel, Unstructured, parse_pattern


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("2:4", NM(2, 4)),
        ("32:64", NM(32, 64)),
        (" 4:8 ", NM(4, 8)),
        ("16x4", Block(16, 4)),
        ("16x4:row", Block(16, 4, "row")),
        ("unstructured", Unstructured("row")),
        ("unstructured:tensor", Unstructured("tensor")),
        ("unstructured:columns:128", Unstructured("columns:128")),
        ("channel:in", Channel(1)),
        ("channel:out", Channel(0)),
    ],
)
def test_reads(text: str, pattern: object) -> None:
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    ["", "4", "5:4", "0:4", "1:1", "2:65", "0x4", "16x", "unstructured:rows", "columns:0", "channel", "2:4:8",
     "unstructured:columns:0", "4x4:columns:8"],
)  # fmt: skip
def test_refuses(text: str) -> None:
    with pytest.raises(PatternError):
        parse_pattern(text)


@pytest.mark.parametrize(
    "text", ["2:4", "16x4", "16x4:row", "unstructured:row", "unstructured:columns:64", "channel:in"]
)
def test_text_round_trips(text: str) -> None:
    assert str(parse_pattern(text)) == text
