"""Weights of any module as matrices: times what they are said to multiply they give what PyTorch computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.errors import CalibrationError, ModelError
from gossamer.nn.views import WeightView, positional, weight_views


def of(module: nn.Module) -> dict[str, WeightView]:
    return {view.name: view for view in weight_views(module)[0]}


def product(view: WeightView, *args: Any) -> Tensor:
    """(tokens, out) of what a view says its matrix multiplies."""
    rows = view.inputs(view.module, args)
    assert rows.shape[1] == view.shape[1]
    return rows @ view.matrix().T


def test_linear_layers_and_transposed_ones() -> None:
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    x = torch.randn(2, 3, 5)
    for module in (nn.Linear(5, 7), Conv1D(7, 5)):
        view = of(module)[""]
        assert view.shape == (7, 5)
        want = module(x).reshape(-1, 7) - module.bias
        torch.testing.assert_close(product(view, x), want)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=40, deadline=None)
@given(
    dims=st.integers(1, 2),
    channels=st.integers(1, 4),
    kernel=st.integers(1, 3),
    stride=st.integers(1, 2),
    padding=st.sampled_from([0, 1, "same"]),
    dilation=st.integers(1, 2),
    mode=st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    batched=st.booleans(),
)
def test_patches_of_convolutions(
    dims: int,
    channels: int,
    kernel: int,
    stride: int,
    padding: int | str,
    dilation: int,
    mode: str,
    batched: bool,
) -> None:
    if padding == "same":
        stride = 1
    kind: Any = (nn.Conv1d, nn.Conv2d)[dims - 1]
    module = kind(
        channels, 3, kernel, stride=stride, padding=padding, dilation=dilation, padding_mode=mode, bias=False
    )
    x = torch.randn(*([2] if batched else []), channels, *([9, 8][:dims]))
    want = module(x)
    want = want if batched else want[None]
    got = product(of(module)[""], x)
    torch.testing.assert_close(got, want.flatten(2).transpose(1, 2).reshape(-1, 3), atol=1e-5, rtol=1e-5)


def test_patches_are_copied_once() -> None:
    class Seen(TorchDispatchMode):
        """The storages that operations give."""

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            stores[out.untyped_storage().data_ptr()] = out  # held, so that no other takes its place
            return out

    stores: dict[int, Tensor] = {}
    module = nn.Conv2d(4, 3, 3, padding=1)
    with Seen():
        rows = of(module)[""].inputs(module, (torch.randn(2, 4, 9, 9),))
    assert sum(one.untyped_storage().nbytes() >= rows.nbytes for one in stores.values()) == 1


def test_kernels_that_are_not_square() -> None:
    module = nn.Conv2d(2, 3, (1, 3), stride=(2, 1), padding=(0, 1), dilation=(1, 2))
    x = torch.randn(2, 2, 6, 7)
    want = (module(x) - module.bias[None, :, None, None]).flatten(2).transpose(1, 2).reshape(-1, 3)
    torch.testing.assert_close(product(of(module)[""], x), want)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("given_states", [False, True])
def test_states_of_recurrent_layers(
    kind: Any, layers: int, both: bool, batch_first: bool, given_states: bool
) -> None:
    """The gates that follow from the views, by the equations in PyTorch's documentation, give its states."""
    torch.manual_seed(0)
    batch, steps, features, hidden = 2, 5, 3, 4
    module = kind(features, hidden, layers, bidirectional=both, batch_first=batch_first)
    x = torch.randn((batch, steps, features) if batch_first else (steps, batch, features))
    directions = 2 if both else 1
    first = torch.randn(layers * directions, batch, hidden)
    cells = torch.randn(layers * directions, batch, hidden)
    states: Any = None
    if given_states:
        states = (first, cells) if kind is nn.LSTM else first
    args = (x,) if states is None else (x, states)
    out = module(*args)[0]
    out = out if batch_first else out.transpose(0, 1)
    views = of(module)
    assert len(views) == 2 * layers * directions
    last, own = layers - 1, dict(module.named_parameters())

    def in_steps(rows: Tensor) -> Tensor:
        """Rows in the order of ``x`` as those of each sequence, in the order of the direction's steps."""
        each = rows.reshape(*x.shape[:2], -1)
        each = each if batch_first else each.transpose(0, 1)
        return (each.flip(1) if direction else each).reshape(batch * steps, -1)

    for direction in range(directions):
        suffix = f"_l{last}" + ("_reverse" if direction else "")
        read = in_steps(product(views[f"weight_ih{suffix}"], *args)) + own[f"bias_ih{suffix}"]
        kept = in_steps(product(views[f"weight_hh{suffix}"], *args)) + own[f"bias_hh{suffix}"]
        before = in_steps(views[f"weight_hh{suffix}"].inputs(module, args))
        start = cells[last * directions + direction] if given_states else torch.zeros(batch, hidden)
        want = out[..., direction * hidden : (direction + 1) * hidden]
        want = want.flip(1) if direction else want
        got = equations(kind, read, kept, before, start, (batch, steps))
        torch.testing.assert_close(got, want)


