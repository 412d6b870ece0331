"""Block-wise reconstruction inside the main job: better than before, masks exact, resumed to the bit."""

from __future__ import annotations

import json
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from gossamer.calibrate import stream
from gossamer.errors import GossamerError, MethodError
from gossamer.matrices import Packed
from gossamer.models import load_checkpoint, load_model
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.sparse import parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.tune import blockwise, tuner
from gossamer.tune.blockwise import Blockwise
from tiny import tiny_folder

TEXT, OTHER = "".join(topics.values())[:20_000], "".join(topics.values())[20_000:24_000]
SMALL: dict[str, Any] = {"windows": 8, "seqlen": 32, "calibration": [TEXT], "tune": "blockwise"}
FEW = {"tune_options": {"epochs": 1}}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def blocks_of(made: dict[str, Any]) -> list[dict[str, Any]]:
    """One record a block."""
    return [layer for layer in made["layers"] if layer["name"].endswith("q_proj")]


def error_of(model: Any, dense: Any, tokenizer: Any) -> float:
    """Of the last hidden states, on a text that nothing was calibrated on."""
    ids = torch.tensor(tokenizer(OTHER)["input_ids"][: 8 * 64]).reshape(8, 64)
    with torch.no_grad():
        want = dense.model(ids).last_hidden_state.float()
        return float(
            (model.model(ids).last_hidden_state.float() - want).square().mean() / want.square().mean()
        )


@pytest.mark.parametrize(
    ("arch", "settings"),
    [
        ("llama", {"pattern": "32:64", "values": "int4"}),
        ("llama", {"method": "magnitude", "sparsity": 0.6, "values": "float32"}),
        ("llama", {"sparsity": 0.0, "values": "int3"}),
        ("gpt2", {"pattern": "2:4", "values": "bfloat16"}),
        ("qwen3", {"method": "wanda", "sparsity": 0.5, "values": "int4"}),
    ],
)
def test_blocks_come_nearer_to_the_dense_ones(arch: str, settings: dict[str, Any], tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "dense", arch)
    tuned = compress(folder, tmp_path / "tuned", **SMALL, tune_options={"epochs": 4}, **settings)
    for layer in tuned.made["layers"]:
        assert layer["block_loss_tuned"] <= layer["block_loss"]
        assert layer["tuned_tokens"] == 4 * 7 * 32  # one window of eight is held out
    assert any(layer["block_loss_tuned"] < layer["block_loss"] for layer in tuned.made["layers"])
    plain = compress(folder, tmp_path / "plain", **SMALL | {"tune": None}, **settings)
    masks = [
        {name: m.matrix.mask() for name, m in load_checkpoint(done.path).named_modules()
         if isinstance(m, StructuredLinear) and isinstance(m.matrix, Packed)}
        for done in (plain, tuned)
    ]  # fmt: skip
    assert masks[0].keys() == masks[1].keys()
    # the first block's masks are chosen before anything was tuned
    some = [name for name in masks[0] if ".0." in name]
    assert some
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in some)
    assert [a["sparsity"] for a in plain.made["layers"]] == [a["sparsity"] for a in tuned.made["layers"]]


