"""The OBS sweep against the textbook: each step solved exactly in float64, with no Cholesky or blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prune_layers import mixed_layer
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.calibrate import Gram
from gossamer.errors import CalibrationError, MethodError
from gossamer.matrices.values import value_type
from gossamer.prune import Layer, Pruned, check_combination, method
from gossamer.prune.obs import OBS, block_width, inverse_factor
from gossamer.sparse import check_mask, count_pruned, mask_from_scores, parse_pattern

FLOAT = value_type("float32")


def make_layer(out: int = 24, cols: int = 200, tokens: int = 600, seed: int = 0) -> Layer:
    return mixed_layer(out, cols, tokens, seed)


def error_of(layer: Layer, weight: torch.Tensor) -> float:
    delta = (layer.weight - weight).double()
    gram = layer[Gram].matrix.double()
    energy = (layer.weight.double() @ gram * layer.weight.double()).sum()
    return float((delta @ gram * delta).sum() / energy)


def prune(
    layer: Layer, pattern: str, sparsity: float | None, values: str = "float32", **options: Any
) -> Pruned:
    c = check_combination("obs", pattern=pattern, sparsity=sparsity, values=values, options=options)
    return c.method.prune(layer, c.pattern, c.sparsity, c.values, c.group)


def textbook_sweep(layer: Layer, mask: torch.Tensor, damping: float) -> torch.Tensor:
    """Fix column after column; each time move all later ones to their optimum, by solving for it."""
    H = layer[Gram].matrix.double()
    H = H + damping * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    W = layer.weight.double().clone()
    for j in range(W.shape[1]):
        fixed = torch.where(mask[:, j], W[:, j], 0.0)
        error = W[:, j] - fixed
        W[:, j] = fixed
        if j + 1 < W.shape[1]:
            # minimise (e, d)ᵀ H (e, d) over d: d = -H_FF⁻¹ H_Fj e, and e = -error is what column j moved by
            step = torch.linalg.solve(H[j + 1 :, j + 1 :], H[j + 1 :, j])
            W[:, j + 1 :] += error[:, None] * step
    return W


@pytest.mark.parametrize("pattern", ["unstructured:row", "unstructured:columns:128", "2:4", "32:64", "4x8"])
def test_updates_are_those_of_exact_elimination(pattern: str) -> None:
    layer = make_layer()
    pruned = prune(layer, pattern, None if ":" in pattern and pattern[0].isdigit() else 0.5)
    assert pruned.mask is not None
    expected = textbook_sweep(layer, pruned.mask, pruned.record["damping"])
    torch.testing.assert_close(pruned.weight.double(), expected, atol=2e-3, rtol=2e-3)
    check_mask(pruned.mask, parse_pattern(pattern))
    assert (pruned.weight[~pruned.mask] == 0).all()


def test_masks_follow_the_updated_weights() -> None:
    """The mask of the first group is that of the plain saliency; later ones are not, since weights moved."""
    layer = make_layer()
    pruned = prune(layer, "unstructured:columns:128", 0.5)
    H = layer[Gram].matrix.double()
    H = H + 0.01 * H.diagonal().mean() * torch.eye(len(H), dtype=torch.float64)
    frozen = torch.stack([torch.linalg.inv(H[j:, j:])[0, 0] for j in range(len(H))])
    saliency = (layer.weight.double().square() / frozen).float()
    plain = mask_from_scores(saliency, parse_pattern("unstructured:columns:128"), 0.5)
    assert pruned.mask is not None
    assert (plain[:, :128] == pruned.mask[:, :128]).float().mean() > 0.999
    assert (plain[:, 128:] == pruned.mask[:, 128:]).float().mean() < 0.98


@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from(["unstructured:row", "unstructured:tensor", "unstructured:columns:48", "2:4", "3:7",
                     "32:64", "4x4", "channel:in", "channel:out"]),
    st.sampled_from(["float32", "bfloat16", "int8", "int4", "int3", "nl4", "nl3"]),
    st.sampled_from(["natural", "activation"]),
    st.integers(1, 12),
    st.sampled_from([4, 31, 64, 130]),
)  # fmt: skip
def test_every_combination_keeps_its_promises(
    pattern: str, values: str, order: str, out: int, cols: int
) -> None:
    if pattern == "4x4" and out < 4:
        return
    layer = make_layer(out, cols, tokens=80, seed=out)
    parsed = parse_pattern(pattern)
    sparsity = getattr(parsed, "sparsity", 0.4)
    pruned = OBS(order=order).prune(layer, parsed, sparsity, value_type(values), 64)
    assert pruned.mask is not None
    check_mask(pruned.mask, parsed)
    assert (pruned.weight[~pruned.mask] == 0).all()
    assert torch.isfinite(pruned.weight).all()
    if pattern == "unstructured:tensor":
        assert int((~pruned.mask).sum()) == count_pruned(out * cols, 0.4)
    if values == "bfloat16":
        assert torch.equal(pruned.weight.bfloat16().float(), pruned.weight)
    if value_type(values).is_integer:
        codes = pruned.quantized
        assert codes is not None
        assert torch.equal(codes.to_dense(), pruned.weight)
        assert (codes.q[~pruned.mask] == 0).all()
        assert int(codes.q.min()) >= value_type(values).qmin
        assert int(codes.q.max()) <= value_type(values).qmax


def test_sweeping_beats_rounding_and_masking() -> None:
    layer = make_layer(64, 256, 2000)
    for pattern, sparsity, values in [
        ("unstructured", 0.5, "float32"),
        ("unstructured", 0.0, "int4"),
        ("2:4", None, "int4"),
    ]:
        swept = prune(layer, pattern, sparsity, values)
        plain = check_combination("magnitude", pattern=pattern, sparsity=sparsity, values=values)
        rounded = plain.method.prune(layer, plain.pattern, plain.sparsity, plain.values, 64)
        assert error_of(layer, swept.weight) < 0.8 * error_of(layer, rounded.weight)


def test_sparsity_zero_in_floats_changes_nothing() -> None:
    layer = make_layer()
    pruned = prune(layer, "unstructured", 0.0)
    assert pruned.mask is None
    assert torch.equal(pruned.weight, layer.weight)


def test_dead_inputs_are_pruned_and_recorded() -> None:
    layer = make_layer()
    gram = layer[Gram]
    gram.matrix[7] = 0
    gram.matrix[:, 7] = 0
    pruned = prune(layer, "unstructured", 0.5)
    assert pruned.record["dead_inputs"] == 1
    assert (pruned.weight[:, 7] == 0).all()


def test_damping_is_raised_and_recorded_never_skipped() -> None:
    layer = make_layer(cols=64)
    gram = layer[Gram]
    eigen, basis = torch.linalg.eigh(gram.matrix)
    eigen[0] = -0.05 * float(gram.matrix.diagonal().mean())  # an indefinite matrix, as rounding may leave it
    gram.matrix = (basis * eigen) @ basis.T
    gram.matrix = (gram.matrix + gram.matrix.T) / 2
    pruned = prune(layer, "unstructured", 0.5)
    assert pruned.record["damping"] == pytest.approx(0.1)
    expected = textbook_sweep(layer, pruned.mask, pruned.record["damping"])  # type: ignore[arg-type]
    torch.testing.assert_close(pruned.weight.double(), expected, atol=5e-3, rtol=5e-3)


def test_a_hopeless_gram_matrix_is_an_error() -> None:
    layer = make_layer(cols=16)
    layer[Gram].matrix = -layer[Gram].matrix
    layer[Gram].matrix.diagonal().abs_()
    layer[Gram].matrix *= torch.where(torch.eye(16) > 0, 1.0, 1e6)
    with pytest.raises(CalibrationError, match="positive definite"):
        prune(layer, "unstructured", 0.5)


class Made(TorchDispatchMode):
    """Collects the storages that operators give back."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: dict[int, torch.UntypedStorage] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(one, torch.Tensor):
                self.storages[one.untyped_storage().data_ptr()] = one.untyped_storage()
        return out


