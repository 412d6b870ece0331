"""compressed-tensors' sparse formats: what that library wrote is read, and ours is what it would write."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_maker import FLOATS, all_bytes, base_folder, filled_writer, tiny_matrices
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import gossamer as gs
from gossamer.cli.app import app
from gossamer.errors import ModelError, OutputError
from gossamer.matrices import Packed
from gossamer.models import load_checkpoint
from gossamer.models.bitmask import FORMATS, expanded, squeezed
from gossamer.models.export import export_dense
from gossamer.models.skeleton import load_model
from gossamer.models.sources import resolve
from gossamer.sparse import mask_from_scores, parse_pattern
from tiny import tiny_folder, tiny_model, tiny_tokens

GOLDEN = Path(__file__).parents[1] / "golden"
FILES = ("sparse-bitmask", "sparse-24-bitmask", "sparse-bitmask-old")


def golden(name: str) -> tuple[dict[str, torch.Tensor], dict[str, dict[str, torch.Tensor]]]:
    """Weights by layer, and their parts."""
    stored = load_file(GOLDEN / f"bitmask-{name}.safetensors")
    dense = {
        key.removeprefix("dense.").removesuffix(".weight"): value
        for key, value in stored.items()
        if key.startswith("dense.")
    }
    parts: dict[str, dict[str, torch.Tensor]] = {layer: {} for layer in dense}
    for key, value in stored.items():
        layer, _, part = key.rpartition(".")
        if not key.startswith("dense."):
            parts[layer.removesuffix(".weight")][part] = value
    return dense, parts


@pytest.mark.parametrize("name", FILES)
def test_what_the_library_wrote(name: str) -> None:
    dense, parts = golden(name)
    assert len(dense) == 3
    for layer, weight in dense.items():
        assert torch.equal(expanded(parts[layer]), weight)
        written = squeezed(weight, name.removesuffix("-old"))
        assert written.keys() == parts[layer].keys()
        for part, value in parts[layer].items():
            assert (written[part].dtype, written[part].shape) == (value.dtype, value.shape)
            if name == "sparse-24-bitmask" and part == "bitmask":  # which zeros stand for two is free
                full = (weight.reshape(len(weight), -1, 4) != 0).sum(2).eq(2).all(1)
                assert torch.equal(written[part][full], value[full])
                assert full.sum() == len(weight) - 1
            else:
                assert torch.equal(written[part], value)


@given(st.data())
def test_there_and_back(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(FORMATS))
    rows, columns = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 40))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    columns = columns * 4 if kind == FORMATS[1] else columns
    weight = torch.randn((rows, columns), generator=random)
    if kind == FORMATS[1]:
        weight = weight * mask_from_scores(weight.abs(), parse_pattern("2:4"))
    share = data.draw(st.sampled_from([0.0, 0.3, 1.0]))
    weight = (weight * (torch.rand((rows, columns), generator=random) < share)).to(dtype)
    parts = squeezed(weight, kind)
    assert torch.equal(expanded(parts), weight)
    if kind == FORMATS[0]:
        assert parts["compressed"].numel() == int((weight != 0).sum())


def test_more_than_two_of_four_are_refused() -> None:
    for weight in (torch.tensor([[1.0, 2, 3, 0]]), torch.zeros(2, 6)):
        with pytest.raises(OutputError, match="2:4"):
            squeezed(weight, "sparse-24-bitmask")


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("bitmask", lambda x: x ^ 1, "bits for"),
        ("bitmask", lambda x: x[:, :1], "is none of"),
        ("bitmask", lambda x: x.to(torch.int16), "is none of"),
        ("compressed", lambda x: x[:-1], "bits for"),
        ("compressed", lambda x: x.double(), "float64"),
        ("shape", lambda x: x + torch.tensor([0, 8]), "is none of"),
        ("shape", lambda x: -x, "none of a matrix"),
        ("shape", lambda x: x[:1], "none of a matrix"),
        ("row_offsets", lambda x: x + 1, "row offsets"),
        ("row_offsets", lambda x: x[1:], "row offsets"),
        ("shape", None, "shape is missing"),
        ("compressed", None, "compressed is missing"),
    ],
)
def test_parts_that_do_not_fit(part: str, change: Any, said: str) -> None:
    parts = golden("sparse-bitmask")[1]["a.q_proj"]
    damaged = {name: value for name, value in parts.items() if name != part}
    if change is not None:
        damaged[part] = change(parts[part])
    with pytest.raises(ModelError, match=said):
        expanded(damaged)


def test_bits_past_the_last_column() -> None:
    parts = squeezed(torch.eye(3, 5), "sparse-bitmask")
    parts["bitmask"][0, 0] |= 1 << 6
    with pytest.raises(ModelError, match="bits for"):
        expanded(parts)


# ---- models


def sparse_checkpoint(tmp_path: Path, pattern: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint whose linear layers have the pattern's zeros; and their weights."""
    model = tiny_model(num_hidden_layers=2)
    matrices = tiny_matrices(model, FLOATS, head="float32")
    for name in list(matrices):
        if name.startswith("model.layers"):
            weight = model.get_parameter(name).detach()
            mask = mask_from_scores(weight.abs(), parse_pattern(pattern))
            matrices[name] = Packed.pack(weight, "float32", mask=mask)
    base = base_folder(tmp_path / "base", num_hidden_layers=2)
    folder = filled_writer(tmp_path / "checkpoint", base, model, matrices).finish({"method": "magnitude"})
    return folder, {name: matrix.to_dense() for name, matrix in matrices.items()}