@pytest.mark.parametrize("values", ["int4", "bfloat16"])
def test_masks_hold_at_every_step(
    values: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tune, call = Blockwise.tune, blockwise.functional_call
    begun: dict[str, torch.Tensor] = {}
    named: dict[str, str] = {}
    seen: dict[str, list[torch.Tensor]] = {}

    def beginning(self: Blockwise, visit: Any, weights: dict[str, Any], seed: int) -> Any:
        begun.update({name: weight.mask.clone() for name, weight in weights.items()})
        named.update({f"block.{name.removeprefix(visit.name + '.')}.weight": name for name in weights})
        return tune(self, visit, weights, seed)

    def watched(block: Any, given: dict[str, torch.Tensor], *rest: Any) -> Any:
        for inner, weight in given.items():
            assert not weight[~begun[named[inner]]].any()
            seen.setdefault(named[inner], []).append(weight.detach())
        return call(block, given, *rest)

    monkeypatch.setattr(Blockwise, "tune", beginning)
    monkeypatch.setattr(blockwise, "functional_call", watched)
    done = compress(source, tmp_path / "out", **SMALL, **FEW, pattern="2:4", values=values)
    assert begun.keys() == {layer["name"] for layer in done.made["layers"]}
    for name, module in load_checkpoint(done.path).named_modules():
        if name in begun:
            check_mask(begun[name], parse_pattern("2:4"))
            assert torch.equal(module.matrix.mask(), begun[name])
            assert any(not torch.equal(seen[name][0], later) for later in seen[name])


def test_the_whole_model_comes_nearer_too(source: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"pattern": "32:64", "values": "int4"}
    dense, tokenizer = load_model(source)
    errors = [
        error_of(
            load_checkpoint(compress(source, tmp_path / name, **SMALL | more, **settings).path),
            dense,
            tokenizer,
        )
        for name, more in (
            ("plain", {"tune": None}),
            ("tuned", {"windows": 64, "tune_options": {"epochs": 2}}),
        )
    ]
    assert errors[1] < errors[0]


def test_an_interrupted_run_goes_on_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = compress(source, tmp_path / "whole", **SMALL, **FEW)
    written = stream.Inputs.written
    calls = 0

    def failing(self: Any, parts: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 5:  # in the second block
            raise KeyboardInterrupt
        return written(self, parts)

    monkeypatch.setattr(stream.Inputs, "written", failing)
    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "again", **SMALL, **FEW)
    monkeypatch.undo()
    assert json.loads((tmp_path / "again.work" / "state.json").read_text())["next_block"] == 1
    again = compress(source, tmp_path / "again", **SMALL, **FEW)
    assert again.resumed
    for file in ("gossamer.safetensors", "gossamer.json"):
        assert (whole.path / file).read_bytes() == (again.path / file).read_bytes()


def test_a_rate_that_ruins_everything_leaves_the_block_as_it_was(source: Path, tmp_path: Path) -> None:
    plain = compress(source, tmp_path / "plain", **SMALL | {"tune": None})
    wild = compress(source, tmp_path / "wild", **SMALL, tune_options={"epochs": 1, "rate": 0.99})
    for before, after in zip(blocks_of(plain.made), blocks_of(wild.made), strict=True):
        assert after["block_loss_tuned"] <= after["block_loss"]
        if after["block_loss_tuned"] == after["block_loss"]:
            assert after["output_error"] == pytest.approx(before["output_error"], rel=0.5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"tune": "blokwise"}, "did you mean 'blockwise'"),
        ({"tune_options": {"speed": 1}}, "does not take these options"),
        ({"tune_options": {"epochs": 0}}, "at least one epoch"),
        ({"tune_options": {"rate": 1.5}}, "a rate in"),
        ({"tune": None, "tune_options": {"epochs": 1}}, "none is named"),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    settings: dict[str, Any], says: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(GossamerError, match=says):
        compress(source, tmp_path / "out", **SMALL | settings)
    assert not any(tmp_path.iterdir())


def test_a_walk_without_targets_is_refused() -> None:
    with pytest.raises(MethodError, match="hidden states"):
        Blockwise().tune(stream.Visit(0, "block", torch.nn.Linear(2, 2), {}, None), {}, 0)  # type: ignore[arg-type]
    assert isinstance(tuner("blockwise", epochs=2), Blockwise)


@pytest.mark.parametrize("arch", ["gemma2", "falcon", "mistral", "bloom"])
def test_masks_and_positions_are_those_of_one_window(arch: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "tiny", arch, num_hidden_layers=2)
    done = compress(
        source, tmp_path / "out", method="magnitude", sparsity=0.5, **(SMALL | FEW | {"windows": 4})
    )
    for layer in done.made["layers"]:
        assert layer["block_loss_tuned"] <= layer["block_loss"]
