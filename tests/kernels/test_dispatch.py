"""The instruction set in use: chosen by the processor, forced by GOSSAMER_ISA, refused with a sentence."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from kernel_cases import case, check_product, handle_of, tiers
from kernel_packer import with_mask

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


# What each instruction set is compiled with, as /proc/cpuinfo calls it (abm: POPCNT and LZCNT).
AVX2 = {"avx2", "fma", "f16c", "bmi1", "bmi2", "abm"}
AVX512VNNI = {f"avx512{name}" for name in ("f", "bw", "vl", "dq", "vbmi", "_vbmi2", "_vnni")}
AVX512 = AVX512VNNI | {"avx512_bf16"}
AMX = {"amx_tile", "amx_int8", "amx_bf16"}


def test_every_instruction_set_of_this_processor_is_tested() -> None:
    """Other tests of kernels run on ``available()``, and skip without the native module: here that fails."""
    assert kernels.native_available(), "the native kernels are not built"
    if platform.machine() not in ("x86_64", "AMD64"):
        assert kernels.available() == tiers() == ("portable",)
        return
    compiled = native.native().compiled()
    every = ["portable", "avx2", "avxvnni", "avx512vnni", "avx512", "amx"]
    assert compiled == [name for name in every if name in compiled]
    assert {"portable", "avx2", "avx512vnni", "avx512"} <= set(compiled)
    info = Path("/proc/cpuinfo")
    if not info.exists():
        pytest.skip("cannot ask the system what the processor has")
    flags = set(info.read_text().split())
    wanted = [
        ("portable", set[str]()),
        ("avx2", AVX2),
        ("avxvnni", AVX2 | {"avx_vnni"}),
        ("avx512vnni", AVX2 | AVX512VNNI),
        ("avx512", AVX2 | AVX512),
        ("amx", AVX2 | AVX512 | AMX),
    ]
    here = tuple(name for name, needs in wanted if name in compiled and flags >= needs)
    assert kernels.available() == tiers() == here


def marks(isa: str | None) -> tuple[float, float]:
    """What tells instruction sets apart (docs/architecture.md, "Contracts"): whether a product is rounded
    before it is added, and what becomes of a subnormal bfloat16."""
    w = with_mask("dense", "float32", np.ones((1, 8), bool), 64, np.random.default_rng(0))
    w.stored = np.array([[-1 - 2**-11, 0, 0, 0, 1 + 2**-12, 0, 0, 0]], np.float32)
    x = torch.tensor([[1, 0, 0, 0, 1 + 2**-12, 0, 0, 0]])
    fused = kernels.matmul(handle_of(w), x, isa).item()
    w.values, w.stored = "bfloat16", np.array([[2**-130] + 7 * [0]], np.float32)
    tiny = kernels.matmul(handle_of(w), torch.tensor([[4.0] + 7 * [0.0]]), isa).item()
    return fused, tiny


MARKS = {
    "portable": (0, 2**-128),
    "avx2": (2**-24, 2**-128),
    "avxvnni": (2**-24, 2**-128),
    "avx512vnni": (2**-24, 2**-128),
    "avx512": (2**-24, 0),
    "amx": (2**-24, 0),
}


@needs_native
def test_an_instruction_set_runs_its_own_code() -> None:
    for isa in kernels.available():
        assert marks(isa) == MARKS[isa], isa


@needs_native
def test_the_fastest_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOSSAMER_ISA", raising=False)
    assert kernels.available()[0] == "portable"
    assert kernels.isa() == kernels.available()[-1]
    assert marks(None) == MARKS[kernels.available()[-1]]


@needs_native
def test_a_slower_one_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ISA", "portable")
    assert kernels.isa() == "portable"
    w, handle = case("32:64", "int4", 17, 130)
    x = torch.randn(3, 130)
    assert torch.equal(kernels.matmul(handle, x), w.reference(x))  # portable gives the very same bits


@needs_native
@pytest.mark.parametrize("name", ["avx9", "AVX512", "AMX", " portable"])
def test_what_cannot_run_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_ISA", name)
    _, handle = case("dense", "int4", 17, 130)
    for call in (kernels.isa, lambda: kernels.matmul(handle, torch.zeros(1, 130))):
        with pytest.raises(KernelError, match="GOSSAMER_ISA"):
            call()


@needs_native
@pytest.mark.skipif("amx" not in native.native().compiled(), reason="the compiler knows no tiles")
def test_tiles_are_refused_where_there_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    if "amx" in kernels.available():
        pytest.skip("there are")
    monkeypatch.setenv("GOSSAMER_ISA", "amx")
    with pytest.raises(KernelError, match=r"does not run amx.*GOSSAMER_ISA"):
        kernels.isa()


@needs_native
@pytest.mark.skipif(
    not kernels.native_available() or "amx" not in kernels.available(), reason="there are no tiles"
)
def test_tiles_are_shared_with_pytorch() -> None:
    """oneDNN configures the tiles of the same threads for itself: neither spoils the other's products."""
    w, handle = case("32:64", "int4", 192, 640)
    x = torch.randn(96, 640)
    plain = torch.randn(640, 640).bfloat16()
    q = torch.randn(1, 2, 128, 64).bfloat16()
    ours, theirs = kernels.matmul(handle, x), x.bfloat16() @ plain
    attended = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    for _ in range(20):
        assert torch.equal(kernels.matmul(handle, x), ours)
        assert torch.equal(x.bfloat16() @ plain, theirs)
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(q, q, q), attended)
    assert torch.equal(ours, kernels.matmul(handle, x, "avx512"))
    check_product(w, x, ours)


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
