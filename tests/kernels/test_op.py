"""``torch.ops.gossamer.packed_matmul``: what PyTorch's tracers and autograd see."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import case
from torch._subclasses.fake_tensor import FakeTensorMode

from gossamer import kernels
from gossamer.errors import KernelError

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")


def test_the_op_is_well_formed() -> None:
    _, handle = case("32:64", "int4", 17, 130)
    torch.library.opcheck(
        torch.ops.gossamer.packed_matmul.default,
        (torch.randn(2, 3, 130), handle.id, 17),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_shapes_are_known_without_running() -> None:
    _, handle = case("dense", "int4", 17, 130)
    with FakeTensorMode():
        y = kernels.matmul(handle, torch.empty(4, 5, 130, dtype=torch.bfloat16))
        assert y.shape == (4, 5, 17)
        assert y.dtype == torch.bfloat16


def test_a_compiled_graph_holds_the_op() -> None:
    _, handle = case("dense", "int4", 17, 130)
    compiled = torch.compile(lambda x: kernels.matmul(handle, x) + 1, backend="eager", fullgraph=True)
    x = torch.randn(2, 130)
    with torch.no_grad():
        assert torch.equal(compiled(x), kernels.matmul(handle, x) + 1)


def test_backward_says_that_there_is_no_gradient() -> None:
    _, handle = case("dense", "int4", 17, 130)
    x = torch.randn(2, 130, requires_grad=True)
    y = kernels.matmul(handle, x)
    assert torch.equal(y.detach(), kernels.matmul(handle, x.detach()))
    with pytest.raises(KernelError, match="no gradient"):
        y.sum().backward()
    with pytest.raises(KernelError, match="without gradients"):
        kernels.matmul(handle, x, "portable")
    with torch.no_grad():
        assert not kernels.matmul(handle, x).requires_grad
