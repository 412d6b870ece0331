"""The instruction set in use: chosen by the processor, forced by GOSSAMER_ISA, refused with a sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from kernel_cases import case, check_product

from gossamer import kernels
from gossamer.errors import KernelError
from gossamer.kernels import native

needs_native = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    def clear() -> None:
        for cached in (native.isa, native.tier, native.native):
            cached.cache_clear()

    clear()
    yield
    clear()


@needs_native
def test_the_fastest_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOSSAMER_ISA", raising=False)
    assert kernels.available()[0] == "portable"
    assert kernels.isa() == kernels.available()[-1]


@needs_native
def test_a_slower_one_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ISA", "portable")
    assert kernels.isa() == "portable"
    w, handle = case("32:64", "int4", 17, 130)
    x = torch.randn(3, 130)
    assert torch.equal(kernels.matmul(handle, x), w.reference(x))  # portable gives the very same bits


@needs_native
@pytest.mark.parametrize("name", ["avx9", "AVX512", "amx", " portable"])
def test_what_cannot_run_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ISA", name)
    _, handle = case("dense", "int4", 17, 130)
    for call in (kernels.isa, lambda: kernels.matmul(handle, torch.zeros(1, 130))):
        with pytest.raises(KernelError, match="GOSSAMER_ISA"):
            call()


def test_a_missing_module_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gossamer.kernels._native", None)
    assert not kernels.native_available()
    with pytest.raises(KernelError, match="cmake --build"):
        kernels.available()


FORK = """
import os, signal, torch
from gossamer import kernels
from kernel_cases import case
torch.set_num_threads(2)
w, handle = case("dense", "int4", 1024, 512)
x = torch.randn(4, 512)
y = kernels.matmul(handle, x)  # on two threads
child = os.fork()
if child == 0:
    signal.alarm(30)
    for _ in range(50):
        same = torch.equal(kernels.matmul(handle, x), y)
    print(kernels.native.native().team(), flush=True)
    os._exit(0 if same else 1)
_, status = os.waitpid(child, 0)
assert status == 0, status
assert torch.equal(kernels.matmul(handle, x), y)
print(kernels.native.native().team())
"""


@needs_native
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_gets_threads_of_its_own() -> None:
    # absolute: the child must find what this process found, however it was told
    path = [os.path.dirname(__file__), *map(os.path.abspath, sys.path)]
    done = subprocess.run(
        [sys.executable, "-c", FORK],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    child, parent = done.stdout.split()
    assert child == "pool"
    if sys.platform == "linux":
        assert parent == "openmp"  # PyTorch's


@needs_native
def test_many_threads_may_call_at_once() -> None:
    from concurrent.futures import ThreadPoolExecutor

    w, handle = case("32:64", "int4", 192, 640)
    inputs = [torch.randn(6, 640, generator=torch.Generator().manual_seed(i)) for i in range(12)]
    torch.set_num_threads(2)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda x: kernels.matmul(handle, x), inputs))
    for x, y in zip(inputs, results, strict=True):
        check_product(w, x, y)
