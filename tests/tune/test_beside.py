"""Low-rank parameters beside sparse weights: how they begin, what they compute, and where they end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from tuned_models import RUN, TEXT, Stopped, masked, same_files

import gossamer as gs
from gossamer.errors import MethodError
from gossamer.kernels import native_available
from gossamer.matrices import LowRank, Packed, Sum
from gossamer.models import load_checkpoint
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.sparse import NM, mask_from_scores
from gossamer.tune import SparseTuning
from gossamer.tune.beside import Beside, BesideOptions, apart
from gossamer.tune.place import TunedLinear
from gossamer.tune.weights import TunedWeight
from tiny import tiny_folder, tiny_model, tiny_tokens


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("dense") / "tiny", num_hidden_layers=2)


@pytest.fixture(scope="module")
def sparse(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "sparse"
    compress(dense, out, calibration=[TEXT], pattern="2:4", values="int4", windows=2, seqlen=32)
    return out


def test_what_was_lost_comes_back_as_means_of_sums_or_as_the_nearest_of_its_rank() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 32)
    mask = mask_from_scores(weight.abs(), NM(2, 4))
    sparse, lost = weight * mask, weight * ~mask
    sums = Beside.begin(BesideOptions(sums=16, begin="lost"), sparse, weight)
    assert torch.allclose(sums.B, lost.reshape(12, 2, 16).mean(2), atol=1e-6)
    assert {name for name, _ in sums.named_parameters()} == {"B"}
    assert torch.equal(sums.A.sum(1), torch.full((2,), 16.0))
    low = Beside.begin(BesideOptions(rank=3, begin="lost"), sparse, weight)
    u, s, v = torch.linalg.svd(lost)
    assert torch.allclose(low.B @ low.A, u[:, :3] * s[:3] @ v[:3], atol=1e-4)
    for options in (BesideOptions(sums=16), BesideOptions(rank=3)):
        assert not (lambda one: one.B @ one.A)(Beside.begin(options, sparse, None)).any()


@pytest.mark.parametrize("options", [{"rank": 4, "begin": "lost"}, {"sums": 16, "begin": "lost"}])
def test_a_layer_computes_both_and_gradients_reach_both(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(24, 32), torch.randn(5, 32)
    mask = mask_from_scores(weight.abs(), NM(2, 4))
    beside = Beside.begin(BesideOptions(**options), weight * mask, weight)
    with torch.no_grad():
        for parameter in beside.parameters():
            parameter.copy_(parameter.bfloat16())  # as stored
    layer = TunedLinear(TunedWeight(weight * mask, mask), None, beside)
    parts = [p.detach().clone().requires_grad_() for p in (layer.tuned.latent, beside.B, beside.A)]
    want = nn.functional.linear(x, parts[0] * mask + parts[1] @ parts[2])
    assert torch.allclose(layer(x), want, atol=1e-4)
    layer(x).square().sum().backward()
    want.square().sum().backward()
    for own, plain in zip((layer.tuned.latent, beside.B, beside.A), parts, strict=True):
        if own.requires_grad:
            assert own.grad is not None
            assert plain.grad is not None
            assert torch.allclose(own.grad, plain.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["full", "ast", "lora"])
@pytest.mark.parametrize("options", [{"rank": 4}, {"sums": 16, "begin": "lost"}])
def test_masks_hold_at_every_step_and_the_merge_changes_nothing(method: str, options: dict[str, Any]) -> None:
    model, masks = masked()
    teacher = tiny_model(seed=5, num_hidden_layers=2).requires_grad_(False)
    tuning = SparseTuning(
        model, teacher=teacher, dense=tiny_model(num_hidden_layers=2), losses={"kl": 1}, masks=masks,
        method=method, beside=options, rate=1e-2, warmup=0.0,
    )  # fmt: skip
    begun = {name: one.B.detach().clone() for name, one in tuning.beside.items()}
    ids = tiny_tokens(3, 20)
    losses = []
    for step in range(8):
        loss = tuning.loss(ids)
        losses.append(float(loss.detach()))
        loss.backward()
        tuning.step(step / 8)
        for name, weight in tuning.weights.items():
            kept = masks[name] if method != "ast" else weight.mask
            assert kept is not None
            assert not weight()[~kept].any()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(begun[name], one.B) for name, one in tuning.beside.items())
    with torch.no_grad():
        before = model(ids).logits
        merged = tuning.merge()
        assert torch.allclose(model(ids).logits, before, atol=1e-4)
    for name, mask in masks.items():
        matrix = merged[f"{name}.weight"]
        main, low_rank = matrix  # type: ignore[misc]
        assert isinstance(matrix, Sum)
        assert isinstance(low_rank, LowRank)
        assert mask is not None
        assert int((main.to_dense() != 0).sum()) <= int(mask.sum())
        assert isinstance(model.get_submodule(name), StructuredLinear)


def test_checkpoints_keep_them_apart_and_go_on_with_them(sparse: Path, dense: Path, tmp_path: Path) -> None:
    settings = {**RUN, "teacher": dense}
    once = gs.finetune(sparse, tmp_path / "once", beside={"sums": 16}, **settings)
    was, now = (
        {n: m.matrix for n, m in load_checkpoint(p).named_modules() if isinstance(m, StructuredLinear)}
        for p in (sparse, tmp_path / "once")
    )
    changed = {name for name in was if isinstance(now[name], Sum)}
    assert changed == {layer["name"] for layer in once.made["layers"]}
    for name in changed:
        main, beside = apart(now[name])
        assert isinstance(main, Packed)
        assert beside is not None
        assert beside.fixed
        assert torch.equal(main.mask(), was[name].mask())
        assert main.values_name == "int4"
    assert all(layer["rank_beside"] == layer["shape"][1] // 16 for layer in once.made["layers"])
    ids = tiny_tokens(1, 12)
    reopened = load_checkpoint(tmp_path / "once", dtype=torch.float32)
    plain = reopened.get_submodule(min(changed))
    x = torch.randn(3, plain.in_features)
    assert torch.allclose(plain(x), x @ plain.matrix.to_dense().float().T, atol=0.05)  # int8 activations
    logits = reopened(ids).logits
    assert logits.isfinite().all()
    if native_available():
        native = gs.load(tmp_path / "once", engine="native").new_session().logits(ids[0])
        assert torch.allclose(native, logits[0], atol=0.05 * float(logits.abs().max()))

    with pytest.raises(MethodError, match="has low-rank parameters already"):
        gs.finetune(tmp_path / "once", tmp_path / "no", beside={"rank": 2}, **settings)
    again = gs.finetune(tmp_path / "once", tmp_path / "again", **settings)
    assert len(again.made["tuned"]) == 2
    end = {
        n: m.matrix for n, m in load_checkpoint(tmp_path / "again").named_modules()
        if isinstance(m, StructuredLinear)
    }  # fmt: skip
    moved = 0
    for name in changed:
        main, low_rank = end[name]
        first, before = now[name]
        assert torch.equal(main.mask(), first.mask())
        moved += not torch.equal(low_rank.to_dense(), before.to_dense())
    assert moved == len(changed)


@pytest.mark.parametrize("beside", [{"rank": 2, "begin": "lost"}, {"sums": 32}])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    beside: dict[str, Any], sparse: Path, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**RUN, "teacher": dense, "beside": beside, "evaluations": 4}
    gs.finetune(sparse, tmp_path / "whole", **settings)
    steps = Stopped(monkeypatch, at=4)
    with pytest.raises(KeyboardInterrupt):
        gs.finetune(sparse, tmp_path / "out", **settings)
    assert gs.finetune(sparse, tmp_path / "out", **settings).resumed
    assert steps.calls == 5  # one step was left
    assert same_files(tmp_path / "whole", tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "give one of them"),
        ({"rank": 2, "sums": 16}, "give one of them"),
        ({"rank": 0}, "1 or more, got 0"),
        ({"sums": 2.5}, "a whole number or none, got 2.5"),
        ({"rank": 2, "begin": "dense"}, "not 'dense'"),
        ({"depth": 2}, "beside"),
        ({"sums": 17}, "inputs are not sums of 17"),
        ({"rank": 4000}, "rank of"),
        ({"rank": 4000, "begin": "lost"}, "rank of"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(options: dict[str, Any], says: str) -> None:
    model, masks = masked()
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(MethodError, match=says):
        SparseTuning(
            model, teacher=tiny_model(num_hidden_layers=2), losses={"kl": 1}, masks=masks, beside=options
        )
    assert [type(module) for module in model.modules()] == kinds


def test_what_was_lost_needs_the_dense_model() -> None:
    model, masks = masked()
    with pytest.raises(MethodError, match="give the dense model"):
        SparseTuning(model, losses={"task": 1}, masks=masks, beside={"rank": 2, "begin": "lost"})