def equations(
    kind: Any, read: Tensor, kept: Tensor, before: Tensor, cell: Tensor, shape: tuple[int, int]
) -> Tensor:
    if kind is nn.RNN:
        return torch.tanh(read + kept).reshape(*shape, -1)
    if kind is nn.GRU:
        r, z, n = read.chunk(3, 1)
        hr, hz, hn = kept.chunk(3, 1)
        new = torch.tanh(n + torch.sigmoid(r + hr) * hn)
        update = torch.sigmoid(z + hz)
        return ((1 - update) * new + update * before).reshape(*shape, -1)
    i, f, g, o = (part.reshape(*shape, -1) for part in (read + kept).chunk(4, 1))
    outs = []
    for t in range(shape[1]):
        cell = torch.sigmoid(f[:, t]) * cell + torch.sigmoid(i[:, t]) * torch.tanh(g[:, t])
        outs.append(torch.sigmoid(o[:, t]) * torch.tanh(cell))
    return torch.stack(outs, 1)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_projections_of_fused_attention(batch_first: bool, bias: bool, masked: bool) -> None:
    torch.manual_seed(0)
    batch, steps, width, heads = 2, 5, 6, 3
    module = nn.MultiheadAttention(width, heads, bias=bias, batch_first=batch_first).eval()
    x = torch.randn((batch, steps, width) if batch_first else (steps, batch, width))
    mask = torch.ones(steps, steps).triu(1).bool() if masked else None
    want = module(x, x, x, attn_mask=mask)[0]
    views, args = of(module), positional(module, (x, x, x), {"attn_mask": mask})
    assert list(views) == ["in_proj_weight", "out_proj"]
    projected = product(views["in_proj_weight"], *args)
    projected = projected + module.in_proj_bias if bias else projected
    shape = (batch, steps, heads, 2) if batch_first else (steps, batch, heads, 2)
    order = (0, 2, 1, 3) if batch_first else (1, 2, 0, 3)
    q, k, v = (part.reshape(shape).permute(order) for part in projected.chunk(3, 1))
    mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=masked)
    mixed = mixed.transpose(1, 2) if batch_first else mixed.permute(2, 0, 1, 3)
    torch.testing.assert_close(views["out_proj"].inputs(module, args), mixed.reshape(-1, width))
    given = product(views["out_proj"], *args)
    given = given + module.out_proj.bias if bias else given
    torch.testing.assert_close(given.reshape(want.shape), want)
    assert not module._forward_pre_hooks
    torch.testing.assert_close(module(x, x, x, attn_mask=mask)[0], want)  # its weights are back


def test_attention_to_something_else_is_refused() -> None:
    module = nn.MultiheadAttention(4, 2)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    with pytest.raises(CalibrationError, match="name it in `skip`"):
        of(module)["in_proj_weight"].inputs(module, (x, y, y))


def test_what_is_left_is_said() -> None:
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2),
        nn.ConvTranspose2d(4, 4, 3),
        nn.LSTM(4, 4, proj_size=2),
        nn.MultiheadAttention(4, 2, kdim=3),
        nn.Linear(4, 4),
        nn.LayerNorm(4),
        nn.Embedding(4, 4),
        nn.Bilinear(4, 4, 2),
        nn.Conv1d(4, 4, 3),
    )
    found, left = weight_views(model)
    assert [view.name for view in found] == ["4", "8"]
    assert list(left) == ["0", "1", "2", "3", "7"]
    assert "groups" in left["0"]
    assert "stacks of matrices" in left["7"]


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
def test_modules_with_a_computed_weight_are_left() -> None:
    from transformers.pytorch_utils import Conv1D

    norm: Any = nn.utils.parametrizations.weight_norm
    attention = nn.MultiheadAttention(4, 2)
    norm(attention.out_proj)
    model = nn.Sequential(
        norm(nn.LSTM(4, 4), "weight_hh_l0"),
        nn.utils.weight_norm(nn.GRU(4, 4), "weight_hh_l0"),
        norm(nn.MultiheadAttention(4, 2), "in_proj_weight"),
        attention,
        norm(nn.Linear(4, 4)),
        norm(Conv1D(4, 4)),
        nn.Linear(4, 4),
    )
    found, left = weight_views(model)
    assert [view.name for view in found] == ["6"]
    assert list(left) == ["0", "1", "2", "3", "4", "5"]
    assert all("computed from other parameters" in why for why in left.values())


def test_parameters_by_themselves_and_expanded_ones_are_left() -> None:
    class Own(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 4)
            self.low, self.scale = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(1, 4))
            self.inner = nn.Linear(4, 4)
            self.same = self.inner.weight

    model = nn.Sequential(Own(), nn.Linear(4, 3), nn.LayerNorm((2, 4)), nn.Embedding(4, 4))
    model[1].weight = nn.Parameter(torch.randn(1, 4).expand(3, 4))
    found, left = weight_views(model)
    assert [view.name for view in found] == ["0", "0.inner"]
    assert list(left) == ["1", "0.low"]
    assert "expanded" in left["1"]
    assert "by itself" in left["0.low"]


def test_a_shared_weight_is_seen_once() -> None:
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), Conv1D(4, 4))
    model[1].weight = model[2].weight = model[0].weight
    (view,), left = weight_views(model)
    assert view.name == "0"
    assert [(one.name, one.module) for one in view.tied] == [("0", model[1])]
    assert "stands for both" in left["1"]
    assert "transposed" in left["2"]  # of its inputs the matrix is another one


def test_matrices_are_put_back() -> None:
    module = nn.Conv2d(2, 3, 2)
    view = of(module)[""]
    matrix = torch.arange(24.0).reshape(3, 8)
    view.replace(matrix)
    assert torch.equal(module.weight, matrix.reshape(3, 2, 2, 2))
    assert torch.equal(view.matrix(), matrix)
    with pytest.raises(ModelError, match=r"\(8, 3\) in place of one \(3, 8\)"):
        view.replace(matrix.T)


def test_packed_sequences_are_refused() -> None:
    module = nn.LSTM(3, 4)
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 3)])
    with pytest.raises(CalibrationError, match="not packed sequences"):
        of(module)["weight_ih_l0"].inputs(module, (packed,))
