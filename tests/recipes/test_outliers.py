"""Outlier columns kept apart: which they are, what a checkpoint of them is, and that every engine runs it."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from gossamer import kernels
from gossamer.bench import plan
from gossamer.calibrate import Gram, InputPeak
from gossamer.engine import Decoder, NativeSession, why_not
from gossamer.errors import CheckpointError, MethodError, ModelError
from gossamer.evaluate import size_of
from gossamer.matrices import Packed, Selected, Sum
from gossamer.matrices.values import value_type
from gossamer.models import load_checkpoint, load_model
from gossamer.models.export import export_dense
from gossamer.models.verify import verify_checkpoint
from gossamer.prune import Layer, method
from gossamer.prune.outliers import OutlierColumns
from gossamer.recipes.compress import compress
from gossamer.recipes.describe import describe_checkpoint
from gossamer.recipes.finetune import finetune
from gossamer.recipes.recipe import read_recipe
from gossamer.sparse import parse_pattern
from tiny import tiny_folder, tiny_tokens

TEXT = "".join(topics.values())[:20_000]
SMALL: dict[str, Any] = {"windows": 2, "seqlen": 48, "calibration": [TEXT], "sparsity": 0.0, "values": "int8"}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def made(source: Path) -> Path:
    return compress(source, source.with_name("apart"), outlier_share=0.05, **SMALL).path


def test_outliers_are_the_largest_that_reach_the_threshold() -> None:
    peak = torch.tensor([1.0, 7.0, 6.0, 5.9, 9.0, 7.0])

    def chosen(threshold: float, share: float = 1.0) -> list[int]:
        return OutlierColumns(threshold, share).columns(peak).nonzero()[:, 0].tolist()

    assert chosen(6.0) == [1, 2, 4, 5]
    assert chosen(6.0, 0.5) == [1, 4, 5]
    assert chosen(6.0, 0.34) == [1, 4]  # of equal ones the first
    assert chosen(100.0) == []
    assert chosen(0.0) == [1, 2, 3, 4, 5]  # one stays with the integers


def test_the_peak_is_the_largest_magnitude_of_each_input() -> None:
    x = torch.randn(50, 7, generator=torch.Generator().manual_seed(0))
    seen = InputPeak(7)
    for part in (x[:20].bfloat16(), x[20:20], x[20:].bfloat16()):
        seen.update(part)
    seen.finish()
    assert torch.equal(seen.peak, x.bfloat16().float().abs().amax(dim=0))
    assert seen.tokens == 50


@pytest.mark.parametrize("name", ["obs", "magnitude"])
@pytest.mark.parametrize("pattern", [None, "2:4"])
def test_the_rest_is_what_the_method_makes_of_it_alone(name: str, pattern: str | None) -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(24, 72, generator=generator), torch.randn(300, 72, generator=generator)
    x[:, [3, 40, 41, 70]] *= 20
    outliers = torch.zeros(72, dtype=torch.bool).index_fill_(0, torch.tensor([3, 40, 41, 70]), True)

    def layer(weight: torch.Tensor, x: torch.Tensor) -> Layer:
        statistics = {kind: kind(x.shape[1]) for kind in (Gram, InputPeak)}
        for one in statistics.values():
            one.update(x)
            one.finish()
        return Layer("layer", weight, dict(statistics))

    shape, sparsity = parse_pattern(pattern or "unstructured"), 0.5 if pattern else 0.0
    how = (method(name), layer(weight, x), shape, sparsity, value_type("int4"), 64)
    got = OutlierColumns(20.0).prune(*how)
    alone = how[0].prune(layer(weight[:, ~outliers], x[:, ~outliers]), *how[2:])
    assert torch.equal(got.outliers, outliers)  # type: ignore[arg-type]
    assert torch.equal(got.weight[:, outliers], weight[:, outliers].bfloat16().float())
    assert torch.equal(got.weight[:, ~outliers], alone.weight)
    assert got.record["outliers"] == 4
    if pattern:
        assert got.mask is not None
        assert bool(got.mask[:, outliers].all())
        assert int(got.mask.sum()) == 24 * (4 + 34)


def test_a_checkpoint_is_sums_of_what_is_read(made: Path, source: Path) -> None:
    verify_checkpoint(made)
    model, dense = load_checkpoint(made), load_model(source)[0]
    layer = model.model.layers[0].mlp.down_proj
    assert isinstance(layer.matrix, Sum)
    rest, own = layer.matrix
    assert isinstance(rest, Selected)
    assert isinstance(own, Selected)
    assert (rest.leaf.values_name, own.leaf.values_name) == ("int8", "bfloat16")  # type: ignore[union-attr]
    assert own.leaf.shape == (64, 6)  # 5 % of 128 inputs
    assert torch.equal(rest.inputs(), ~own.inputs())
    weight = dense.model.layers[0].mlp.down_proj.weight.detach()[:, own.inputs()]
    assert torch.equal(own.leaf.to_dense(), weight.bfloat16().float())
    q, k = model.model.layers[0].self_attn.q_proj.matrix, model.model.layers[0].self_attn.k_proj.matrix
    assert torch.equal(list(q)[1].inputs(), list(k)[1].inputs())  # what reads the same has the same outliers

    facts = describe_checkpoint(made)
    assert facts.layouts["dense int8 + 16x4 bfloat16"] == 21
    assert facts.made["layers"][0]["outliers"] == 3
    assert facts.linear_bits == pytest.approx(size_of(made).linear_bits)
    assert facts.linear_bits > 8 * 0.95 + 16 * 0.05
    assert (facts.sparsity, size_of(made).sparsity) == (0.0, 0.0)


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
def test_both_engines_run_it(made: Path) -> None:
    model, ids = load_checkpoint(made, dtype=torch.float32), tiny_tokens(1, 60)[0]
    assert why_not(model) is None
    with torch.no_grad():
        want = model(ids[None]).logits[0]
    decoder = Decoder(model)
    got = NativeSession(decoder, torch.float32).logits(ids)
    assert float((got - want).abs().max() / want.abs().max()) < 0.03
    one = NativeSession(decoder, torch.float32)
    steps = torch.cat([one.logits(ids[:8]), *(one.step(int(token))[None] for token in ids[8:40])])
    few = NativeSession(decoder, torch.float32)
    assert torch.equal(steps, torch.cat([few.logits(ids[i : i + 10]) for i in range(0, 40, 10)]))
    assert plan(model, prompt=32, decode=4).explain()


def test_it_comes_out_dense_and_is_not_tuned(made: Path, tmp_path: Path) -> None:
    back = load_model(export_dense(made, tmp_path / "dense", "float32"))[0]
    stored = load_checkpoint(made).model.layers[1].self_attn.o_proj.matrix.to_dense()
    assert torch.equal(back.model.layers[1].self_attn.o_proj.weight, stored)
    with pytest.raises(ModelError, match="cannot be tuned yet"):
        finetune(made, tmp_path / "tuned", text=[TEXT], teacher=made, tokens=500, seqlen=32)


def test_a_damaged_list_is_named(made: Path) -> None:
    from gossamer.models.contents import open_checkpoint

    contents = open_checkpoint(made, "none")
    name = "model.layers.0.mlp.down_proj.weight"
    contents.manifest.matrices[name]["parts"][1]["shape"][1] = 40  # the words have bits past it
    with pytest.raises(CheckpointError, match=r"down_proj.*damaged"):
        contents.matrix(name)


def test_a_threshold_that_nothing_reaches_leaves_plain_integers(source: Path, tmp_path: Path) -> None:
    found = compress(source, tmp_path / "plain", outliers=1e6, **SMALL)
    assert {layer["outliers"] for layer in found.made["layers"]} == {0}
    assert isinstance(load_checkpoint(found.path).model.layers[0].mlp.down_proj.matrix, Packed)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"outliers": 6.0, "values": "bfloat16"}, "apart from integers"),
        ({"outliers": -1.0}, "size of 0 or more"),
        ({"outliers": float("nan")}, "size of 0 or more"),
        ({"outlier_share": 0.0}, "in \\(0, 1\\]"),
        ({"outlier_share": 1.5}, "in \\(0, 1\\]"),
        ({"outliers": 6.0, "tune": "blockwise"}, "cannot be tuned yet"),
        (
            {"outliers": 6.0, "sparsity": None, "allocation": "sensitivity", "budget": "1MB"},
            "does not know what outliers apart take",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_any_work(
    source: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(MethodError, match=message):
        compress(source, tmp_path / "out", **{**SMALL, **settings})
    assert not list(tmp_path.iterdir())


def test_recipes_know_outliers() -> None:
    compress_only = {"name": "mine", "compress": {"sparsity": 0, "values": "int8", "outliers": 6.0}}
    assert InputPeak in read_recipe(compress_only).compress.layer_needs()
    with pytest.raises(MethodError, match="leave tune or outliers out"):
        read_recipe({**compress_only, "tune": {"tokens": 1000}})
