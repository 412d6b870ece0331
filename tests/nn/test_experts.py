"""Fused experts taken apart: the same model, whose experts can then be made sparse like any linear layer."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer as gs
from gossamer.evaluate import size_of
from gossamer.matrices import Packed
from gossamer.models import load_checkpoint
from gossamer.models.skeleton import WeightFiles, load_model, materialize, read_parameter, skeleton
from gossamer.nn import StructuredLinear
from gossamer.nn.experts import Experts, share_of_tokens, take_apart
from tiny import tiny_folder, tiny_model, tiny_tokens

ARCHS = ["mixtral", "qwen3_moe", "gpt_oss"]  # gpt_oss: with biases, transposed, gate and up interleaved
TEXT = ["Sparse networks are small, and fast on the machine that a person already has. " * 60]
SMALL: dict[str, Any] = {"calibration": TEXT, "windows": 4, "seqlen": 48}


def logits(model: Any) -> Tensor:
    with torch.inference_mode():
        found: Tensor = model(tiny_tokens()).logits
    return found


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("arch", ARCHS)
def test_apart_they_compute_the_same(arch: str) -> None:
    model = tiny_model(arch)
    before, count = logits(model), sum(p.numel() for p in model.parameters())
    take_apart(model)
    assert sum(isinstance(module, Experts) for module in model.modules()) == 3
    assert sum(p.numel() for p in model.parameters()) == count
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("qwen3_moe", {"num_experts_per_tok": 2}),
        ("gemma4_text", {"top_k_experts": 2}),
        ("gemma4", {"text_config": {"top_k_experts": 2}}),
        ("aria_text", {"moe_topk": 2}),
        ("kimi_linear", {"num_experts_per_token": 2}),
        ("hunyuan_v1_moe", {"moe_topk": [1, 3]}),
    ],
)
def test_each_expert_reads_a_share_of_the_tokens(family: str, settings: dict[str, Any]) -> None:
    from transformers import AutoConfig

    experts = tiny_model("qwen3_moe").model.layers[0].mlp.experts  # four
    assert share_of_tokens(experts, AutoConfig.for_model(family, **settings)) == 0.5
    assert share_of_tokens(experts, None) == share_of_tokens(torch.nn.Linear(2, 2), None) == 1


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_are_those_of_the_fused_ones(arch: str) -> None:
    fused, apart = tiny_model(arch), tiny_model(arch)
    take_apart(apart)
    for model in (fused, apart):
        model(tiny_tokens(), labels=tiny_tokens()).loss.backward()
    for index in range(3):
        stack = fused.model.layers[index].mlp.experts
        its = apart.model.layers[index].mlp.experts
        for name, parameter in stack.named_parameters():
            for number, (layer, part) in enumerate(its.parts(name)):
                want = parameter.grad[number]
                want = want.T if stack.is_transposed and part == "weight" else want
                found = getattr(layer, part).grad
                found = torch.zeros_like(want) if found is None else found  # no token came by
                torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("arch", ARCHS)
def test_an_expert_is_read_without_the_others(
    arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_folder(tmp_path / arch, arch)
    whole, _ = load_model(folder)
    model, files = skeleton(folder), WeightFiles(folder)
    read = 0
    original = WeightFiles.tensor

    def counted(self: WeightFiles, *args: Any) -> Tensor:
        nonlocal read
        tensor = original(self, *args)
        read += tensor.numel()
        return tensor

    monkeypatch.setattr(WeightFiles, "tensor", counted)
    name = "model.layers.1.mlp.experts.2.gate_up_proj.weight"
    parameter = model.get_parameter(name)
    found = read_parameter(parameter, name, files)
    assert read == found.numel()
    experts = whole.model.layers[1].mlp.experts
    want = experts.gate_up_proj.detach()[2]
    assert torch.equal(found, want.T if experts.is_transposed else want)
    materialize(model, "", files)
    torch.testing.assert_close(logits(model), logits(whole), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_experts_are_compressed_and_come_back_fused(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny_folder(tmp_path / arch, arch)
    gs.compress(folder, tmp_path / "same", method="magnitude", sparsity=0.0, values="float32",
                head_values="float32", **SMALL)  # fmt: skip
    assert distance(logits(load_checkpoint(tmp_path / "same")), logits(load_model(folder)[0])) < 1e-5
    done = gs.compress(folder, tmp_path / "sparse", pattern="2:4", values="int4", **SMALL)
    assert sum(".experts." in layer["name"] for layer in done.made["layers"]) == 3 * 4 * 2
    model = load_checkpoint(tmp_path / "sparse")
    for layer, part in model.model.layers[0].mlp.experts.parts("down_proj"):
        assert isinstance(layer, StructuredLinear)
        assert part == "weight"
        assert isinstance(layer.matrix, Packed)
        assert layer.matrix.layout != "dense"
    assert size_of(tmp_path / "sparse").sparsity == pytest.approx(0.5)
    gs.export_dense(tmp_path / "sparse", tmp_path / "dense", "float32")
    fused = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").model.layers[2].mlp.experts
    for number, (layer, _) in enumerate(model.model.layers[2].mlp.experts.parts("gate_up_proj")):
        want = fused.gate_up_proj.detach()[number]
        assert torch.equal(layer.matrix.to_dense(), want.T if fused.is_transposed else want)


@pytest.mark.parametrize(
    ("method", "allocation", "group"),
    [
        ("wanda", "uniform", "row"),
        ("fisher", "global", "tensor"),
        ("wanda", "sensitivity", "row"),
    ],
)
def test_experts_that_no_token_reaches_are_pruned_by_their_weights(
    method: str, allocation: str, group: str, tmp_path: Path
) -> None:
    """Wanda's |W| ||x|| without inputs is |W|, and Fisher's W^2 g^2 / 2 without gradients W^2."""
    folder = tiny_folder(tmp_path / "m", "mixtral", num_local_experts=32, num_experts_per_tok=1)
    done = gs.compress(
        folder, tmp_path / "out", method=method, sparsity=0.5, allocation=allocation, values="float32",
        calibration=TEXT, windows=1, seqlen=12,
    )  # fmt: skip
    records = [layer for layer in done.made["layers"] if ".experts." in layer["name"]]
    unreached = [layer for layer in records if layer.get("unreached")]
    assert 0 < len(unreached) < len(records) == 3 * 32 * 2
    assert sum(layer["sparsity"] for layer in unreached) / len(unreached) == pytest.approx(0.5, abs=0.35)
    apart = load_model(folder, apart=True)[0]
    model = load_checkpoint(tmp_path / "out")
    for layer in unreached[:4]:
        weight = apart.get_parameter(f"{layer['name']}.weight").abs()
        kept = model.get_submodule(layer["name"]).matrix.to_dense() != 0
        weight, kept = (one if group == "row" else one.reshape(1, -1) for one in (weight, kept))
        pruned = round(layer["sparsity"] * weight.shape[1])
        assert not kept.gather(1, weight.argsort(dim=1)[:, :pruned]).any()


def test_experts_of_older_checkpoints_stay_fused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before they could be taken apart, experts were stored as they were."""
    folder = tiny_folder(tmp_path / "m", "mixtral")
    with monkeypatch.context() as patch:
        skeletons = sys.modules["gossamer.models.skeleton"]  # whose function of that name hides it
        patch.setattr(skeletons, "take_apart", lambda model, note: None)
        gs.compress(folder, tmp_path / "old", sparsity=0.5, method="magnitude", **SMALL)
    manifest = json.loads((tmp_path / "old" / "gossamer.json").read_text())
    assert "model.layers.0.mlp.experts.gate_up_proj" in manifest["tensors"]
    model = load_checkpoint(tmp_path / "old")
    assert not any(isinstance(module, Experts) for module in model.modules())
    assert torch.isfinite(logits(model)).all()
    assert size_of(tmp_path / "old").linear_parameters == 3 * (2 * 64 * 64 + 2 * 64 * 32)


def test_sparse_experts_are_tuned(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m", "mixtral")
    gs.compress(folder, tmp_path / "sparse", method="magnitude", pattern="2:4", values="int4", **SMALL)
    gs.finetune(
        tmp_path / "sparse",
        tmp_path / "tuned",
        teacher=folder,
        text=TEXT,
        seqlen=48,
        tokens=2000,
        batch=2,
        micro=2,
    )
    before, after = load_checkpoint(tmp_path / "sparse"), load_checkpoint(tmp_path / "tuned")
    name = "model.layers.1.mlp.experts.0.down_proj"
    old, new = (m.get_submodule(name).matrix.to_dense() for m in (before, after))
    assert not torch.equal(old, new)
    assert not new[old == 0].any()
