"""Layers side by side, and what they leave of PyTorch's threads."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gossamer.calibrate import Gram
from gossamer.errors import MethodError
from gossamer.recipes.side_by_side import side_by_side


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_layers_run_on_one_thread_and_leave_threads_and_memory_as_they_were() -> None:
    visit: Any = SimpleNamespace(layers={"a": None, "b": None}, statistics={})

    def fail(name: str) -> None:
        raise MethodError(f"{name} cannot be pruned")

    assert side_by_side(lambda name: (name, torch.get_num_threads()), visit) == [("a", 1), ("b", 1)]
    assert torch.get_num_threads() == 2
    gram = Gram(2)
    gram.factors["inverse"], one = torch.eye(2), {Gram: gram}
    shared: Any = SimpleNamespace(layers={"a": None, "b": None}, statistics={"a": one, "b": one})
    assert side_by_side(lambda name: len(gram.factors), shared) == [1, 1]
    assert gram.factors == {}
    with pytest.raises(MethodError, match="a cannot be pruned"):
        side_by_side(fail, visit)
    assert torch.get_num_threads() == 2
