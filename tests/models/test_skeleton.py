"""Weights come into memory one module at a time, and wrong files are refused before any work."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from gossamer.errors import ModelError
from gossamer.models.folders import wanted
from gossamer.models.skeleton import (
    SINGLE_FILE,
    WeightFiles,
    _parameters_on_meta,
    load_model,
    materialize,
    read_parameter,
    release,
    skeleton,
)
from gossamer.models.walk import capture_block_inputs, find_parts, finish, run_block
from tiny import ARCHITECTURES, tiny_folder, tiny_model, tiny_tokenizer, tiny_tokens


def rewrite(folder: Path, change: Any) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_one_block_in_memory_gives_the_models_logits(arch: str, tmp_path: Path) -> None:
    folder, ids = tiny_folder(tmp_path / arch, arch), tiny_tokens()
    model, files = skeleton(folder), WeightFiles(folder)
    assert all(p.device.type == "meta" for p in model.parameters())
    assert all(b.device.type == "cpu" for b in model.buffers())
    assert not model.training
    parts = find_parts(model)
    for name in (*parts.embeddings, *parts.norms, *parts.others):
        materialize(model.get_submodule(name), name, files)
    inputs = capture_block_inputs(model, ids, batch=2)
    hidden = inputs.hidden
    for block, kwargs in zip(parts.blocks, inputs.kwargs, strict=True):
        materialize(block.module, block.name, files, check_finite=True)
        with torch.no_grad():
            hidden = run_block(block, hidden, kwargs)
        release(block.module)
        assert all(p.device.type == "meta" for p in block.module.parameters())
    if not parts.tied:
        for name in parts.embeddings:
            release(model.get_submodule(name))
    if parts.head is not None:
        materialize(model.get_submodule(parts.head), parts.head, files)
    with torch.no_grad():
        expected = tiny_model(arch)(input_ids=ids).logits
    assert torch.equal(finish(model, hidden), expected)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "qwen3_moe"])
def test_load_model_equals_transformers(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / arch, arch)
    model, tokenizer = load_model(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == expected.dtype
    with torch.no_grad():
        assert torch.equal(model(tiny_tokens()).logits, expected(tiny_tokens()).logits)
    assert tokenizer("some text").input_ids
    assert model.generation_config.eos_token_id == 2


def test_load_model_converts_but_keeps_rotary_frequencies(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    half, _ = load_model(folder, dtype="bfloat16")
    full, _ = load_model(folder)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert torch.equal(half.model.rotary_emb.inv_freq, full.model.rotary_emb.inv_freq)
    assert half.model.rotary_emb.inv_freq.dtype == torch.float32
    for a, b in zip(half.parameters(), full.parameters(), strict=True):
        assert torch.equal(a, b.bfloat16())
    with pytest.raises(ModelError, match="int4"):
        load_model(folder, dtype="int4")


@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_embeddings_are_scaled_in_the_dtype_of_the_weights(
    stored: torch.dtype, asked: torch.dtype, tmp_path: Path
) -> None:
    model = tiny_model("gemma3", hidden_size=40).to(stored)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    found, _ = load_model(tmp_path, asked)
    expected = type(model).from_pretrained(tmp_path, dtype=asked)
    assert found.config.dtype == expected.config.dtype == asked
    with torch.no_grad():
        assert torch.equal(found(tiny_tokens()).logits, expected(tiny_tokens()).logits)


def test_other_threads_make_modules_as_ever(tmp_path: Path) -> None:
    made: list[torch.device] = []
    with _parameters_on_meta():
        thread = threading.Thread(target=lambda: made.append(torch.nn.Linear(2, 2).weight.device))
        thread.start()
        thread.join()
        assert torch.nn.Linear(2, 2).weight.device.type == "meta"
    assert made == [torch.device("cpu")]


def test_tied_weights_stay_one_tensor(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "llama")
    model, files = skeleton(folder), WeightFiles(folder)
    head = model.lm_head.weight
    assert "lm_head.weight" not in files
    materialize(model.lm_head, "lm_head", files)
    assert model.model.embed_tokens.weight is model.lm_head.weight is head
    assert torch.equal(head, files.tensor("model.embed_tokens.weight"))
    release(model.model.embed_tokens)
    assert model.lm_head.weight.device.type == "meta"


def test_materialize_leaves_what_is_in_memory(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    model, files = skeleton(folder), WeightFiles(folder)
    materialize(model, "", files)
    with torch.no_grad():
        model.model.norm.weight.fill_(7)
    materialize(model, "", files)
    assert model.model.norm.weight.unique().tolist() == [7]
    kept = read_parameter(model.model.norm.weight, "model.norm.weight", files)
    assert torch.equal(kept, files.tensor("model.norm.weight"))


def test_sharded_files_and_files_of_the_bare_body(tmp_path: Path) -> None:
    """GPT-2 on the hub is stored without the prefix ``transformer.``"""
    model = tiny_model("gpt2")
    sharded, bare = tmp_path / "sharded", tmp_path / "bare"
    model.save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 2
    model.transformer.save_pretrained(bare)
    assert "wte.weight" in WeightFiles(bare)
    for folder in (sharded, bare):
        loaded = skeleton(folder)
        materialize(loaded, "", WeightFiles(folder))
        with torch.no_grad():
            assert torch.equal(loaded(tiny_tokens()).logits, model(tiny_tokens()).logits)


def test_one_file_goes_before_shards_as_in_transformers(tmp_path: Path) -> None:
    """A model that was saved anew into a folder that held it in shards."""
    tiny_model("llama", 1).save_pretrained(tmp_path, max_shard_size="100KB")
    again = tiny_model("llama", 2)
    again.save_pretrained(tmp_path / "again")
    (tmp_path / "again" / SINGLE_FILE).rename(tmp_path / SINGLE_FILE)
    loaded = skeleton(tmp_path)
    materialize(loaded, "", WeightFiles(tmp_path))
    theirs = type(again).from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(tiny_tokens()).logits, again(tiny_tokens()).logits)
        assert torch.equal(theirs(tiny_tokens()).logits, again(tiny_tokens()).logits)
    assert wanted(sorted(path.name for path in tmp_path.glob("*.*"))) == [
        "config.json",
        "generation_config.json",
        SINGLE_FILE,
    ]


def test_conversion_to_another_dtype_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # the package's attribute of that name is the function
    monkeypatch.setattr(sys.modules["gossamer.models.skeleton"], "PIECE", 7)
    tensors = {
        "a": torch.randn(5, 9),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "ids": torch.arange(9),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    files = WeightFiles(tmp_path)
    assert files.names() == ["a", "empty", "ids", "scalar"]
    for name, tensor in tensors.items():
        assert torch.equal(files.tensor(name), tensor)
        assert torch.equal(files.tensor(name, torch.bfloat16), tensor.to(torch.bfloat16))
        assert files.shape(name) == tuple(tensor.shape)
        assert files.dtype(name) == tensor.dtype


def test_untouched_weights_take_no_memory(tmp_path: Path) -> None:
    """A file of 512 MiB: opening it and reading one small tensor leaves the rest out of resident memory."""
    count = 128 << 20
    header = {
        "large": {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]},
        "small": {"dtype": "F32", "shape": [4], "data_offsets": [4 * count, 4 * count + 16]},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + 4 * count + 16)
    before = psutil.Process().memory_info().rss
    files = WeightFiles(tmp_path)
    assert files.tensor("small").tolist() == [0, 0, 0, 0]
    assert psutil.Process().memory_info().rss - before < 64 << 20


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is given back through the GNU C library"
)
def test_released_weights_leave_memory(tmp_path: Path) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    folder = tiny_folder(tmp_path / "m", **sizes)
    model, files = skeleton(folder), WeightFiles(folder)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what earlier tests left free would be taken again unseen
    before = psutil.Process().memory_info().rss
    materialize(model, "", files)
    held = psutil.Process().memory_info().rss - before
    release(model)
    left = psutil.Process().memory_info().rss - before
    total = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert total > 50 << 20
    assert left < held - total * 0.8


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(
        ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight of LlamaForCausalLM is missing"
    ):
        skeleton(folder)


def test_unexpected_tensors_are_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match=r"model\.layers\.9\.mlp\.up_proj\.weight.*no place"):
        skeleton(folder)


def test_saved_buffers_of_old_releases_and_tied_copies_are_no_trouble(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    rewrite(folder, add)
    model, _ = load_model(folder)
    with torch.no_grad():
        assert torch.equal(model(tiny_tokens()).logits, tiny_model()(tiny_tokens()).logits)


def test_wrong_shapes_are_named(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(65)}))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(65,\).*\(64,\)"):
        skeleton(folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path: Path, value: float) -> None:
    folder = tiny_folder(tmp_path / "m")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][3, 5] = value

    rewrite(folder, spoil)
    model, files = skeleton(folder), WeightFiles(folder)
    block = model.model.layers[2]
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight holds NaN or infinity"):
        materialize(block, "model.layers.2", files, check_finite=True)
    materialize(block, "model.layers.2", files)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1000])
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        skeleton(folder)
    path.write_bytes(whole)
    files = WeightFiles(folder)
    path.write_bytes(whole[:-100_000])
    with pytest.raises(ModelError, match="cannot read the tensor"):
        [files.tensor(name) for name in files.names()]
    path.unlink()
    with pytest.raises(ModelError, match="neither"):
        WeightFiles(folder)


@pytest.mark.parametrize("place", ["../model.safetensors", "/etc/passwd", 5])
def test_an_index_may_not_point_elsewhere(tmp_path: Path, place: Any) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": place}}))
    with pytest.raises(ModelError, match="no file beside it"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', "{}"])
def test_a_damaged_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"index\.json.*damaged"):
        WeightFiles(tmp_path)


@pytest.mark.parametrize("config", ["{", "{}", '{"model_type": "no_such"}', '{"model_type": "t5"}'])
def test_configs_of_no_decoder_are_refused(tmp_path: Path, config: str) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "config.json").write_text(config)
    with pytest.raises(ModelError, match="makes no causal language model of m"):
        skeleton(folder)


def test_encoders_are_no_causal_models(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel, RoFormerConfig, RoFormerForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    for decodes in (False, True):
        folder = tmp_path / str(decodes)
        BertLMHeadModel(BertConfig(vocab_size=50, is_decoder=decodes, **small)).save_pretrained(folder)
    with pytest.raises(ModelError, match=r"no causal language model: BertLMHeadModel reads .*is_decoder"):
        skeleton(tmp_path / "False")
    assert skeleton(tmp_path / "True").config.is_decoder
    RoFormerForCausalLM(RoFormerConfig(vocab_size=50, **small)).save_pretrained(tmp_path / "roformer")
    with pytest.raises(ModelError, match="no causal language model: RoFormer"):
        skeleton(tmp_path / "roformer")


def test_packed_checkpoints_are_told_from_models(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    (folder / "gossamer.json").write_text("{}")
    with pytest.raises(ModelError, match="m is a packed checkpoint"):
        skeleton(folder)