@pytest.mark.parametrize(("kind", "pattern"), [("sparse-bitmask", "4:8"), ("sparse-24-bitmask", "2:4")])
@pytest.mark.parametrize("shard_bytes", [40_000, 10**9])
def test_exported_and_read_again(tmp_path: Path, kind: str, pattern: str, shard_bytes: int) -> None:
    folder, weights = sparse_checkpoint(tmp_path, pattern)
    out = export_dense(folder, tmp_path / "out", "float32", sparse=kind, shard_bytes=shard_bytes)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["sparsity_config"]["format"] == kind
    assert config["sparsity_config"]["global_sparsity"] == pytest.approx(0.5, abs=0.02)
    stored = [name for path in out.glob("*.safetensors") for name in load_file(path)]
    assert "model.layers.1.mlp.up_proj.bitmask" in stored
    assert "model.layers.1.mlp.up_proj.weight" not in stored
    plain = export_dense(folder, tmp_path / "plain", "float32")
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert size < 0.8 * sum(path.stat().st_size for path in plain.glob("*.safetensors"))

    seen: list[tuple[str, int, int]] = []
    found = resolve(out, tmp_path / "cache", lambda *step: seen.append(step))
    assert "quantization_config" not in (found.folder / "config.json").read_text()
    assert str(tmp_path) not in "".join(path.read_text() for path in found.folder.glob("*.json"))
    model, info = AutoModelForCausalLM.from_pretrained(found.folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)
    converted = [step for step in seen if step[0] == "convert"]
    assert converted[-1][1] == converted[-1][2]
    seen.clear()
    assert resolve(out, tmp_path / "cache", lambda *step: seen.append(step)).folder == found.folder
    assert not seen


def test_what_stands_under_older_names(tmp_path: Path) -> None:
    folder, weights = sparse_checkpoint(tmp_path, "4:8")
    out = export_dense(folder, tmp_path / "out", "float32", sparse="sparse-bitmask")
    older = {
        name if name.rpartition(".")[2] == "weight" else name.replace("_proj.", "_proj.weight."): tensor
        for name, tensor in load_file(out / "model.safetensors").items()
    }
    save_file(older, out / "model.safetensors", {"format": "pt"})
    config = json.loads((out / "config.json").read_text())
    config["compression_config"] = {"sparsity_config": config.pop("quantization_config")["sparsity_config"]}
    (out / "config.json").write_text(json.dumps(config))
    model = AutoModelForCausalLM.from_pretrained(resolve(out, tmp_path / "cache").folder, dtype="auto")
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)