@pytest.mark.parametrize(("order", "matrices"), [("natural", 1), ("activation", 2)])
def test_a_factor_is_made_in_its_own_place(order: str, matrices: int) -> None:
    gram = make_layer(cols=96)[Gram]
    before = gram.matrix.clone()
    with Made() as made:
        found = inverse_factor(gram, 0.01, order)
    large = [one for one in made.storages.values() if one.nbytes() >= 4 * 96 * 96]
    assert len([one for one in large if one.data_ptr() != gram.matrix.data_ptr()]) == matrices
    assert torch.equal(gram.matrix, before)
    H = before[found.order][:, found.order].clone()
    H.diagonal().add_(0.01 * float(H.diagonal().mean()))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
    assert torch.equal(found.upper, torch.linalg.cholesky(inverse, upper=True))


@pytest.mark.parametrize("options", [{"order": "random"}, {"damping": 0.0}, {"speed": 3}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        check_combination("obs", options=options)


@pytest.mark.parametrize(
    ("mask", "scale"), [(1, 1), (4, 64), (64, 64), (128, 64), (48, 64), (63, 64), (7, 1), (1000, 64)]
)
def test_blocks_hold_whole_groups_where_they_can(mask: int, scale: int) -> None:
    width = block_width(mask, scale)
    assert width <= 512
    assert width % mask == 0 or mask > 512
    assert width % scale == 0 or mask in (63, 1000)


def half_dead(scale: float = 1.0) -> Layer:
    """A layer of 64 inputs, every other one of which is always zero."""
    torch.manual_seed(5)
    x = scale * torch.randn(400, 64) @ torch.randn(64, 64)
    x[:, ::2] = 0
    gram = Gram(64)
    gram.update(x)
    gram.finish()
    return Layer("dead", torch.randn(32, 64), {Gram: gram})


def test_inputs_that_are_always_zero_score_nothing() -> None:
    scores = method("obs").scores(half_dead(0.01))
    assert not scores[:, ::2].any()
    assert (scores[:, 1::2] > 0).all()


@pytest.mark.parametrize("values", ["float32", "int4"])
def test_the_scale_of_inputs_does_not_matter_beside_dead_ones(values: str) -> None:
    one, small = (prune(half_dead(scale), "2:4", None, values).weight for scale in (1.0, 1e-3))
    torch.testing.assert_close(one, small, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["obs", "admm"])
def test_floats_that_are_not_pruned_stay_as_they_are(name: str) -> None:
    layer = half_dead()
    kept = method(name).prune(layer, parse_pattern("unstructured:row"), 0.0, FLOAT, 64)
    assert torch.equal(kept.weight, layer.weight)
    assert kept.mask is None
