"""What is timed for budgets: which forms of which shapes, from how many copies; never how long it took."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from gossamer import kernels
from gossamer.bench import timing
from gossamer.bench import token_times as room
from gossamer.bench.timing import token_seconds
from gossamer.bench.token_times import token_times
from gossamer.matrices import Packed

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")


def test_all_weights_of_a_shape_are_walked_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[str], tuple[int, int], int]] = []

    def watch(forms: Sequence[Packed], copies: int) -> list[float]:
        asked.append(([form.layout for form in forms], forms[0].shape, copies))
        return [10.0, 7.0, 0.5]

    monkeypatch.setattr(room, "token_seconds", watch)
    monkeypatch.setattr(room, "call_seconds", lambda: 1.0)
    found = token_times({(64, 64): 6, (32, 128): 3}, "int4", "unstructured:row", [0.5, 0.9], 64)
    # both shapes take as many bytes, dense: nine of either make up the model
    forms = ["dense", "32:64", "6:64"]  # of 64 inputs every output keeps as many
    assert asked[0] == (forms, (64, 64), 9)
    assert asked[1] == (["dense", "bitmap", "bitmap"], (32, 128), 9)
    assert found.seconds == {(64, 64): [9.0, 6.0, 1e-9], (32, 128): [9.0, 6.0, 1e-9]}
    assert found.other_work >= 0


def test_products_of_every_form_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    forms = [room.made_up((32, 128), "int4", pattern, None, 64) for pattern in (None, "2:4")]
    assert [form.layout for form in forms] == ["dense", "32:64"]
    found = token_seconds(forms, 3)
    assert len(found) == 2
    assert all(seconds > 0 for seconds in found)
