"""Fewer blocks: what is left against transformers with layers deleted by hand, choices against plain sums."""

from __future__ import annotations

import json
import math
import shutil
from copy import deepcopy
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer as gs
from gossamer.errors import GossamerError, MethodError, ModelError, OutputError, ResumeError
from gossamer.models.shorter import shorter_config, write_shorter
from gossamer.models.skeleton import WeightFiles, load_model, skeleton
from gossamer.models.text import calibration_windows, read_text
from gossamer.shrink import DEPTH, block_count
from gossamer.shrink.angular import angular_distance
from gossamer.shrink.loss import Loss
from tiny import tiny_config, tiny_folder, tiny_model, tiny_tokenizer, tiny_tokens

TEXT = [topics["lambda"] + topics["class"] + topics["try"]]
SMALL: dict[str, Any] = {"seqlen": 24, "windows": 4, "calibration": TEXT}


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.calibrate.stream.fast_dtype", lambda: torch.float32)
    monkeypatch.setattr("gossamer.shrink.loss.fast_dtype", lambda: torch.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=6)


def windows() -> Tensor:
    return calibration_windows(read_text(TEXT), tiny_tokenizer(), 24, 4, 0)


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]


def without(model: Any, removed: set[int]) -> Any:
    """The oracle: a copy of a Llama whose list of layers lacks some."""
    left = deepcopy(model)
    layers = [layer for index, layer in enumerate(left.model.layers) if index not in removed]
    left.model.layers = torch.nn.ModuleList(layers)
    left.config.num_hidden_layers = len(layers)
    if getattr(left.config, "layer_types", None):  # where the forward pass reads them
        left.config.layer_types = [t for i, t in enumerate(left.config.layer_types) if i not in removed]
    return left


@pytest.mark.parametrize("arch", ["llama", "llama_untied", "qwen2", "gemma2", "gemma3", "smollm3"])
def test_what_is_left_is_the_model_with_layers_deleted(arch: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "dense", arch)
    expected = logits(without(tiny_model(arch), {1}), tiny_tokens())
    bare, files = skeleton(source), WeightFiles(source)
    write_shorter(bare, files, (1,), tmp_path / "out", {})
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(theirs, tiny_tokens()), expected)
    ours, _ = load_model(tmp_path / "out")
    assert torch.equal(logits(ours, tiny_tokens()), expected)
    tied = bare.get_input_embeddings().weight is bare.get_output_embeddings().weight
    assert ("lm_head.weight" in WeightFiles(tmp_path / "out")) is not tied


@pytest.mark.parametrize("arch", ["gpt2", "opt", "gpt_neox", "bloom", "qwen3_moe"])
def test_other_families_keep_their_blocks_in_order(arch: str, tmp_path: Path) -> None:
    from gossamer.models.walk import find_parts

    source = tiny_folder(tmp_path / "dense", arch)
    write_shorter(skeleton(source, apart=False), WeightFiles(source), (0,), tmp_path / "out", {})
    before, _ = load_model(source)
    after, _ = load_model(tmp_path / "out")
    old, new = find_parts(before).blocks, find_parts(after).blocks
    assert len(new) == len(old) - 1
    for one, other in zip(old[1:], new, strict=True):
        state = other.module.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in one.module.state_dict().items())


def test_lists_of_one_entry_a_block_are_cut() -> None:
    config = shorter_config(tiny_config("smollm3", num_hidden_layers=6), {1, 4})
    assert config.num_hidden_layers == len(config.layer_types) == 4
    assert config.no_rope_layers == [1, 1, 0, 0]  # of 1, 0, 1, 0, 1, 0
    assert shorter_config(tiny_config("gpt2"), {0}).n_layer == 2


