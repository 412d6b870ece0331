"""Sizes against numbers counted by hand from shapes and the packed format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from gossamer.errors import EvaluationError
from gossamer.evaluate import memory_bytes, size_of
from gossamer.evaluate.layers import linear_layers
from gossamer.matrices import Dense, LowRank, Packed
from gossamer.models.checkpoint_writer import CheckpointWriter
from gossamer.models.walk import find_parts, prunable
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module
from gossamer.nn.experts import take_apart
from tiny import ARCHITECTURES, tiny_folder, tiny_model

LINEAR = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # q and o, k and v, the three of the MLP, in 3 blocks
EDGE = 384 * 64  # embedding, tied to the head
NORMS = 7 * 64


def half_mask(weight: torch.Tensor) -> torch.Tensor:
    """Every second weight of each row."""
    return (torch.arange(weight.shape[1]) % 2 == 0).expand(weight.shape).contiguous()


def packed_llama(layout: str = "32:64") -> nn.Module:
    model: nn.Module = tiny_model("llama")
    for name, layer in linear_layers(model).items():
        assert isinstance(layer, nn.Linear)
        mask = None if layout == "dense" else half_mask(layer.weight)
        matrix = Packed.pack(layer.weight.detach(), "int4", layout, mask=mask)
        replace_module(model, name, StructuredLinear(matrix, layer.bias))
    head = Packed.pack(model.lm_head.weight.detach(), "int8", "dense")
    replace_module(model, "lm_head", StructuredLinear(head))
    replace_module(
        model, "model.embed_tokens", StructuredEmbedding.from_embedding(model.model.embed_tokens, head)
    )
    return model


def test_dense_model_in_memory() -> None:
    model = tiny_model("llama")
    found = size_of(model)
    assert found.parameters == LINEAR + EDGE + NORMS
    assert found.linear_parameters == found.linear_kept == LINEAR
    assert found.linear_bits == 32.0
    assert found.sparsity == 0.0
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert found.memory_bytes == memory_bytes(model) == 4 * (LINEAR + EDGE + NORMS) + buffers
    assert found.all_bits == pytest.approx(8 * found.memory_bytes / found.parameters)
    assert found.file_bytes is None
    untied = size_of(tiny_model("llama_untied"))
    assert untied.parameters == LINEAR + 2 * EDGE + NORMS


def test_zeros_of_plain_layers_count_as_pruned() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(half_mask(model.model.layers[0].mlp.up_proj.weight))
        model.lm_head.weight[:100] = 0  # not prunable: does not count
    found = size_of(model)
    assert found.linear_kept == LINEAR - 64 * 128 // 2
    assert found.sparsity == pytest.approx(64 * 128 / 2 / LINEAR)


def test_packed_model_counts_masks_and_padding() -> None:
    model = packed_llama()
    found = size_of(model)
    assert found.parameters == LINEAR + EDGE + NORMS
    assert found.linear_parameters == LINEAR
    assert found.sparsity == 0.5
    # a panel-group of 32:64 int4: 512 nibbles, 1,024 mask bits, 16 float16 scales; all sizes divide evenly
    assert found.linear_bytes == LINEAR // 1024 * (256 + 128 + 32)
    assert found.linear_bits == 3.25
    head = EDGE + EDGE // 1024 * 32  # int8 codes and scales, held once though embedding and head use them
    buffers = sum(b.nbytes for n, b in model.named_buffers() if "inv_freq" in n)
    assert found.memory_bytes == found.linear_bytes + head + 4 * NORMS + buffers


def test_kept_weights_that_quantize_to_zero_are_not_pruned() -> None:
    weight = torch.full((16, 64), 1e-4)
    weight[:, 0] = 1.0
    layer = StructuredLinear(Packed.pack(weight, "int4", "bitmap", mask=half_mask(weight)))
    assert int(torch.count_nonzero(layer.matrix.to_dense())) < 16 * 32
    found = size_of(nn.ModuleList([layer]))
    assert found.linear_kept == 16 * 32


def test_low_rank_counts_the_weight_it_stands_for() -> None:
    left, right = torch.randn(32, 4), torch.randn(4, 64)
    model = nn.ModuleList([StructuredLinear(LowRank(Dense(left), Dense(right)), bias=torch.zeros(32))])
    found = size_of(model)
    assert (found.parameters, found.linear_parameters) == (32 * 64 + 32, 32 * 64)
    assert found.linear_kept == 4 * (32 + 64)
    assert found.linear_bytes == 4 * 4 * (32 + 64)


@pytest.mark.parametrize("arch", sorted(ARCHITECTURES))
def test_linear_layers_are_the_prunable_ones_of_all_blocks(arch: str) -> None:
    model = tiny_model(arch)
    expected = [f"{block.name}.{name}" for block in find_parts(model).blocks for name in prunable(block)]
    assert list(linear_layers(model)) == expected
    if arch == "llama":
        assert list(linear_layers(packed_llama())) == expected


@pytest.mark.parametrize("arch", ["llama", "gpt2", "mixtral"])
def test_plain_folder(arch: str, tmp_path: Path) -> None:
    model = tiny_model(arch).to(torch.bfloat16)
    with torch.no_grad():
        for layer in linear_layers(model).values():
            layer.weight[0] = 0
    model.save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"12345")
    take_apart(model)  # as on disk, where experts count as the linear layers that they are made into
    found, held = size_of(tmp_path), size_of(model)
    assert found.parameters == held.parameters == sum(p.numel() for p in model.parameters())
    assert (found.linear_parameters, found.linear_kept) == (held.linear_parameters, held.linear_kept)
    assert found.linear_bits == 16.0
    weights = (tmp_path / "model.safetensors").stat().st_size
    assert found.weight_file_bytes == weights
    assert found.file_bytes == weights + 5 + sum(path.stat().st_size for path in tmp_path.glob("*.json"))
    assert found.memory_bytes is None
    assert 16.0 <= found.all_bits < 18.0  # the header is what is more
    assert json.loads(json.dumps(found.to_dict()))["linear_bits"] == 16.0


def test_checkpoint_folder(tmp_path: Path) -> None:
    base = tiny_folder(tmp_path / "base")
    model = packed_llama("bitmap")
    writer = CheckpointWriter(tmp_path / "out", base)
    names = {id(module): f"{name}.weight" for name, module in model.named_modules(remove_duplicate=False)}
    for module in model.modules():
        if isinstance(module, StructuredLinear | StructuredEmbedding):
            writer.add_matrix(names[id(module)], module.matrix)
    for name, parameter in model.named_parameters():
        writer.add_tensor(name, parameter.detach())
    writer.finish({})
    found, held = size_of(tmp_path / "out"), size_of(model)
    assert found.parameters == held.parameters
    assert found.linear_kept == held.linear_kept == LINEAR // 2
    assert found.linear_bytes == held.linear_bytes
    weights = (tmp_path / "out" / "gossamer.safetensors").stat().st_size
    assert found.weight_file_bytes == weights
    assert found.file_bytes is not None
    assert found.file_bytes > weights


def test_no_folder_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="no folder"):
        size_of(tmp_path / "nothing")
