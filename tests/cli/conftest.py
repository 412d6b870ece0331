"""A tiny model on disk, one finished checkpoint of it, and threads as they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from cli_run import SMALL, run

from tiny import tiny_folder


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "prose.txt"
    path.write_text("".join(topics.values())[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def checkpoint(model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("outs") / "sparse"
    done = run("compress", model, "-o", out, "--calibration", text, *SMALL)
    assert done.code == 0, done.err
    return out
