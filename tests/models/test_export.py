"""Dense export: transformers loads it unchanged and computes what the structured weights say."""

from __future__ import annotations

import json
import os

import pytest
import safetensors.torch
import torch
from checkpoint_maker import (
    FORMATS,
    MADE,
    all_bytes,
    base_folder,
    densified,
    filled_writer,
    half_mask,
    tiny_checkpoint,
    tiny_matrices,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer.errors import CheckpointError, OutputError
from gossamer.matrices import Packed
from gossamer.models import load_checkpoint
from gossamer.models.export import export_dense
from tiny import tiny_model, tiny_tokens


def reload(folder, dtype):
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert {p.dtype for p in model.parameters()} == {dtype}
    return model.eval()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("made"), num_hidden_layers=1)


@pytest.mark.parametrize("arch", ["llama", "llama_untied", "gpt2", "gemma3", "opt", "falcon", "mixtral"])
def test_transformers_loads_the_dense_weights(tmp_path, arch):
    folder, model, matrices = tiny_checkpoint(tmp_path, arch)
    out = export_dense(folder, tmp_path / "dense", "float32")
    exported = reload(out, torch.float32)
    ids = tiny_tokens()
    with torch.no_grad():
        assert torch.equal(exported(ids).logits, densified(model, matrices)(ids).logits)
    for name, matrix in matrices.items():
        if isinstance(matrix, Packed) and matrix.masks is not None:
            weight = exported.get_submodule(name.removesuffix(".weight")).weight
            weight = weight.T if arch == "gpt2" else weight
            assert not weight[~matrix.mask()].any()
    assert AutoTokenizer.from_pretrained(out)("hello")["input_ids"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes(tmp_path, made, dtype):
    folder, _, matrices = made
    exported = reload(export_dense(folder, tmp_path / "dense", dtype), getattr(torch, dtype))
    q = exported.model.layers[0].self_attn.q_proj.weight
    matrix = matrices["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(q, matrix.to_dense().to(q.dtype))
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    stored = safetensors.torch.load_file(tmp_path / "dense" / "model.safetensors")
    assert "lm_head.weight" not in stored


def test_a_model_in_memory_and_fixed_bytes(tmp_path, made):
    folder = made[0]
    first = export_dense(folder, tmp_path / "a")
    second = export_dense(load_checkpoint(folder), tmp_path / "b", base=folder)
    assert all_bytes(first) == all_bytes(second)
    bare = export_dense(load_checkpoint(folder), tmp_path / "c")
    assert set(os.listdir(bare)) == {"config.json", "generation_config.json", "model.safetensors"}
    plain = tiny_model(num_hidden_layers=1)
    exported = reload(export_dense(plain, tmp_path / "d", "float32"), torch.float32)
    for name, parameter in plain.named_parameters():
        assert torch.equal(exported.get_parameter(name), parameter)


def test_how_the_source_was_quantized_is_forgotten(tmp_path, made):
    model = load_checkpoint(made[0])
    model.config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    out = export_dense(model, tmp_path / "dense")
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    assert reload(out, torch.bfloat16)
    assert model.config.quantization_config["quant_method"] == "fp8"


def test_head_and_embedding_that_differ_are_both_stored(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    weight = model.lm_head.weight.detach()
    matrices = tiny_matrices(model, FORMATS)
    matrices["lm_head.weight"] = Packed.pack(weight, "int8", mask=half_mask(weight))
    base = base_folder(tmp_path / "base", num_hidden_layers=1)
    folder = filled_writer(tmp_path / "out", base, model, matrices).finish(MADE)
    exported = reload(export_dense(folder, tmp_path / "dense", "float32"), torch.float32)
    assert torch.equal(exported.lm_head.weight, matrices["lm_head.weight"].to_dense())
    assert torch.equal(exported.model.embed_tokens.weight, matrices["model.embed_tokens.weight"].to_dense())


def test_shards(tmp_path, made):
    folder = made[0]
    seen = []
    out = export_dense(
        folder, tmp_path / "dense", shard_bytes=40_000, progress=lambda *step: seen.append(step)
    )
    names = sorted(name for name in os.listdir(out) if name.endswith(".safetensors"))
    assert len(names) > 2
    assert names[0] == f"model-00001-of-{len(names):05}.safetensors"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    total = 0
    for name in names:
        for tensor, value in safetensors.torch.load_file(out / name).items():
            assert index["weight_map"].pop(tensor) == name
            total += value.nbytes
    assert index == {"metadata": {"total_size": total}, "weight_map": {}}
    assert seen[-1] == ("exporting", total, total)
    assert [step[1] for step in seen] == sorted(step[1] for step in seen)
    one = reload(export_dense(folder, tmp_path / "one"), torch.bfloat16)
    many = reload(out, torch.bfloat16)
    for (name, a), (other, b) in zip(one.named_parameters(), many.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b)


def test_what_cannot_be_exported(tmp_path, made):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="nothing is overwritten"):
        export_dense(made[0], tmp_path / "taken")
    with pytest.raises(OutputError, match="int8"):
        export_dense(made[0], tmp_path / "dense", "int8")
    with pytest.raises(CheckpointError):
        export_dense(tmp_path, tmp_path / "dense")
    assert os.listdir(tmp_path) == ["taken"]


def test_weights_that_would_become_infinite_are_refused(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = -70000.0
    with pytest.raises(OutputError, match=r"mlp\.up_proj\.weight has numbers up to 70000, and float16 holds"):
        export_dense(model, tmp_path / "half", "float16")
    assert os.listdir(tmp_path) == []
    export_dense(model, tmp_path / "dense", "bfloat16")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 5] = -torch.inf  # which is what the model says
    export_dense(model, tmp_path / "half", "float16")