def test_blocks_that_depend_on_their_place_are_refused(tmp_path: Path) -> None:
    dense = {"mlp_only_layers": [0], "num_hidden_layers": 4}
    source = tiny_folder(tmp_path / "moe", "qwen3_moe", **dense)  # a list of places: block 0 has no experts
    with pytest.raises(ModelError, match="kind by their place"):
        write_shorter(skeleton(source, apart=False), WeightFiles(source), (0,), tmp_path / "out", {})
    assert not (tmp_path / "out").exists()
    scaled = tiny_folder(tmp_path / "gpt2", "gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ModelError, match="block's place"):
        write_shorter(skeleton(scaled), WeightFiles(scaled), (0,), tmp_path / "out", {})


def test_angular_distances_are_those_of_hidden_states(folder: Path, tmp_path: Path) -> None:
    made = gs.remove_blocks(folder, tmp_path / "out", blocks=2, **SMALL)
    model, _ = load_model(folder)
    seen: list[Tensor] = []  # the last of transformers' own hidden_states has been through the norm
    for layer in model.model.layers:
        layer.register_forward_hook(lambda _m, args, out: seen.extend([args[0], out][bool(seen) :]))
    logits(model, windows())
    last = [states[:, -1].double() for states in seen]
    expected = []
    for first in range(5):
        x, y = last[first], last[first + 2]
        cosine = (x * y).sum(-1) / x.norm(dim=-1) / y.norm(dim=-1)
        expected.append(float((cosine.arccos() / math.pi).mean()))
    assert made.record["measured"]["distances"] == pytest.approx(expected, abs=1e-5)
    first = expected.index(min(expected))
    assert made.removed == (first, first + 1)
    assert json.loads((made.path / "gossamer_shrink.json").read_text()) == made.record
    assert made.record["blocks"] == 6


def test_influence_is_one_less_the_mean_cosine(folder: Path, tmp_path: Path) -> None:
    made = gs.remove_blocks(folder, tmp_path / "out", method="influence", blocks=2, **SMALL)
    model, _ = load_model(folder)
    expected = []

    def hook(_module: Any, args: tuple[Tensor, ...], out: Tensor) -> None:
        cosine = torch.nn.functional.cosine_similarity(args[0].double(), out.double(), dim=-1)
        expected.append(float(1 - cosine.mean()))

    for layer in model.model.layers:
        layer.register_forward_hook(hook)
    logits(model, windows())
    assert made.record["measured"]["influence"] == pytest.approx(expected, abs=1e-5)
    assert made.removed == tuple(sorted(sorted(range(6), key=expected.__getitem__)[:2]))


def nll(model: Any) -> float:
    ids = windows()
    predicted = logits(model, ids)[:, :-1].reshape(-1, 384)
    return float(torch.nn.functional.cross_entropy(predicted, ids[:, 1:].reshape(-1)))


def test_loss_removes_greedily_by_perplexity(folder: Path, tmp_path: Path) -> None:
    made = gs.remove_blocks(folder, tmp_path / "out", method="loss", blocks=2, **SMALL)
    model, _ = load_model(folder)
    removed: list[int] = []
    losses = []
    for _ in range(2):
        left = {i: nll(without(model, {*removed, i})) for i in range(6) if i not in removed}
        removed.append(min(left, key=left.__getitem__))
        losses.append(min(left.values()))
    assert made.record["measured"]["order"] == removed
    assert made.record["measured"]["losses"] == pytest.approx(losses, abs=1e-5)
    assert made.removed == tuple(sorted(removed))
    shorter, _ = load_model(made.path)
    assert nll(shorter) == pytest.approx(losses[-1], abs=1e-5)


def test_the_angle_of_opposite_right_and_equal_vectors() -> None:
    x = torch.tensor([[1.0, 0.0]])
    assert float(angular_distance(x, 3 * x)) == 0
    assert float(angular_distance(x, -x)) == 1
    assert float(angular_distance(x, torch.tensor([[0.0, 2.0]]))) == pytest.approx(0.5)


@pytest.mark.parametrize(("blocks", "total", "count"), [(0.25, 30, 8), (0.25, 6, 2), (3, 6, 3), (0.1, 30, 3)])
def test_a_share_of_blocks_rounds_half_up(blocks: float, total: int, count: int) -> None:
    assert block_count(blocks, total) == count


@pytest.mark.parametrize("blocks", [0, -1, 6, 7, 1.5, 0.01, float("nan"), float("inf")])
def test_numbers_of_blocks_that_are_none(blocks: float) -> None:
    with pytest.raises(MethodError, match=r"blocks"):
        block_count(blocks, 6)


@pytest.mark.parametrize("name", list(DEPTH))
def test_resumed_work_gives_the_same_folder(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gs.remove_blocks(folder, tmp_path / "whole", method=name, blocks=2, **SMALL)
    calls = 0

    def stop(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += done == (1 if name == "loss" else 3) and "block" in stage
        if calls == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gs.remove_blocks(folder, tmp_path / "out", method=name, blocks=2, progress=stop, **SMALL)
    with pytest.raises(ResumeError, match="differs in settings"):
        gs.remove_blocks(folder, tmp_path / "out", method=name, blocks=3, **SMALL)
    shutil.copytree(folder, tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ResumeError, match=r"differs in model \(model.config.json was"):
        gs.remove_blocks(tmp_path / "edited", tmp_path / "out", method=name, blocks=2, **SMALL)
    begun: list[int] = []
    again = gs.remove_blocks(
        folder, tmp_path / "out", method=name, blocks=2, progress=lambda s, d, t: begun.append(d), **SMALL
    )
    assert begun[0] == (1 if name == "loss" else 3)
    assert not (tmp_path / "out.work").exists()
    assert again.record == whole.record
    for path in sorted(whole.path.iterdir()):
        assert (again.path / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_shorter_model_is_compressed_as_any_other(folder: Path, tmp_path: Path) -> None:
    shorter = gs.remove_blocks(folder, tmp_path / "short", blocks=2, **SMALL)
    made = gs.compress(shorter.path, tmp_path / "sparse", method="magnitude", pattern="2:4", values="bf16")
    loaded = gs.load(made.path)
    assert loaded.engine == "the native decoder"
    assert len(loaded.model.model.layers) == 4
    assert (made.path / "gossamer_shrink.json").is_file()  # what was taken away is known of the checkpoint


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"method": "anglar"}, "did you mean 'angular'"),
        ({"blocks": 6}, "6 of 6 blocks"),
        ({"blocks": -0.5}, "between 0 and 1"),
        ({"seqlen": 10_000}, "longer than the 512 positions"),
        ({"windows": 0}, "the setting windows"),
        ({"layers": 2}, r"no such setting \(there are: blocks, method"),
        ({"options": {"depth": 1}}, "does not take these options"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    settings: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(GossamerError, match=says):
        gs.remove_blocks(folder, tmp_path / "out", **{**SMALL, **settings})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/file").touch()
    with pytest.raises(OutputError, match="exists already"):
        gs.remove_blocks(folder, tmp_path / "out", **SMALL)


def test_the_default_of_windows_is_the_method_s_own() -> None:
    assert (DEPTH["angular"].windows, Loss.windows) == (64, 8)
