"""Gates made for a model and saved with it: what is written, how it loads, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import gossamer as gs
from gossamer import kernels
from gossamer.errors import CheckpointError, GossamerError, MethodError, ModelError, SparsityError, TextError
from gossamer.models import load_checkpoint
from tiny import tiny_folder, tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

SMALL: dict[str, Any] = {"seqlen": 32, "windows": 2}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense checkpoint in int4."""
    folder = tmp_path_factory.mktemp("models")
    tiny_folder(folder / "tiny")
    return gs.compress(folder / "tiny", folder / "int4", method="magnitude", sparsity=0, **SMALL).path


@pytest.mark.parametrize("method", ["teal", "wina", "chess", "topk"])
def test_both_engines_run_gated_and_say_so(tmp_path: Path, method: str) -> None:
    tiny_folder(
        tmp_path / "tiny"
    )  # float32: no rounding of activations that could move them past a threshold
    made = gs.gate(tmp_path / "tiny", tmp_path / "out", method=method, sparsity=0.6, **SMALL)
    native = gs.load(made.path, cache="float32")
    other = gs.load(made.path, engine="transformers")
    assert native.engine == f"the native decoder, gated by {method}"
    assert other.engine == f"transformers: asked for, gated by {method}"
    ids = tiny_tokens(1, 40)[0]
    with torch.no_grad():
        want = other.model(ids[None]).logits[0]
        dense = load_checkpoint(made.path)(ids[None]).logits[0]
    got = native.session().logits(ids)  # type: ignore[attr-defined]
    assert float((got - want).abs().max() / want.abs().max()) <= 1e-3
    assert float((got - dense).abs().max() / want.abs().max()) >= 1e-2
    assert gs.verify_checkpoint(made.path).ok


def test_only_weights_that_drop_enough_lie_in_columns(source: Path, tmp_path: Path) -> None:
    few = gs.gate(source, tmp_path / "few", sparsity=0.4, **SMALL)
    many = gs.gate(source, tmp_path / "many", sparsity=0.6, **SMALL)
    assert (few.columns, len(many.columns), many.weights) == ((), 21, 21)
    bare = {"attention": ()}
    mlp = gs.gate(source, tmp_path / "mlp", method="chess", sparsity=0.6, options=bare, **SMALL)
    assert [name.split(".", 3)[3] for name in mlp.columns] == ["mlp.down_proj.weight"] * 3


def test_a_plain_model_is_packed_in_its_own_dtype(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "tiny")
    made = gs.gate(tmp_path / "tiny", tmp_path / "out", sparsity=0.6, allocation="greedy", **SMALL)
    facts = gs.describe(made.path)
    assert facts.linear_layers == 21
    layer = load_checkpoint(made.path).model.layers[0].mlp.down_proj.matrix
    want = gs.load(tmp_path / "tiny").model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(layer.to_dense(), want)


def test_layers_of_gpt2_that_are_stored_transposed_are_packed_too(tmp_path: Path) -> None:
    tiny_folder(tmp_path / "tiny", "gpt2")
    model = tiny_model("gpt2")
    made = gs.gate(tmp_path / "tiny", tmp_path / "out", sparsity=0.6, **SMALL)
    assert (made.weights, len(made.columns)) == (12, 12)
    ids = tiny_tokens(1, 40)
    with torch.no_grad():
        want = model(ids).logits
        torch.testing.assert_close(load_checkpoint(made.path)(ids).logits, want, atol=1e-4, rtol=0)
        assert float((gs.load(made.path).model(ids).logits - want).abs().max()) > 1e-2


def test_gates_of_a_plain_model_act_in_either_engine(source: Path, tmp_path: Path) -> None:
    made = gs.gate(source, tmp_path / "out", sparsity=0.6, **SMALL)
    plain = tiny_folder(tmp_path / "tiny")
    ids = tiny_tokens(1, 40)[0]
    ungated = gs.load(plain, engine="native", cache="float32").session().logits(ids)  # type: ignore[attr-defined]
    shutil.copy(made.path / "activations.json", plain)
    want = gs.load(plain, engine="transformers").model
    native = gs.load(plain, engine="native", cache="float32")
    assert native.engine == "the native decoder, gated by teal"
    with torch.no_grad():
        logits = [one(ids[None]).logits[0] for one in (want, native.model)]
    logits += [native.session().logits(ids)]  # type: ignore[attr-defined]
    for got in logits[1:]:
        assert float((got - logits[0]).abs().max() / logits[0].abs().max()) <= 1e-3
    assert float((ungated - logits[0]).abs().max() / logits[0].abs().max()) >= 1e-2


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        gs.gate(source, tmp_path / name, method="wina", **SMALL)
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"method": "nothing"}, GossamerError),
        ({"sparsity": 1.0}, SparsityError),
        ({"allocation": "guess"}, MethodError),
        ({"options": {"depth": 3}}, MethodError),
        ({"text": "/nowhere"}, TextError),
        ({"seqlen": 4096}, ModelError),
    ],
)
def test_bad_input_is_refused_and_leaves_nothing(
    source: Path, tmp_path: Path, changes: dict[str, Any], error: type[GossamerError]
) -> None:
    with pytest.raises(error):
        gs.gate(source, tmp_path / "out", **{**SMALL, **changes})
    assert list(tmp_path.iterdir()) == []


def test_damaged_gates_and_those_of_another_model_are_refused(source: Path, tmp_path: Path) -> None:
    made = gs.gate(source, tmp_path / "out", **SMALL)
    file = made.path / "activations.json"
    content = json.loads(file.read_text())
    file.write_text(file.read_text()[:-40])
    with pytest.raises(CheckpointError, match=r"activations\.json"):
        gs.load(made.path)
    tiny_folder(tmp_path / "small", intermediate_size=96)
    (tmp_path / "small" / "activations.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="its gate 128"):
        gs.load(tmp_path / "small")


@pytest.mark.parametrize("made", ["plain", "checkpoint"])
def test_experts_are_not_gated(tmp_path: Path, made: str) -> None:
    """Though they are linear layers: calibration may reach few of them, or none by any token."""
    model = tiny_folder(tmp_path / "moe", "mixtral", num_local_experts=32, num_experts_per_tok=1)
    if made == "checkpoint":
        model = gs.compress(model, tmp_path / "int4", method="magnitude", sparsity=0, **SMALL).path
    found = gs.gate(model, tmp_path / "out", sparsity=0.5, seqlen=16, windows=1)
    assert found.gates.gates
    assert not any(".experts." in name for name in found.gates.gates)
