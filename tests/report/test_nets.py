"""Claims on small nets: figures are of images that nothing saw, of nets trained, calibrated and tuned on
others."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from typer.testing import CliRunner

from gossamer.claim import Claim, Experiment
from gossamer.cli.app import app
from gossamer.errors import MethodError
from gossamer.report import claimed, nets, reproduce
from gossamer.report.catalogue_page import page

pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
SMALL = "digits:small"
ON_NETS = {name: claim for name, claim in claimed().items() if claim.experiment.model in nets.NETS}


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(nets, "EPOCHS", 3)
    monkeypatch.setitem(nets.NETS, SMALL, nets.Net(small, r"^(0|6)$", "Conv2d"))
    nets.trained.cache_clear()
    yield
    nets.trained.cache_clear()


def searched(**changes: object) -> Claim:
    experiment = Experiment(
        model=SMALL,
        sparsity=0.8,
        values="float32",
        against=("random", "full", "rounded"),
        start="magnitude",
        compressed={"rounded": {"method": "obs", "values": "int4"}},
        tuning={"epochs": 2},
        tuned={"jackpot": {"method": "jackpot", "others": False}, "full": {}},
    )
    return Claim("it is as right", replace(experiment, **changes), "accuracy", "dense", 0.9, "at_least")


def test_figures_are_those_of_plain_torch_on_images_that_nothing_saw(tmp_path: Path) -> None:
    found = reproduce("jackpot", tmp_path, claim=searched())
    assert set(found.figures) == {"jackpot", "random", "full", "rounded", "dense"}
    images, labels = nets.digits()
    assert len(images) == 1797
    with torch.inference_mode():
        logits = nets.trained(SMALL, 0)(images[1200:]).double()
    dense = found.figures["dense"]
    assert dense["accuracy"] == pytest.approx(float((logits.argmax(1) == labels[1200:]).double().mean()))
    assert dense["accuracy"] > 0.5
    assert dense["perplexity"] == pytest.approx(float(cross_entropy(logits, labels[1200:]).exp()), rel=1e-6)
    assert dense["kl"] == pytest.approx(0, abs=1e-9)
    assert dense["windows"] == [597, 1]
    assert min(one["kl"] for name, one in found.figures.items() if name != "dense") > 1e-6
    assert found.ratio == pytest.approx(found.figures["jackpot"]["accuracy"] / dense["accuracy"])
    assert found.interval is not None
    assert found.interval[0] <= found.ratio <= found.interval[1]
    assert found.holds == (found.ratio >= 0.9)
    assert json.dumps(found.to_dict())
    assert "right" not in found.to_dict()["figures"]["jackpot"]
    assert f"accuracy {found.figures['jackpot']['accuracy']:.4g}" in page({"jackpot": found.to_dict()})


def test_nothing_learns_from_the_images_that_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, names = searched().experiment, ("dense", "random", "rounded", "full", "jackpot")
    before = {name: nets._made(name, experiment)[0].state_dict() for name in names}
    images, labels = (one.clone() for one in nets.digits())
    images[1200:], labels[1200:] = torch.randn(597, 1, 8, 8), 3
    monkeypatch.setattr(nets, "digits", lambda: (images, labels))
    nets.trained.cache_clear()
    for name in names:
        for key, tensor in nets._made(name, experiment)[0].state_dict().items():
            assert torch.equal(tensor, before[name][key]), (name, key)


def test_contenders_are_what_they_are_called() -> None:
    experiment = searched().experiment
    start, masks = nets._made("magnitude", experiment)
    weight = start[3].weight.flatten(1)
    assert [*masks] == ["3"]
    assert int(masks["3"].sum()) == weight.numel() - int(0.8 * weight.numel() + 0.5)
    assert torch.equal(weight != 0, masks["3"])
    dense = nets.trained(SMALL, 0)
    tuned, _ = nets._made("full", experiment)
    assert not (tuned[3].weight.flatten(1) != 0)[~masks["3"]].any()
    assert not torch.equal(tuned[3].weight, start[3].weight)
    moved, _ = nets._made("jackpot", experiment)
    kept = moved[3].weight != 0
    assert int(kept.sum()) == int(masks["3"].sum())
    assert torch.equal(moved[3].weight[kept], dense[3].weight[kept])  # no weight is tuned
    assert torch.equal(moved[6].weight, dense[6].weight)
    assert not moved.training


def test_seeds_train_nets_of_their_own(tmp_path: Path) -> None:
    asked = replace(searched(against=(), compressed={}), metric="kl", than="magnitude", bound="at_most")
    asked = replace(asked, experiment=replace(asked.experiment, tuned={"jackpot": {"method": "jackpot"}}))
    found = reproduce("jackpot", tmp_path, claim=asked, seeds=2)
    nets.trained.cache_clear()
    each = [
        reproduce("jackpot", tmp_path / "again", claim=replace(
            asked, experiment=replace(asked.experiment, seed=seed))) for seed in range(2)
    ]  # fmt: skip
    assert found.ratios == pytest.approx([one.ratio for one in each])
    assert found.ratios[0] != found.ratios[1]
    for metric in ("accuracy", "kl"):
        figures = [one.figures["jackpot"][metric] for one in each]
        assert found.figures["jackpot"][metric] == pytest.approx(sum(figures) / 2)


def test_figures_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reproduce("jackpot", tmp_path, claim=searched())

    def never(*args: object, **options: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(nets, "_made", never)
    assert reproduce("jackpot", tmp_path, claim=searched()).figures == first.figures
    with pytest.raises(AssertionError, match="made again"):
        reproduce("jackpot", tmp_path, claim=searched(seed=1))
    with pytest.raises(AssertionError, match="made again"):
        reproduce("jackpot", tmp_path, claim=searched(sparsity=0.7))


@pytest.mark.parametrize("name", ON_NETS)
def test_claims_on_nets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nets, "TRAINED", 256)
    whole = ON_NETS[name]
    tried = whole.experiment
    short = {one: {**settings, "epochs": 2} for one, settings in tried.distilled.items()}
    tuned = {one: {**settings, "epochs": 2} for one, settings in tried.tuned.items()}
    quick = replace(tried, distilled=short, tuned=tuned)
    found = reproduce(name, tmp_path, claim=replace(whole, experiment=quick))
    assert set(found.figures) == {name, *tried.against, "dense"}
    assert len({one["perplexity"] for one in found.figures.values()}) == len(found.figures)
    assert found.figures["dense"]["accuracy"] > 0.15


def test_on_the_command_line_with_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("gossamer.report.reproduce")
    monkeypatch.setattr(module, "claimed", lambda: {"jackpot": searched()})
    run = CliRunner().invoke(app, ["reproduce", "jackpot", "--work", str(tmp_path / "work")])
    assert run.exit_code == 0, run.output
    found = reproduce("jackpot", tmp_path / "work", claim=searched())
    assert "accuracy" in run.output
    assert f"{found.figures['jackpot']['accuracy']:.2%}" in run.output
    assert "SMOKE" not in run.output


def test_without_the_digits_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets.digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MethodError, match="pip install scikit-learn"):
        reproduce("jackpot", tmp_path, claim=searched())
    assert not list(tmp_path.iterdir())
