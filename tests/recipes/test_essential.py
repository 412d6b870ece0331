"""Essential sparsity: the drop point of known curves, and the curve of a tiny model."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from gossamer.errors import EvaluationError, GossamerError, MethodError
from gossamer.evaluate import evaluate
from gossamer.evaluate.drop_point import drop_point
from gossamer.models.text import read_text
from gossamer.models.walk import find_parts, prunable
from gossamer.nn.experts import take_apart
from gossamer.recipes.compress import compress
from gossamer.recipes.essential import essential_sparsity
from gossamer.recipes.load import LoadedModel, load
from gossamer.recipes.measure import windows_for
from gossamer.sparse import NM, mask_from_scores
from tiny import tiny_folder

TEXT = ["".join(topics.values())[:20_000]]
SMALL: dict[str, Any] = {"text": TEXT, "windows": 2, "seqlen": 48}


def test_the_break_of_two_lines_is_found() -> None:
    curve = [(s / 10, 3 + 0.1 * s / 10 + 5 * max(0.0, s / 10 - 0.5)) for s in range(9)]
    found = drop_point(curve)
    assert found is not None
    assert found.sparsity == pytest.approx(0.5)
    assert found.slope_before == pytest.approx(0.1)
    assert found.slope_after == pytest.approx(5.1)
    noisy = [(s, y + 0.02 * (-1) ** i) for i, (s, y) in enumerate(reversed(curve))]
    assert drop_point(noisy).sparsity == pytest.approx(0.5)  # type: ignore[union-attr]


def test_a_straight_line_has_no_drop() -> None:
    assert drop_point([(s / 10, 3 + s) for s in range(9)]) is None
    assert drop_point([(s / 10, 3 - s) for s in range(9)]) is None
    assert drop_point([(s / 10, min(s, 4)) for s in range(9)]) is None  # it flattens


@pytest.mark.parametrize(
    "curve",
    [
        [(0.1, 1.0)] * 4,
        [(0.1, 1.0), (0.2, 1.0), (0.2, 1.0), (0.3, 1.0), (0.4, 1.0)],
        [(0.1 * i, float("nan")) for i in range(6)],
    ],
)
def test_curves_that_say_nothing(curve: list[tuple[float, float]]) -> None:
    with pytest.raises(EvaluationError):
        drop_point(curve)


def test_the_curve_is_that_of_models_pruned_one_by_one(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model")
    loaded = load(source, engine="transformers", dtype="float32")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    found = essential_sparsity(loaded, grid=(0.0, 0.2, 0.4, 0.6, 0.8), **SMALL)
    after = loaded.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [s for s, _ in found.curve] == [0.0, 0.2, 0.4, 0.6, 0.8]
    ids = windows_for(loaded, read_text(TEXT, part="measure"), 48, 2)
    assert found.curve[0][1] == evaluate(loaded.model, ids).perplexity
    linears = [m for m in loaded.model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    sizes = torch.cat([linear.weight.abs().flatten() for linear in linears])
    kept = sizes.sort().values[int(0.6 * len(sizes) + 0.5)]
    for linear in linears:
        linear.weight.data[linear.weight.abs() < kept] = 0
    assert found.curve[3][1] == pytest.approx(evaluate(loaded.model, ids).perplexity, rel=1e-5)


def uneven(folder: Path) -> LoadedModel:
    """A model whose layers are of very different sizes."""
    loaded = load(folder, engine="transformers", dtype="float32")
    for index, layer in enumerate(loaded.model.model.layers):
        for name, linear in layer.named_modules():
            if isinstance(linear, torch.nn.Linear):
                linear.weight.data *= 0.2 + index + 0.3 * len(name)
    return loaded


def test_layers_compete_unless_told_otherwise(tmp_path: Path) -> None:
    loaded = uneven(tiny_folder(tmp_path / "model"))
    grid = (0.0, 0.2, 0.4, 0.6, 0.8)
    over = essential_sparsity(loaded, grid=grid, **SMALL)
    within = essential_sparsity(loaded, grid=grid, pattern="unstructured:tensor", **SMALL)
    assert (over.pattern, within.pattern) == ("unstructured:model", "unstructured:tensor")
    assert over.curve[0] == within.curve[0]
    ids = windows_for(loaded, read_text(TEXT, part="measure"), 48, 2)
    linears = [m for m in loaded.model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    sizes = torch.cat([linear.weight.abs().flatten() for linear in linears])
    kept = sizes.sort().values[int(0.6 * len(sizes) + 0.5)]
    pruned = [float((linear.weight.abs() < kept).float().mean()) for linear in linears]
    assert max(pruned) - min(pruned) > 0.3
    for linear in linears:
        linear.weight.data[linear.weight.abs() < kept] = 0
    perplexity = evaluate(loaded.model, ids).perplexity
    assert over.curve[3][1] == pytest.approx(perplexity, rel=1e-5)
    assert within.curve[3][1] != pytest.approx(perplexity, rel=1e-4)


def test_patterns_of_n_and_m_are_measured_beside_the_curve(tmp_path: Path) -> None:
    loaded = load(tiny_folder(tmp_path / "model"), engine="transformers", dtype="float32")
    found = essential_sparsity(loaded, nm=["4:4", "2:4", "1:4"], **SMALL)
    assert len(found.curve) == 8
    assert list(found.nm) == ["4:4", "2:4", "1:4"]
    assert found.nm["4:4"] == found.curve[0][1]
    for linear in (m for m in loaded.model.model.layers.modules() if isinstance(m, torch.nn.Linear)):
        linear.weight.data *= mask_from_scores(linear.weight.abs(), NM(2, 4))
    ids = windows_for(loaded, read_text(TEXT, part="measure"), 48, 2)
    assert found.nm["2:4"] == pytest.approx(evaluate(loaded.model, ids).perplexity, rel=1e-5)


@pytest.mark.parametrize("arch", ["mixtral", "gpt_oss"])  # gpt_oss: stored transposed
def test_experts_are_pruned_too_and_stay_fused(arch: str, tmp_path: Path) -> None:
    loaded = load(tiny_folder(tmp_path / "model", arch), engine="transformers", dtype="float32")
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    grid = (0.0, 0.2, 0.4, 0.6, 0.8)
    found = essential_sparsity(loaded, grid=grid, pattern="unstructured:tensor", **SMALL)
    after = loaded.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    take_apart(loaded.model)
    for block in find_parts(loaded.model).blocks:
        for layer in prunable(block).values():
            weight = layer.weight.data
            kept = weight.abs().flatten().sort().values[int(0.6 * weight.numel() + 0.5)]
            weight[weight.abs() < kept] = 0
    ids = windows_for(loaded, read_text(TEXT, part="measure"), 48, 2)
    assert found.curve[3][1] == pytest.approx(evaluate(loaded.model, ids).perplexity, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"method": "wanda"}, MethodError, "without data"),
        ({"grid": (0.1, 0.5)}, EvaluationError, "five"),
        ({"pattern": "2:4"}, GossamerError, "2:4"),
        ({"nm": ["2:4", "16x4"]}, MethodError, "16x4 says no sparsity"),
        ({"grid": (0.0, 0.2, 0.4, 0.6, 1.0)}, GossamerError, "fraction"),
    ],
)
def test_nonsense_is_refused(
    settings: dict[str, Any], error: type[Exception], says: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        essential_sparsity(tmp_path / "no model", **{**SMALL, **settings})


def test_compressed_models_are_refused(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "model")
    compress(source, tmp_path / "out", method="magnitude", sparsity=0.5)
    with pytest.raises(MethodError, match="dense model"):
        essential_sparsity(tmp_path / "out", **SMALL)
