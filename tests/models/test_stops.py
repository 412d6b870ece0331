"""Stop strings: however a text is cut into pieces, the same comes through, and no part of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.errors import SamplingError
from gossamer.models.stops import StopStrings


def told(pieces: list[str], stops: list[str]) -> tuple[str, bool]:
    filtered = StopStrings(stops)
    text = "".join(filtered.push(piece) for piece in pieces)
    return text + filtered.finish(), filtered.found


@settings(max_examples=400, deadline=None)
@given(
    pieces=st.lists(st.text("ab日", max_size=4), max_size=12),
    stops=st.lists(st.text("ab日", min_size=1, max_size=4), max_size=3),
)
def test_cuts_do_not_matter(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    # by definition: the first place where any stop string ends
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(stop) for stop in stops)]
    expected = text
    if ends:
        expected = text[: ends[0] - max(len(stop) for stop in stops if text[: ends[0]].endswith(stop))]
    assert told(pieces, stops) == (expected, bool(ends))
    assert told(list(text), stops) == (expected, bool(ends))
    filtered, shown = StopStrings(stops), ""
    for piece in pieces:
        shown += filtered.push(piece)
        assert expected.startswith(shown)


def test_text_waits_only_while_it_may_become_a_stop_string() -> None:
    stops = StopStrings(["\n\nUser:", "END"])
    assert [stops.push(piece) for piece in ("Hi\n", "x", "\n\nUs", "ed", " E", "N", "D!")] == [
        "Hi", "\nx", "", "\n\nUsed", " ", "", "",
    ]  # fmt: skip
    assert stops.found
    assert stops.push("more") == stops.finish() == ""


def test_one_string_and_empty_ones() -> None:
    assert told(["a.b"], ".") == ("a", True)  # type: ignore[arg-type]
    with pytest.raises(SamplingError, match="empty"):
        StopStrings(["x", ""])
