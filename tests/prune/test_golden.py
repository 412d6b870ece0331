"""Ours beside numbers of the original Wanda, SparseGPT and GPTQ code (benchmarks/oracle_original.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from gossamer.calibrate import Gram, InputNorm, WorkFolder, walk
from gossamer.evaluate import reconstruction_error
from gossamer.matrices.values import value_type
from gossamer.models.skeleton import WeightFiles, skeleton
from gossamer.prune import Layer, Pruned, check_combination

GOLDEN = Path(__file__).parents[1] / "golden"
SPARSE_CASES = {
    "wanda_50_row": ("wanda", "unstructured:row", 0.5),
    "wanda_2_4": ("wanda", "2:4", None),
    "sparsegpt_50": ("obs", "unstructured:columns:128", 0.5),
    "sparsegpt_2_4": ("obs", "2:4", None),
}


def unpack_mask(packed: torch.Tensor, columns: int) -> torch.Tensor:
    bits = np.unpackbits(packed.numpy(), axis=1, bitorder="little")[:, :columns]
    return torch.from_numpy(bits.astype(bool))


def run(layer: Layer, case: str, values: str = "float32") -> Pruned:
    name, pattern, sparsity = SPARSE_CASES[case]
    c = check_combination(name, pattern=pattern, sparsity=sparsity, values=values)
    return c.method.prune(layer, c.pattern, c.sparsity, c.values, c.group)


@pytest.fixture(scope="module")
def synthetic() -> tuple[Layer, dict[str, torch.Tensor], dict[str, Any]]:
    tensors = load_file(GOLDEN / "synthetic.safetensors")
    about = json.loads((GOLDEN / "synthetic.json").read_text())
    weight = tensors["weight"].float()
    columns = weight.shape[1]
    gram, norm = Gram(columns), InputNorm(columns)
    upper = torch.zeros(columns, columns)
    upper[tuple(torch.triu_indices(columns, columns))] = tensors["gram_upper"].float()
    gram.matrix, gram.tokens = upper, about["tokens"]
    gram.finish()
    norm._squares, norm.tokens = gram.matrix.diagonal().double(), about["tokens"]
    norm.finish()
    return Layer("synthetic", weight, {Gram: gram, InputNorm: norm}), tensors, about["cases"]


@pytest.mark.parametrize("case", SPARSE_CASES)
def test_masks_and_errors_on_a_made_up_layer(case: str, synthetic: Any) -> None:
    layer, tensors, figures = synthetic
    pruned = run(layer, case)
    assert pruned.mask is not None
    theirs = unpack_mask(tensors[f"{case}.mask"], layer.weight.shape[1])
    assert (pruned.mask == theirs).float().mean() >= 0.99
    error = reconstruction_error(layer.weight, pruned.weight, layer[Gram].matrix)
    assert error == pytest.approx(figures[case]["relative_error"], rel=0.005)
    if f"{case}.weight" in tensors:
        same = (pruned.mask == theirs).all(dim=1)  # one flipped weight rightly moves the rest of its row
        assert same.float().mean() > 0.9
        torch.testing.assert_close(
            pruned.weight[same], tensors[f"{case}.weight"].float()[same], atol=5e-4, rtol=5e-3
        )


def test_a_dead_input_as_the_original_treats_it(synthetic: Any) -> None:
    layer, tensors, figures = synthetic
    gram = Gram(layer.weight.shape[1])
    gram.matrix, gram.tokens = layer[Gram].matrix.clone(), layer[Gram].tokens
    gram.matrix[5] = gram.matrix[:, 5] = 0
    gram.finish()
    pruned = run(Layer("dead", layer.weight, {Gram: gram}), "sparsegpt_50")
    theirs = unpack_mask(tensors["sparsegpt_50_dead.mask"], layer.weight.shape[1])
    assert pruned.mask is not None
    assert (pruned.mask == theirs).float().mean() >= 0.99
    error = reconstruction_error(layer.weight, pruned.weight, gram.matrix)
    assert error == pytest.approx(figures["sparsegpt_50_dead"]["relative_error"], rel=0.005)


def test_integers_lose_no_more_than_the_original(synthetic: Any) -> None:
    """Ours is symmetric with a scale per 64 inputs; the original's symmetric grid has the same size for
    GPTQ, and a scale per row for the joint case."""
    layer, _, figures = synthetic
    dense = check_combination("gptq", sparsity=0.0, values="int4", options={"order": "natural"})
    swept = dense.method.prune(layer, dense.pattern, dense.sparsity, dense.values, 64)
    error = reconstruction_error(layer.weight, swept.weight, layer[Gram].matrix)
    assert error < figures["gptq_int4_g64_sym"]["relative_error"]
    joint = run(layer, "sparsegpt_50", "int4")
    error = reconstruction_error(layer.weight, joint.weight, layer[Gram].matrix)
    assert error < figures["joint_50_int4_sym"]["relative_error"]


@pytest.fixture(scope="module")
def first_block(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layer]:
    tokens = load_file(GOLDEN / "block0.safetensors")["token_ids"].long()
    work = WorkFolder(tmp_path_factory.mktemp("golden") / "work", {})
    model, files = skeleton(smollm2), WeightFiles(smollm2)
    visit = next(walk(model, files, (Gram, InputNorm), work, windows=tokens, dtype=torch.float32))
    return {name: Layer(name, visit.weight(name), visit.statistics[name]) for name in visit.layers}


@pytest.mark.parametrize("case", SPARSE_CASES)
def test_masks_and_errors_on_the_first_block_of_a_real_model(
    case: str, first_block: dict[str, Layer]
) -> None:
    tensors = load_file(GOLDEN / "block0.safetensors")
    about = json.loads((GOLDEN / "block0.json").read_text())["layers"]
    agreed = total = 0
    for short, figures in about.items():
        layer = first_block[f"model.layers.0.{short}"]
        pruned = run(layer, case)
        assert pruned.mask is not None
        theirs = unpack_mask(tensors[f"{short}.{case}.mask"], layer.weight.shape[1])
        ours = pruned.mask[:: figures["mask_row_step"]][: len(theirs)]
        agreement = float((ours == theirs).float().mean())
        assert agreement >= 0.99, f"{short}: {agreement:.4f}"
        agreed += int((ours == theirs).sum())
        total += ours.numel()
        error = reconstruction_error(layer.weight, pruned.weight, layer[Gram].matrix)
        assert error <= figures["cases"][case]["relative_error"] * 1.005, short
    assert agreed / total >= 0.99


def test_the_dense_grid_beats_rounding_on_the_real_block(first_block: dict[str, Layer]) -> None:
    for name, layer in first_block.items():
        swept = check_combination("gptq", sparsity=0.0, values="int4")
        plain = check_combination("wanda", sparsity=0.0, values="int4")
        errors = [
            reconstruction_error(
                layer.weight,
                c.method.prune(layer, c.pattern, c.sparsity, value_type("int4"), 64).weight,
                layer[Gram].matrix,
            )
            for c in (swept, plain)
        ]
        assert errors[0] < errors[1], name
