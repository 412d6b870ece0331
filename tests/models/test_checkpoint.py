"""Checkpoints: what is written is what loads, the same bytes each time, and nothing is overwritten."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_maker import (
    FLOATS,
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

from gossamer.errors import CheckpointError, ModelError, OutputError
from gossamer.matrices import BlockDiagonal, LowRank, Packed, Product, Sparse, Sum, pack
from gossamer.models import CheckpointWriter, is_checkpoint, load_checkpoint, read_part, write_part
from gossamer.models.manifest import read_manifest
from gossamer.models.place import place_matrix, takes_matrix
from gossamer.models.verify import verify_checkpoint
from gossamer.nn import StructuredEmbedding, StructuredLinear
from tiny import tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("made"), num_hidden_layers=1)


# biases, Conv1D, scaled embeddings, learned positions and projections, own linear classes, fused experts
@pytest.mark.parametrize(
    "arch", ["llama", "llama_untied", "qwen2", "gpt2", "gemma3", "opt", "bloom", "falcon", "mixtral"]
)
def test_every_architecture_gives_the_logits_of_its_dense_weights(tmp_path, arch):
    folder, model, matrices = tiny_checkpoint(tmp_path, arch, FLOATS, head="float32")
    loaded = load_checkpoint(folder)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert all(p.device.type == "cpu" for p in loaded.parameters())
    ids = tiny_tokens()
    with torch.no_grad():
        expected = densified(model, matrices)(ids).logits
        assert torch.allclose(loaded(ids).logits, expected, atol=2e-4, rtol=1e-3)


def test_all_formats_load_as_they_were_packed(made):
    folder, model, matrices = made
    loaded = load_checkpoint(folder)
    for name, matrix in matrices.items():
        module = loaded.get_submodule(name.removesuffix(".weight"))
        assert isinstance(module, StructuredLinear | StructuredEmbedding)
        assert module.matrix.describe() == matrix.describe()
        assert torch.equal(module.matrix.to_dense(), matrix.to_dense())
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert head.matrix is embedding.matrix
    state = dict(model.named_parameters())
    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, state[name])
    ids = tiny_tokens(1, 8)
    with torch.no_grad():
        out = loaded.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=2)
    assert out.shape == (1, 12)


def test_columns_load_as_they_were_packed(tmp_path):
    formats = [(values, "columns") for values in ("int4", "int8", "bfloat16", "float32")]
    folder, _, matrices = tiny_checkpoint(tmp_path, formats=formats)
    loaded = load_checkpoint(folder)
    layouts = set()
    for name, matrix in matrices.items():
        again = loaded.get_submodule(name.removesuffix(".weight")).matrix
        layouts.add(again.layout)
        assert again.describe() == matrix.describe()
        assert torch.equal(again.to_dense(), matrix.to_dense())
        x = torch.randn(2, matrix.shape[1]) * (torch.rand(2, matrix.shape[1]) < 0.3)
        assert torch.equal(again.matmul(x), matrix.matmul(x))
    assert layouts == {"columns", "dense"}  # dense: the embeddings
    with torch.no_grad():
        assert loaded(tiny_tokens()).logits.isfinite().all()


def test_packed_tensors_are_mapped_not_copied(made):
    loaded = load_checkpoint(made[0])
    matrix = loaded.model.layers[0].self_attn.q_proj.matrix
    assert matrix.values.data_ptr() % 64 == 0
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            begin, end = (int(text, 16) for text in line.split(" ")[0].split("-"))
            if begin <= matrix.values.data_ptr() < end:
                assert line.endswith("gossamer.safetensors")


def test_the_same_input_gives_the_same_bytes(tmp_path, made):
    folder, model, matrices = made
    again = filled_writer(tmp_path / "again", folder.parent / "base", model, matrices)
    reordered = dict(reversed(MADE.items()))
    assert all_bytes(again.finish(reordered)) == all_bytes(folder)
    backwards = dict(reversed(matrices.items()))
    other = filled_writer(tmp_path / "other", folder.parent / "base", model, backwards)
    theirs, ours = all_bytes(other.finish(MADE)), all_bytes(folder)
    # of tied names the first one added is stored
    assert theirs["tokenizer.json"] == ours["tokenizer.json"]
    assert set(os.listdir(tmp_path)) == {"again", "other"}


def test_what_lies_on_disk(made):
    folder, _, matrices = made
    names = set(os.listdir(folder))
    assert {"config.json", "gossamer.json", "gossamer.safetensors", "tokenizer.json"} <= names
    assert not [name for name in names if "tmp" in name]
    tensors = safetensors.torch.load_file(folder / "gossamer.safetensors")
    q = "model.layers.0.self_attn.q_proj.weight"
    assert {name for name in tensors if name.startswith(q)} == {
        f"{q}.{section}" for section in ("values", "masks", "scales", "offsets")
    }
    assert torch.equal(tensors[f"{q}.values"], matrices[q].values)
    assert not [name for name in tensors if name.startswith("lm_head")]
    assert "model.norm.weight" in tensors
    manifest = read_manifest(folder)
    assert manifest.made == MADE
    assert manifest.ties == {"lm_head.weight": "model.embed_tokens.weight"}
    assert set(manifest.tensors) == set(tensors)
    assert set(manifest.files) == names - {"gossamer.json"}
    assert manifest.matrices[q] == matrices[q].describe()
    text = (folder / "gossamer.json").read_text()
    assert str(folder) not in text
    assert is_checkpoint(folder)
    assert not is_checkpoint(folder.parent / "base")
    from transformers import AutoConfig, AutoTokenizer

    assert AutoConfig.from_pretrained(folder).hidden_size == 64
    assert AutoTokenizer.from_pretrained(folder)("hello")["input_ids"]


def test_plain_transformers_refuses_it_and_does_not_start_from_random_weights(made):
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(made[0])


def test_verify_reads_everything(made):
    report = verify_checkpoint(made[0])
    assert report.ok
    assert report.problems == ()
    assert report.matrices == len(read_manifest(made[0]).matrices) == 8
    assert {file.name for file in report.files} == set(os.listdir(made[0])) - {"gossamer.json"}


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.bfloat16])
def test_dtype_of_what_is_not_packed(tmp_path, dtype):
    model = tiny_model(num_hidden_layers=1).to(torch.bfloat16)
    base = base_folder(tmp_path / "base", num_hidden_layers=1)
    writer = filled_writer(tmp_path / "out", base, model, tiny_matrices(model.float(), FORMATS))
    model.to(torch.bfloat16)
    loaded = load_checkpoint(writer.finish(MADE), dtype=dtype)
    wanted = dtype or torch.bfloat16
    assert {p.dtype for p in loaded.parameters()} == {wanted}
    assert loaded.dtype == loaded.config.dtype == wanted
    assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32
    with torch.no_grad():
        assert loaded(tiny_tokens(1, 4)).logits.dtype == wanted


def test_untied_where_head_and_embedding_differ(tmp_path):
    """The configuration ties them, but both are stored: each is its own."""
    model = tiny_model(num_hidden_layers=1)
    matrices = tiny_matrices(model, FLOATS, "float32")
    matrices["lm_head.weight"] = Packed.pack(model.lm_head.weight.detach() * 2, "float32", "dense")
    base = base_folder(tmp_path / "base", num_hidden_layers=1)
    folder = filled_writer(tmp_path / "out", base, model, matrices).finish(MADE)
    loaded = load_checkpoint(folder)
    assert read_manifest(folder).ties == {}
    assert torch.equal(loaded.lm_head.matrix.to_dense(), 2 * loaded.model.embed_tokens.matrix.to_dense())


def test_ties_of_the_configuration_need_no_second_name(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    matrices = tiny_matrices(model, FLOATS)
    base = base_folder(tmp_path / "base", num_hidden_layers=1)
    writer = CheckpointWriter(tmp_path / "out", base)
    for name, matrix in matrices.items():
        if name != "lm_head.weight":
            writer.add_matrix(name, matrix)
    for name, tensor in model.named_parameters():
        if name not in matrices:
            writer.add_tensor(name, tensor)
    loaded = load_checkpoint(writer.finish(MADE))
    assert loaded.lm_head.matrix is loaded.model.embed_tokens.matrix


def test_a_model_without_packed_weights_stays_tied(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    base = base_folder(tmp_path / "base", num_hidden_layers=1)
    folder = filled_writer(tmp_path / "out", base, model, {}).finish({})
    assert read_manifest(folder).ties == {"lm_head.weight": "model.embed_tokens.weight"}
    loaded = load_checkpoint(folder)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    ids = tiny_tokens()
    with torch.no_grad():
        assert torch.allclose(loaded(ids).logits, model(ids).logits, atol=1e-5)


def test_any_kind_of_matrix(tmp_path):
    model = tiny_model(num_hidden_layers=1)
    matrices = tiny_matrices(model, FLOATS)
    layers = model.model.layers[0]
    low_rank = LowRank.fit(layers.mlp.up_proj.weight.detach(), rank=8)
    weight = layers.mlp.gate_proj.weight.detach()
    both = Sum(LowRank.fit(weight, rank=4), Sparse(half_mask(weight), weight), pack(weight, values="int8"))
    matrices["model.layers.0.mlp.up_proj.weight"] = low_rank
    matrices["model.layers.0.mlp.gate_proj.weight"] = both
    down = layers.mlp.down_proj.weight.detach()
    core = Sparse(half_mask(down), down)
    sides = [BlockDiagonal.from_blocks(torch.randn(2, n // 2, n // 2)) for n in down.shape]
    tree = Sum(LowRank.fit(down, rank=4), Product(sides[0], core, sides[1]))
    packed = pack(tree, "int4", overrides={"0": {"values": "bfloat16"}})
    matrices["model.layers.0.mlp.down_proj.weight"] = packed
    base = base_folder(tmp_path / "base", num_hidden_layers=1)
    loaded = load_checkpoint(filled_writer(tmp_path / "out", base, model, matrices).finish(MADE))
    mlp = loaded.model.layers[0].mlp
    assert torch.equal(mlp.up_proj.matrix.to_dense(), low_rank.to_dense())
    assert torch.equal(mlp.gate_proj.matrix.to_dense(), both.to_dense())
    x = torch.randn(3, down.shape[1])
    assert mlp.down_proj.matrix.is_packed
    assert torch.equal(mlp.down_proj(x), packed(x))


def test_parts_come_back(tmp_path, made):
    _, model, matrices = made
    weight = model.lm_head.weight.detach()
    matrices = {**matrices, "low/rank": LowRank.fit(weight, rank=2)}
    write_part(tmp_path / "a", matrices)
    write_part(tmp_path / "b", dict(reversed(matrices.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    again = read_part(tmp_path / "a")
    assert list(again) == sorted(matrices)
    for name, matrix in again.items():
        assert matrix.describe() == matrices[name].describe()
        assert torch.equal(matrix.to_dense(), matrices[name].to_dense())
    raw = (tmp_path / "a").read_bytes()
    for cut in (0, 20, len(raw) // 2, len(raw) - 1):
        (tmp_path / "b").write_bytes(raw[:cut])
        with pytest.raises(CheckpointError):
            read_part(tmp_path / "b")
    safetensors.torch.save_file({"a": torch.zeros(2)}, tmp_path / "b")
    with pytest.raises(CheckpointError, match="not written by Gossamer"):
        read_part(tmp_path / "b")


# --- what cannot be written -------------------------------------------------------------------------------


def test_a_finished_output_is_never_overwritten(tmp_path, made):
    folder, model, matrices = made
    base = folder.parent / "base"
    with pytest.raises(OutputError, match="nothing is overwritten"):
        CheckpointWriter(folder, base)
    writer = filled_writer(tmp_path / "late", base, model, matrices)
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "mine").write_text("precious")
    with pytest.raises(OutputError, match="nothing is overwritten"):
        writer.finish(MADE)
    assert all_bytes(tmp_path) == {"late/mine": b"precious"}


def test_scratch_and_an_empty_output_folder(tmp_path, made):
    folder, model, matrices = made
    (tmp_path / "out").mkdir()
    (tmp_path / "work").mkdir()
    scratch = tmp_path / "work" / "checkpoint"
    scratch.mkdir()
    (scratch / "left over").write_text("of a killed run")
    seen = []
    writer = filled_writer(
        tmp_path / "out",
        folder.parent / "base",
        model,
        matrices,
        scratch=scratch,
        progress=lambda stage, done, total: seen.append((stage, done, total)),
    )
    assert all_bytes(writer.finish(MADE)) == all_bytes(folder)
    assert os.listdir(tmp_path / "work") == []
    stage, done, total = seen[-1]
    assert stage == "writing"
    assert done == total > 0


def test_what_is_no_whole_model_is_not_written(tmp_path, made):
    folder, model, matrices = made
    base = folder.parent / "base"
    norm = "model.layers.0.input_layernorm.weight"
    q = "model.layers.0.self_attn.q_proj.weight"

    def refused(match, parts, extra=()):
        writer = CheckpointWriter(tmp_path / "out", base)
        for name, part in [*parts.items(), *extra]:
            (writer.add_tensor if isinstance(part, torch.Tensor) else writer.add_matrix)(name, part)
        with pytest.raises(OutputError, match=match):
            writer.finish(MADE)
        assert os.listdir(tmp_path) == []

    state = {n: t for n, t in model.state_dict(keep_vars=True).items() if n not in matrices}
    whole = {**matrices, **state}
    refused(f"'{norm}' is missing", {n: p for n, p in whole.items() if n != norm})
    refused("no parameter 'model.extra'", whole, [("model.extra", torch.zeros(3))])
    refused("input_layernorm.weight' is", {**whole, norm: torch.zeros(3)})
    refused("q_proj.weight' is", {**whole, q: pack(torch.zeros(64, 128), values="int8")})
    refused("norm.weight' is", {**whole, norm: pack(torch.ones(64, 64))})
    refused("complex64", {**whole, norm: torch.zeros(64, dtype=torch.complex64)})
    refused("int64", {**whole, norm: torch.zeros(64, dtype=torch.int64)})
    refused("would both be stored", whole, [(f"{q}.values", torch.zeros(3))])


def test_writer_says_what_is_wrong(tmp_path, made):
    folder, model, matrices = made
    base = folder.parent / "base"
    with pytest.raises(OutputError, match=r"no config\.json"):
        CheckpointWriter(tmp_path / "out", tmp_path)
    writer = filled_writer(tmp_path / "out", base, model, matrices)
    for name in ("lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight"):
        with pytest.raises(OutputError, match=f"'{name}' was added .* twice"):
            writer.add_tensor(name, torch.zeros(1))
    for bad in ({"a": {1: 2}}, {"a": [object()]}, {"a": torch.zeros(2)}):
        with pytest.raises(OutputError, match=r"made\.a"):
            writer.finish(bad)
    made_by = {"x": float("nan"), "y": np.float32(0.5), "z": (1, np.int64(2)), "t": torch.tensor(3)}
    written = writer.finish(made_by)
    assert read_manifest(written).made == {"x": None, "y": 0.5, "z": [1, 2], "t": 3}
    assert "NaN" not in (written / "gossamer.json").read_text()


def test_an_unwritable_place(tmp_path, made):
    folder, model, matrices = made
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):
        filled_writer(tmp_path / "file" / "out", folder.parent / "base", model, matrices).finish(MADE)


def test_layers_that_compute_something_else_keep_their_weights():
    class Scaled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    model = torch.nn.ModuleDict({"a": Scaled(64, 64), "b": torch.nn.Linear(64, 64)})
    assert not takes_matrix(model["a"])
    assert takes_matrix(model["b"])
    assert not takes_matrix(torch.nn.Embedding(3, 4, max_norm=1.0))
    matrix = pack(torch.ones(64, 64))
    with pytest.raises(ModelError, match="a Scaled cannot"):
        place_matrix(model, "a.weight", matrix, torch.float32)
    with pytest.raises(ModelError, match="its bias"):
        place_matrix(model, "b.bias", matrix, torch.float32)
    with pytest.raises(ModelError, match=r"\[64, 128\]"):
        place_matrix(model, "b.weight", pack(torch.ones(64, 128)), torch.float32)


def test_a_copied_folder_with_other_files_beside_still_loads(tmp_path, made):
    copy = shutil.copytree(made[0], tmp_path / "copy")
    (copy / "README.md").write_text("a note")
    load_checkpoint(copy)
    assert verify_checkpoint(copy).ok
    assert json.loads((copy / "gossamer.json").read_text())["format"] == "gossamer"