def test_a_config_that_names_the_library_and_compresses_nothing(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "dense"}
    (base / "config.json").write_text(json.dumps(config))
    found = resolve(base, tmp_path / "cache")
    assert found.folder != base
    model = AutoModelForCausalLM.from_pretrained(found.folder, dtype="auto")
    assert torch.equal(model.lm_head.weight, tiny_model().lm_head.weight)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("quantized", "quantized by compressed-tensors .pack-quantized."),
        ("format", "format 'marlin-24', which is not read"),
        ("bit", r"up_proj.weight is damaged: its bitmask has"),
        ("part", "has a bitmask, and no shape or numbers"),
        ("cut", "damaged"),
        ("gone", "model-00002-of-[0-9]*.safetensors of out is missing"),
        ("index", "index.json of out is damaged"),
    ],
)
def test_damage_is_told_and_nothing_is_kept(tmp_path: Path, damage: str, said: str) -> None:
    folder, _ = sparse_checkpoint(tmp_path, "4:8")
    shards = 40_000 if damage in ("gone", "index") else 10**9
    out = export_dense(folder, tmp_path / "out", "float32", sparse="sparse-bitmask", shard_bytes=shards)
    config, file = json.loads((out / "config.json").read_text()), out / "model.safetensors"
    told = config["quantization_config"]
    if damage == "quantized":
        told |= {"config_groups": {"group_0": {}}, "format": "pack-quantized"}
    elif damage == "format":
        told["sparsity_config"]["format"] = "marlin-24"
    elif damage in ("bit", "part"):
        tensors, name = load_file(file), "model.layers.0.mlp.up_proj"
        if damage == "bit":
            tensors[f"{name}.bitmask"][0, 0] ^= 4
        else:
            del tensors[f"{name}.compressed"]
        save_file(tensors, file, {"format": "pt"})
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1000])
    elif damage == "gone":
        next(out.glob("model-00002*")).unlink()
    else:
        (out / "model.safetensors.index.json").write_text("[]")
    (out / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=said):
        resolve(out, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("models/*"))


def test_an_export_that_is_not_2_4_leaves_nothing(tmp_path: Path) -> None:
    folder, _ = sparse_checkpoint(tmp_path, "4:8")
    with pytest.raises(OutputError, match=r"_proj.weight is not 2:4"):
        export_dense(folder, tmp_path / "out", "float32", sparse="sparse-24-bitmask")
    with pytest.raises(OutputError, match="one of sparse-bitmask, sparse-24-bitmask, not 'dense'"):
        export_dense(folder, tmp_path / "out", "float32", sparse="dense")
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path) -> None:
    folder, _ = sparse_checkpoint(tmp_path, "4:8")
    command = ["export", str(folder), "--format", "sparse-bitmask", "--json", "--dtype", "float32", "-o"]
    done = CliRunner().invoke(app, [*command, str(tmp_path / "out")])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["format"] == "sparse-bitmask"
    same = export_dense(folder, tmp_path / "same", "float32", sparse="sparse-bitmask")
    assert all_bytes(tmp_path / "out") == all_bytes(same)
    shutil.rmtree(tmp_path / "out")
    done = CliRunner().invoke(
        app, ["export", str(folder), "--format", "nonsense", "-o", str(tmp_path / "out")]
    )
    assert done.exit_code == 2


def test_what_is_no_linear_layer_stays_dense(tmp_path: Path) -> None:
    """GPT-2's Conv1D and fused experts: the library looks for neither."""
    for arch, layer in (("gpt2", "transformer.h.0.attn.c_attn.weight"), ("mixtral", "self_attn.q_proj")):
        source, made = tiny_folder(tmp_path / arch, arch), tmp_path / f"{arch}-sparse"
        gs.compress(source, made, method="magnitude", pattern="2:4", values="float32", head_values="float32")
        if arch == "gpt2":
            with pytest.raises(OutputError, match="no linear layer has zeros"):
                export_dense(made, tmp_path / "gpt2-out", "float32", sparse="sparse-24-bitmask")
            continue
        out = export_dense(made, tmp_path / f"{arch}-out", "float32", sparse="sparse-24-bitmask")
        stored = load_file(out / "model.safetensors")
        assert f"model.layers.0.{layer}.bitmask" in stored
        assert "model.layers.0.mlp.experts.gate_up_proj" in stored
        again, _ = load_model(resolve(out, tmp_path / "cache").folder)
        with torch.inference_mode():
            want = load_checkpoint(made)(tiny_tokens()).logits
            torch.testing.assert_close(again(tiny_tokens()).logits, want, rtol=1e-4, atol=1e-4)
