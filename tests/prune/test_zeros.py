"""Models that are sparse already: every zero stays, and what is kept is rounded by the sweep."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from prune_layers import mixed_layer
from torch import nn

import gossamer as gs
from gossamer.calibrate import Gram
from gossamer.errors import MethodError
from gossamer.matrices import Packed
from gossamer.matrices.values import value_type
from gossamer.models import load_checkpoint
from gossamer.nn import StructuredLinear
from gossamer.prune import Layer, check_combination, round_values
from gossamer.recipes.compress import compress
from tiny import tiny_folder, tiny_model

TEXT = "".join(topics.values())[:20_000]


def sparse_layer(seed: int) -> Layer:
    layer = mixed_layer(24, 200, 600, seed)
    share = torch.linspace(0.0, 0.9, 24)[:, None]  # each row another sparsity
    layer.weight[torch.rand(24, 200, generator=torch.Generator().manual_seed(seed)) < share] = 0.0
    return layer


@pytest.mark.parametrize("values", ["int4", "int3", "nl4", "nl3"])
def test_the_sweep_keeps_the_mask_and_beats_rounding_to_the_nearest(values: str) -> None:
    for seed in range(3):
        layer = sparse_layer(seed)
        c = check_combination("zeros", values=values)
        pruned = c.method.prune(layer, c.pattern, c.sparsity, c.values, c.group)
        assert pruned.mask is not None
        assert pruned.quantized is not None
        assert torch.equal(pruned.mask, layer.weight != 0)
        assert not pruned.weight[~pruned.mask].any()
        assert torch.equal(pruned.weight, pruned.quantized.to_dense())
        nearest = round_values(layer.weight, pruned.mask, c.values, c.group)
        gram = layer[Gram].matrix

        def lost(weight: torch.Tensor, layer: Layer = layer, gram: torch.Tensor = gram) -> float:
            delta = layer.weight - weight
            return float((delta @ gram * delta).sum())

        assert lost(pruned.weight) < lost(nearest.weight)


def test_floats_and_dense_weights_stay_as_they_are() -> None:
    layer = sparse_layer(0)
    c = check_combination("zeros", values="bfloat16")
    pruned = c.method.prune(layer, c.pattern, c.sparsity, c.values, c.group)
    assert torch.equal(pruned.weight, layer.weight.bfloat16().float())
    dense = mixed_layer(8, 64, 200, 1)
    assert c.method.prune(dense, c.pattern, c.sparsity, value_type("int4"), 64).mask is None


def uneven(model: nn.Module) -> dict[str, torch.Tensor]:
    """Each linear in the blocks pruned to another sparsity, one of them not at all; their masks."""
    torch.manual_seed(0)
    found = {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    with torch.no_grad():
        for index, (name, module) in enumerate(layers):
            found[name] = torch.rand(module.weight.shape) >= 0.9 * index / len(layers)
            module.weight.mul_(found[name])
    return found


@pytest.mark.parametrize(
    "settings", [{"values": "int4"}, {"values": "bf16"}, {"values": "int4", "tune": "blockwise"}]
)
def test_a_sparse_model_is_packed_as_it_is(settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(num_hidden_layers=2)
    masks = uneven(model)
    folder = tiny_folder(tmp_path / "sparse", num_hidden_layers=2)
    model.save_pretrained(folder)
    done = compress(
        folder, tmp_path / "out", method="zeros", calibration=[TEXT], windows=4, seqlen=32, **settings
    )
    assert done.made["pattern"] is None
    zeros = sum(int((~mask).sum()) for mask in masks.values())
    assert done.made["sparsity"] == pytest.approx(zeros / sum(mask.numel() for mask in masks.values()))
    packed = {
        n: m.matrix for n, m in load_checkpoint(done.path).named_modules() if isinstance(m, StructuredLinear)
    }
    for name, mask in masks.items():
        matrix = packed[name]
        assert isinstance(matrix, Packed)
        assert not matrix.to_dense()[~mask].any()
        if settings["values"] == "bf16":
            assert torch.equal(matrix.to_dense().float(), model.get_submodule(name).weight.bfloat16().float())


def test_modules_keep_their_zeros_too() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(16, 32) < 0.4)  # type: ignore[operator]
    before = model[0].weight.detach().clone()
    found = gs.sparsify(model, [torch.randn(64, 32)], method="zeros", values="int8", skip="2")
    assert torch.equal(found.masks["0"], before != 0)
    assert not model[0].weight[before == 0].any()  # type: ignore[index]


@pytest.mark.parametrize(
    "asked",
    [
        {"pattern": "2:4"},
        {"sparsity": 0.5},
        {"sparsity": 0.0},
        {"budget": "60kB", "allocation_name": "sensitivity"},
    ],
)
def test_nothing_else_is_asked_of_it(asked: dict[str, Any]) -> None:
    with pytest.raises(MethodError, match="zeros prunes what is zero already"):
        check_combination("zeros", values="int4", **asked)
