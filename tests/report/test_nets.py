"""Claims on small nets: figures are of images that nothing saw, of nets trained, calibrated and tuned on
others."""

from __future__ import annotations

import copy
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

from gossamer.bench.machine import use_threads
from gossamer.claim import Claim, Experiment
from gossamer.cli.app import app
from gossamer.errors import MethodError
from gossamer.report import claimed, nets, reproduce
from gossamer.report.catalogue_page import page
from gossamer.report.texts import label

load_digits = pytest.importorskip("sklearn.datasets", reason="the digits are scikit-learn's").load_digits
SMALL = "digits:small"
ON_NETS = {name: claim for name, claim in claimed().items() if claim.experiment.model in nets.NETS}


def small() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(256, 10),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, size in (("TRAINED", 320), ("CALIBRATED", 64), ("EPOCHS", 6)):
        monkeypatch.setattr(nets, name, size)
    monkeypatch.setitem(nets.NETS, SMALL, nets.Net(small, r"^(0|6)$", "Conv2d"))
    nets.digits.cache_clear()
    nets.trained.cache_clear()
    yield
    nets.digits.cache_clear()
    nets.trained.cache_clear()


def searched(**changes: object) -> Claim:
    experiment = Experiment(
        model=SMALL,
        sparsity=0.8,
        values="float32",
        against=("random", "full", "rounded", "drawn"),
        start="magnitude",
        compressed={"rounded": {"method": "fisher", "values": "int4"}},
        tuning={"epochs": 2},
        tuned={"jackpot": {"method": "jackpot", "others": False}, "full": {}},
        distilled={"drawn": {"pattern": "2:4", "values": "int8", "epochs": 1}},
    )
    return Claim("it is as right", replace(experiment, **changes), "accuracy", "dense", 0.9, "at_least")


def test_figures_are_those_of_plain_torch_on_images_that_nothing_saw(tmp_path: Path) -> None:
    found = reproduce("jackpot", tmp_path, claim=searched())
    assert set(found.figures) == {"jackpot", "random", "full", "rounded", "drawn", "dense"}
    images, labels = nets.digits()
    assert len(images) == 1797
    with torch.inference_mode():
        logits = nets.trained(SMALL, 0)(images[320:]).double()
    dense = found.figures["dense"]
    assert dense["accuracy"] == pytest.approx(float((logits.argmax(1) == labels[320:]).double().mean()))
    assert dense["accuracy"] > 0.5
    assert dense["perplexity"] == pytest.approx(float(cross_entropy(logits, labels[320:]).exp()), rel=1e-6)
    assert dense["kl"] == pytest.approx(0, abs=1e-9)
    assert dense["windows"] == [1477, 1]
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
    experiment = searched().experiment
    names = ("dense", "random", "rounded", "full", "jackpot", "drawn")
    before = {name: nets._made(name, experiment)[0].state_dict() for name in names}
    pixels, labels = load_digits(return_X_y=True)
    pixels[320:], labels[320:] = 999, 3
    monkeypatch.setattr("sklearn.datasets.load_digits", lambda return_X_y: (pixels, labels))
    nets.digits.cache_clear()
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
    asked = replace(
        searched(against=(), compressed={}, distilled={}), metric="kl", than="magnitude", bound="at_most"
    )
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
def test_claims_on_nets_run(name: str, tmp_path: Path) -> None:
    whole = ON_NETS[name]
    tried = whole.experiment
    short = {one: {**settings, "epochs": 2} for one, settings in tried.distilled.items()}
    tuned = {one: {**settings, "epochs": 2} for one, settings in tried.tuned.items()}
    quick = replace(tried, distilled=short, tuned=tuned)
    found = reproduce(name, tmp_path, claim=replace(whole, experiment=quick))
    assert set(found.figures) == {name, *tried.against, "dense"}
    assert len({one["perplexity"] for one in found.figures.values()}) == len(found.figures)
    assert found.figures["dense"]["accuracy"] > 0.12


def test_on_the_command_line_with_accuracies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("gossamer.report.reproduce")
    monkeypatch.setattr(module, "claimed", lambda: {"jackpot": searched()})
    run = CliRunner().invoke(app, ["reproduce", "jackpot", "--work", str(tmp_path / "work")])
    assert run.exit_code == 0, run.output
    found = reproduce("jackpot", tmp_path / "work", claim=searched())
    assert "accuracy" in run.output
    assert f"{found.figures['jackpot']['accuracy']:.2%}" in run.output
    assert "SMOKE" not in run.output


def test_figures_are_of_the_code_the_threads_and_the_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = dict[str, str]()

    def anew(**changes: object) -> set[str]:
        nonlocal last
        experiment, before = searched(**changes).experiment, last
        names = ("jackpot", "full", "random", "drawn", "dense")
        last = {one: label(nets._asked(one, experiment)) for one in names}
        return {name for name in names if last[name] != before.get(name)}

    changed = tmp_path / "changed.py"
    changed.write_text("it does something else")
    everything = anew()
    assert everything == {"jackpot", "full", "random", "drawn", "dense"}
    assert anew() == set()
    for module, of in (
        ("gossamer.tune.ways.jackpot", {"jackpot"}),
        ("gossamer.prune.magnitude", {"jackpot", "full", "drawn"}),
        ("gossamer.recipes.gpusq", {"drawn"}),
        ("gossamer.tune.losses.squarehead", {"drawn"}),
    ):
        monkeypatch.setattr(import_module(module), "__file__", str(changed))
        assert anew() == of, module
    assert anew(values="bfloat16") == {"jackpot", "full", "random"}
    assert anew(pattern="2:4", sparsity=None) == {"jackpot", "full", "random"}
    monkeypatch.setattr(nets, "__file__", str(changed))
    assert anew(pattern="2:4", sparsity=None) == everything
    with use_threads(torch.get_num_threads() + 1):
        assert anew(pattern="2:4", sparsity=None) == everything


def test_the_cached_net_is_never_changed() -> None:
    experiment = searched(start="dense", tuning={"epochs": 1, "values": "int8"}).experiment
    before = copy.deepcopy(nets.trained(SMALL, 0).state_dict())
    for name in ("full", "drawn", "random"):
        nets._made(name, experiment)
    for key, tensor in nets.trained(SMALL, 0).state_dict().items():
        assert torch.equal(tensor, before[key])


def test_what_a_net_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    for changes, said in (
        ({"model": "digits:rnn"}, "no net 'digits:rnn'"),
        ({"length": 64}, "length is asked of language models"),
        ({"gated": {"one": {"method": "teal"}}}, "gated is asked"),
    ):
        with pytest.raises(MethodError, match=said):
            reproduce("jackpot", tmp_path, claim=searched(**changes))
    text = replace(searched(), experiment=Experiment())
    with pytest.raises(MethodError, match="accuracy of wanda is that of a net"):
        reproduce("wanda", tmp_path, claim=text)
    assert not list(tmp_path.iterdir())


def test_without_the_digits_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nets.digits.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MethodError, match="pip install scikit-learn"):
        reproduce("jackpot", tmp_path, claim=searched())
    assert not list(tmp_path.iterdir())
