"""Claims run in miniature: verdicts follow the figures, figures are kept, bad input is refused."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from typer.testing import CliRunner

from gossamer.cli.app import app
from gossamer.cli.reproduce import seconds_of
from gossamer.dynamic.activations import method as gating
from gossamer.dynamic.attention import POLICIES
from gossamer.dynamic.cache import CACHES
from gossamer.errors import CheckpointError, MethodError, ModelError
from gossamer.evaluate import paired_ratio
from gossamer.evaluate.size import size_of_folder
from gossamer.matrices import Packed, Sum
from gossamer.models import load_checkpoint
from gossamer.prune import METHODS, Claim, Experiment
from gossamer.recipes.catalogue import FAMILIES, WITHOUT_CLAIM, without_claim
from gossamer.recipes.compress_settings import CompressSettings
from gossamer.recipes.finetune_settings import FinetuneSettings
from gossamer.recipes.measure import quality
from gossamer.recipes.shrink import ShrinkSettings
from gossamer.report import Texts, claimed, one_shot, reproduce, texts, verdicts_in
from gossamer.report.baselines import equal_bytes
from gossamer.report.catalogue_page import page
from gossamer.report.nets import NETS
from gossamer.report.reproduce import PARTS, run_all
from gossamer.sparse.allocate import ALLOCATIONS
from tiny import tiny_folder

ROOT = Path(__file__).parents[2]
PROSE = "".join(topics.values())
TEXTS = Texts([PROSE[:20_000]], [PROSE[20_000:60_000]], windows=4, seqlen=64)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("models") / "tiny"))


def claim(model: str, **changes: Any) -> Claim:
    experiment = Experiment(
        model=model, sparsity=0.5, values="float32", windows=2, seqlen=64, against=("random",)
    )
    return Claim("it is no worse", experiment, "perplexity", "random", **changes)


def test_a_verdict_is_its_figures(model: str, tmp_path: Path) -> None:
    found = reproduce("magnitude", tmp_path / "work", claim=claim(model, factor=1.0), texts=TEXTS)
    assert set(found.figures) == {"magnitude", "random", "dense_bfloat16", "dense"}
    ours, theirs = (found.figures[name]["perplexity"] for name in ("magnitude", "random"))
    assert found.ratio == pytest.approx(ours / theirs)
    assert found.holds == (ours <= theirs)
    assert found.interval is not None
    assert found.interval[0] <= found.ratio <= found.interval[1]
    checkpoint = next(path for path in (tmp_path / "work").glob("magnitude-*") if path.is_dir())
    again = quality(checkpoint, text=TEXTS.measured, windows=4, seqlen=64)
    assert ours == pytest.approx(again.quality.perplexity, rel=1e-4)
    assert json.dumps(found.to_dict())


def test_formats_are_contenders(model: str, tmp_path: Path) -> None:
    whole = claimed()["llm_int8"]
    made_of = {**whole.experiment.compressed, "llm_int8": {"method": "magnitude", "outliers": 2.0}}
    tiny = replace(whole.experiment, model=model, windows=2, seqlen=64, compressed=made_of)
    found = reproduce("llm_int8", tmp_path, claim=replace(whole, experiment=tiny), texts=TEXTS)
    assert set(found.figures) == {"llm_int8", "int8", "dense"}
    made = {path.name.partition("-")[0]: path for path in tmp_path.iterdir() if path.is_dir()}
    layers = {name: load_checkpoint(path).model.layers for name, path in made.items()}
    assert isinstance(layers["llm_int8"][0].self_attn.q_proj.matrix, Sum)
    assert isinstance(layers["int8"][0].self_attn.q_proj.matrix, Packed)


def test_pruning_has_its_baselines_whatever_the_claim_names(model: str, tmp_path: Path) -> None:
    asked = claim(model)
    asked = replace(asked, experiment=replace(asked.experiment, against=(), values="bfloat16"), than="dense")
    found = reproduce("wanda", tmp_path, claim=asked, texts=TEXTS)
    assert set(found.figures) == {"wanda", "random", "magnitude", "dense_int8", "dense"}
    assert found.claim == asked
    folders = (next(path for path in tmp_path.glob(f"{one}-*") if path.is_dir())
               for one in ("wanda", "dense_int8"))  # fmt: skip
    pruned, dense = (size_of_folder(path) for path in folders)
    assert dense.sparsity == 0
    assert 8 < dense.linear_bits <= pruned.linear_bits
    told, figure = page({"wanda": found.to_dict()}), found.figures["dense_int8"]["perplexity"]
    assert f", dense int8 {figure:.4g}: ratio" in told
    before = found.to_dict()
    del before["figures"]["dense_int8"]
    assert f"{found.ratio:.3g}" in page({"wanda": before})
    assert "dense int8" not in page({"wanda": before})


@pytest.mark.parametrize(("pattern", "sparsity", "values", "dense"), [
    ("unstructured", 0.5, "float32", "bfloat16"), ("unstructured", 0.5, "bfloat16", "int8"),
    ("2:4", None, "bfloat16", "int8"), ("unstructured", 0.6, "bfloat16", "nl4"),
    ("unstructured", 0.7, "bfloat16", "nl4"), ("32:64", None, "int4", "nl3"),
    ("16x4", 0.3, "int4", None), ("16x4", 0.2, "int4", "nl3"), ("unstructured", 0.0, "bfloat16", None),
])  # fmt: skip
def test_the_dense_model_of_equal_bytes(
    pattern: str, sparsity: float | None, values: str, dense: str | None
) -> None:
    assert equal_bytes(Experiment(pattern=pattern, sparsity=sparsity, values=values)) == dense


@pytest.mark.parametrize("name", [name for name in ALLOCATIONS if name != "uniform"])
def test_claims_of_allocations_run(name: str, model: str, tmp_path: Path) -> None:
    whole = claimed()[name]
    settings = whole.experiment.compressed[name]
    tiny = replace(whole.experiment, model=model, windows=2, seqlen=64)
    found = reproduce(name, tmp_path, claim=replace(whole, experiment=tiny), texts=TEXTS)
    assert found.ratio != 1
    made, theirs = (next(path for path in tmp_path.glob(f"{one}-*") if path.is_dir())
                    for one in (name, whole.than))  # fmt: skip
    ours, uniform = (size_of_folder(path) for path in (made, theirs))
    assert ours.linear_bits <= 1.02 * uniform.linear_bits
    asked = json.loads((made / "gossamer.json").read_text())["made"]["settings"]
    assert (asked["method"], asked["allocation"]) == (settings["method"], name)


def test_figures_of_an_allocation_are_of_the_code_that_splits(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = claimed()["sensitivity"].experiment

    def asked() -> list[str]:
        return [texts.label(one_shot._asked(name, experiment, TEXTS)) for name in ("sensitivity", "obs")]

    before = asked()
    home = sys.modules[ALLOCATIONS["sensitivity"].__module__]
    copied = shutil.copytree(Path(str(home.__file__)).parent, tmp_path / "allocate")
    monkeypatch.setattr(home, "__file__", str(copied / "sensitivity.py"))
    assert asked() == before
    with (copied / "knapsack.py").open("a") as code:
        code.write("# it splits otherwise")
    assert [old == new for old, new in zip(before, asked(), strict=True)] == [False, True]


def test_seeds_are_runs_of_their_own_and_figures_their_means(model: str, tmp_path: Path) -> None:
    asked = Claim("it is no worse", claim(model).experiment, "perplexity", "magnitude")
    found = reproduce("wanda", tmp_path, claim=asked, texts=TEXTS, seeds=3)
    each = [
        reproduce("wanda", tmp_path, texts=TEXTS, claim=replace(
            asked, experiment=replace(asked.experiment, seed=seed))).figures
        for seed in range(3)
    ]  # fmt: skip
    ours = [one["wanda"]["perplexity"] for one in each]
    assert len(set(ours)) == 3
    assert len({one["magnitude"]["perplexity"] for one in each}) == 1  # it reads no text
    mean = math.exp(sum(map(math.log, ours)) / 3)
    assert found.figures["wanda"]["perplexity"] == pytest.approx(mean)
    assert found.ratios == pytest.approx([one / each[0]["magnitude"]["perplexity"] for one in ours])
    assert found.ratio == pytest.approx(mean / each[0]["magnitude"]["perplexity"])
    ends = found.interval or ()
    assert found.clear == (len({one <= 1 for one in (*found.ratios, *ends)}) == 1)
    made = [json.loads((path / "gossamer.json").read_text())["made"]["settings"]["seed"]
            for path in tmp_path.glob("wanda-*") if path.is_dir()]  # fmt: skip
    assert sorted(made) == [0, 1, 2]
    assert len({one["random"]["perplexity"] for one in each}) == 3
    assert "3 seeds" in page({"wanda": found.to_dict()})


@pytest.mark.parametrize(("factor", "bound", "holds"), [
    (1e-3, "at_most", False), (1e3, "at_most", True), (1e-3, "at_least", True), (1e3, "at_least", False),
])  # fmt: skip
def test_bounds(
    model: str, tmp_path_factory: pytest.TempPathFactory, factor: float, bound: str, holds: bool
) -> None:
    work = tmp_path_factory.getbasetemp() / "shared-work"
    found = reproduce("magnitude", work, claim=claim(model, factor=factor, bound=bound), texts=TEXTS)
    assert (found.holds, found.clear) == (holds, True)


def test_figures_are_kept_and_shared(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = reproduce("magnitude", tmp_path, claim=claim(model), texts=TEXTS)

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("compressed again")

    monkeypatch.setattr("gossamer.report.one_shot.compress", never)
    told = []
    second = reproduce(
        "magnitude", tmp_path, claim=claim(model), texts=TEXTS, progress=lambda stage, *_: told.append(stage)
    )
    assert second.figures == first.figures
    assert told == [f"{name}: figures as kept in {tmp_path.name}" for name in first.figures]
    turned = Claim("the other way", claim(model).experiment, "perplexity", "magnitude")
    assert reproduce("random", tmp_path, claim=turned, texts=TEXTS).ratio == pytest.approx(1 / first.ratio)
    with pytest.raises(AssertionError, match="compressed again"):
        reproduce("magnitude", tmp_path, claim=claim(model), texts=Texts([PROSE[:9_000]], [PROSE], 4, 64))
    (tmp_path / "notes-of-mine.txt").write_text("kept")
    texts.forget(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes-of-mine.txt"]
    with pytest.raises(AssertionError, match="compressed again"):
        reproduce("magnitude", tmp_path, claim=claim(model), texts=TEXTS)


def test_figures_are_of_the_code_of_their_methods(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, last = tuned_claim(model).experiment, dict[str, str]()

    def anew() -> set[str]:
        """Contenders whose figures are no longer those that were asked for last."""
        nonlocal last
        names = ("ast", "full", "magnitude", "random", "dense")
        before, last = last, {one: texts.label(one_shot._asked(one, experiment, TEXTS)) for one in names}
        return {name for name in names if last[name] != before.get(name)}

    assert anew() == {"ast", "full", "magnitude", "random", "dense"}
    assert anew() == set()
    changed = tmp_path / "changed.py"
    changed.write_text("it does something else")
    monkeypatch.setattr(import_module("gossamer.tune.ways.ast"), "__file__", str(changed))
    assert anew() == {"ast"}
    monkeypatch.setattr(import_module("gossamer.prune.magnitude"), "__file__", str(changed))
    assert anew() == {"ast", "full", "magnitude"}  # the first two begin with the third
    monkeypatch.setattr(METHODS["random"].__init__, "__defaults__", (7,))
    assert anew() == {"random"}


def test_seconds_are_those_of_a_contender_that_was_made_in_one_go(model: str, tmp_path: Path) -> None:
    first = reproduce("magnitude", tmp_path, claim=claim(model), texts=TEXTS)
    assert first.figures["magnitude"]["seconds"] > 0
    for file in tmp_path.glob("*.json"):  # as if measuring had been interrupted
        file.unlink()
    again = reproduce("magnitude", tmp_path, claim=claim(model), texts=TEXTS, seeds=2)
    assert again.figures["magnitude"]["seconds"] is None
    assert again.ratios[0] == pytest.approx(first.ratio)


def test_contenders_of_every_kind_are_made_once(model: str, tmp_path: Path) -> None:
    experiment = Experiment(
        model=model,
        sparsity=0.0,
        values="bfloat16",
        windows=2,
        seqlen=64,
        start="plain",
        compressed={"plain": {"method": "magnitude"}, "half": {"method": "random", "sparsity": 0.5}},
        shrunk={"shorter": {"method": "influence", "blocks": 1, "seqlen": 64, "windows": 1}},
        gated={"gated": {"method": "teal", "sparsity": 0.9, "windows": 2, "seqlen": 64}},
        against=("half", "shorter", "plain"),
    )
    asked = Claim("it drops nothing that matters", experiment, "perplexity", "dense")
    found = reproduce("gated", tmp_path, claim=asked, texts=TEXTS)
    kl = {name: one["kl"] for name, one in found.figures.items()}
    assert kl["dense"] == 0 <= kl["plain"] < 1e-3 < min(kl["half"], kl["shorter"], kl["gated"])
    assert len({one["perplexity"] for one in found.figures.values()}) == 5
    again = reproduce("gated", tmp_path, claim=asked, texts=TEXTS)
    assert again.figures == found.figures
    assert sorted(path.name.rpartition("-")[0] for path in tmp_path.iterdir() if path.is_dir()) == [
        "gated", "half", "plain", "shorter"
    ]  # fmt: skip


def test_no_claim_is_begun_past_the_budget(tmp_path: Path) -> None:
    assert list(run_all(["magnitude", "wanda"], tmp_path, budget=-1.0)) == []


def test_every_claim_names_contenders_that_exist() -> None:
    for name, one in claimed().items():
        tried = one.experiment
        others = {*tried.tuned, *tried.compressed, *tried.shrunk, *tried.gated}
        others |= {*tried.attending, *tried.caching, *tried.distilled}
        assert {name, one.than, tried.start, *tried.against} <= {"dense", *METHODS, *others}, name
        assert not others & {"dense", *METHODS}, name
        assert one.metric in (PARTS if tried.model in NETS else ("perplexity", "kl")), name
        assert {*tried.sampled, *tried.rewritten} <= tried.tuned.keys()
        if tried.model in NETS:
            continue  # what it names is run by test_nets
        for contender in tried.tuned:
            FinetuneSettings(**(tried.tuning_of(contender) or {})).check()
        for contender in tried.compressed:
            CompressSettings(**tried.settings(contender)).combination()
        for settings in tried.shrunk.values():
            ShrinkSettings(**settings).chosen()
        for settings in tried.gated.values():
            gating(settings["method"])
        for contender, settings in tried.attending.items():
            assert settings.get("method", contender) in POLICIES
        for contender, settings in tried.caching.items():
            assert settings.get("method", contender) in CACHES
        assert tried.length is None or tried.first < tried.length - 1


RUN_TIME = {
    "attending": {
        "everything": {"method": "block_topk", "count": 99},
        "sink_window": {"sink": 0, "window": 64},
        "minference": {"budget": 4},
    },
    "caching": {
        "everything": {"method": "low_rank_keys", "rank": 32, "tokens": 999, "value_bits": 16, "outliers": 0},
        "gear": {"bits": 2, "recent": 0},
        "double_sparsity": {"labels": 2, "tokens": 64},
    },
}


@pytest.mark.parametrize("kind", RUN_TIME)
def test_contenders_may_look_or_keep_less_at_run_time(kind: str, tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "tiny", initializer_range=0.4)
    made: dict[str, Any] = {kind: RUN_TIME[kind]}
    names = list(RUN_TIME[kind])
    experiment = Experiment(
        model=str(folder), windows=1, seqlen=448, length=448, first=192, against=tuple(names), **made
    )
    asked = Claim("it reads less", experiment, "kl", names[2], factor=1.0, bound="at_least")
    texts = replace(TEXTS, windows=14)  # of 64: two windows of 448
    found = reproduce(names[1], tmp_path / "work", claim=asked, texts=texts)
    assert {len(one["nll"]) for one in found.figures.values()} == {2}
    kl = {name: one["kl"] for name, one in found.figures.items()}
    assert kl["dense"] == 0
    assert 10 * kl["everything"] < min(kl[name] for name in names[1:]), kl
    assert found.ratio == pytest.approx(kl[names[1]] / kl[names[2]])
    assert found.holds == (found.ratio >= 1)
    assert not [path for path in (tmp_path / "work").iterdir() if path.is_dir()]
    assert reproduce(names[1], tmp_path / "work", claim=asked, texts=texts).figures == found.figures


def tuned_claim(model: str) -> Claim:
    experiment = Experiment(
        model=model,
        pattern="2:4",
        sparsity=None,
        values="float32",
        windows=2,
        seqlen=64,
        against=("random",),
        start="magnitude",
        tuning={"tokens": 256, "seqlen": 32, "batch": 2, "held_out": 2, "rate": 1e-3, "patience": 99},
        tuned={"ast": {"method": "ast", "options": {"every": 1}}, "full": {}},
    )
    return Claim("masks that move end below", experiment, "perplexity", "full")


def test_contenders_may_be_tuned_from_one_start(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = reproduce("ast", tmp_path, claim=tuned_claim(model), texts=TEXTS)
    assert set(found.figures) == {"ast", "full", "random", "dense"}
    assert found.ratio == pytest.approx(
        found.figures["ast"]["perplexity"] / found.figures["full"]["perplexity"]
    )
    assert found.figures["ast"]["perplexity"] != found.figures["full"]["perplexity"]
    for name in ("ast", "full"):
        folder = next(path for path in tmp_path.glob(f"{name}-*") if path.is_dir())
        made = json.loads((folder / "gossamer.json").read_text())["made"]
        assert (made["method"], made["tuned"][0]["tokens"]) == ("magnitude", 256)
    assert len(list(tmp_path.glob("magnitude-*.json"))) == 1

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("tuned again")

    monkeypatch.setattr("gossamer.report.one_shot.finetune", never)
    assert reproduce("ast", tmp_path, claim=tuned_claim(model), texts=TEXTS).figures == found.figures
    row = next(line for line in page({"ast": found.to_dict()}).splitlines() if line.startswith("| `ast` |"))
    assert f"{found.ratio:.3g}" in row


def tuned_by_the_task(model: str, **changes: Any) -> Experiment:
    tuning = {"tokens": 256, "seqlen": 32, "batch": 2, "held_out": 2, "rate": 1e-3, "losses": {"task": 1}}
    experiment = Experiment(
        model=model,
        values="float32",
        windows=2,
        seqlen=64,
        against=("magnitude",),
        start="magnitude",
        tuning=tuning,
    )
    return replace(experiment, **changes)


def test_contenders_may_lose_blocks_and_be_tuned_on_what_the_dense_model_writes(
    model: str, tmp_path: Path
) -> None:
    experiment = tuned_by_the_task(
        model,
        sparsity=0.0,
        blocks=1,
        tuned={"continuations": {}, "ordinary": {}},
        sampled={"continuations": 600},
    )
    claim = Claim("its own text keeps it nearer", experiment, "kl", "ordinary")
    found = reproduce("continuations", tmp_path, claim=claim, texts=TEXTS)
    assert set(found.figures) == {"continuations", "ordinary", "magnitude", "dense"}
    assert found.figures["dense"]["kl"] == pytest.approx(0, abs=1e-6)
    assert found.figures["magnitude"]["kl"] > 0.001  # a block is gone, though no weight is pruned
    folders = {
        name: next(path for path in tmp_path.glob(f"{name}-*") if path.is_dir())
        for name in ("continuations", "ordinary", "shrunk")
    }
    assert json.loads((folders["shrunk"] / "config.json").read_text())["num_hidden_layers"] == 2
    texts = {name: _tuned_on(folders[name]) for name in ("continuations", "ordinary")}
    assert texts["continuations"].endswith(".jsonl")
    assert not texts["ordinary"].endswith(".jsonl")
    assert found.ratio == pytest.approx(
        found.figures["continuations"]["kl"] / found.figures["ordinary"]["kl"]
    )
    assert found.interval is not None


def test_contenders_may_be_tuned_on_answers_in_the_dense_models_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a model of which answers end before they are cut off
    ends = list(range(20, 384, 48))
    model = str(tiny_folder(tmp_path / "brief", eos_token_id=ends, max_position_embeddings=2048))
    for name, value in (("ASKED", 6), ("ANSWERED", 10), ("ANSWER_TOKENS", 300)):
        monkeypatch.setattr(f"gossamer.report.texts.{name}", value)
    experiment = tuned_by_the_task(
        model,
        sparsity=0.5,
        tuned={"rewrites": {}, "given": {}},
        rewritten={"rewrites": True, "given": False},
        answers=4,
    )
    claim = Claim("its own words keep it nearer", experiment, "kl", "given")
    found = reproduce("rewrites", tmp_path, claim=claim, texts=TEXTS)
    assert found.ratio == pytest.approx(found.figures["rewrites"]["kl"] / found.figures["given"]["kl"])
    texts = {}
    for name in ("rewrites", "given"):
        folder = next(path for path in tmp_path.glob(f"{name}-*") if path.is_dir())
        lines = (tmp_path / _tuned_on(folder)).read_text().splitlines()
        texts[name] = [json.loads(line) for line in lines]
    assert len(texts["given"]) == 4 <= len(texts["rewrites"])
    words = " ".join(PROSE[:20_000].split())
    pairs = [json.loads(line) for line in next(tmp_path.glob("*.pairs")).read_text().splitlines()]
    assert len(pairs) == 4
    for pair, own, given in zip(pairs, texts["rewrites"], texts["given"], strict=False):
        assert pair["prompt"] == own["prompt"] == given["prompt"]
        assert f"{pair['prompt'].partition(':')[2].strip()} {pair['response']}" in words
        assert pair["response"] == given["response"] != own["response"]


def test_responses_of_instructions_hold_no_digits_where_they_can() -> None:
    words = [*map(str, range(100)), *("a", "few", "words") * 40, *map(str, range(100))]
    pairs = texts.instructions([" ".join(words)], 8, seed=0)
    assert len({pair["prompt"] for pair in pairs}) > 1
    assert not any(map(str.isdigit, "".join(pair["response"] for pair in pairs)))
    assert pairs == texts.instructions([" ".join(words)], 8, seed=0)
    (numbers,) = texts.instructions([" ".join(words[:100])], 1, seed=0)
    assert len(numbers["response"].split()) == 60


def _tuned_on(folder: Path) -> str:
    return str(json.loads((folder / "gossamer.json").read_text())["made"]["tuned"][0]["text"]["text"])


def test_a_method_without_a_claim_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MethodError, match="has no claim to run"):
        reproduce("nothing", tmp_path)


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("60m", 3600), ("1.5h", 5400)])
def test_budgets(text: str, seconds: float) -> None:
    assert seconds_of(text) == seconds


def test_a_budget_in_no_unit_is_refused() -> None:
    with pytest.raises(MethodError, match="90s, 60m or 2h"):
        seconds_of("60")


def test_the_page_says_what_does_not_hold(model: str, tmp_path: Path) -> None:
    found = reproduce("magnitude", tmp_path, claim=claim(model, factor=1e-3), texts=TEXTS)
    text = page({"magnitude": found.to_dict()})
    row = next(line for line in text.splitlines() if line.startswith("| `magnitude` |"))
    assert "**does not hold**" in row
    assert f"{found.ratio:.3g}" in row
    assert "| `wanda` |" in text


def test_the_page_says_which_verdicts_are_of_an_earlier_claim(model: str, tmp_path: Path) -> None:
    name = "magnitude"
    found = reproduce(name, tmp_path, claim=claim(model, factor=1e-3), texts=TEXTS).to_dict()
    today = claimed()[name].to_dict()
    assert "an earlier form of the claim" in page({name: found})
    keys = ("metric", "than", "factor", "bound")
    found["claim"] |= {key: today[key] for key in keys}
    found["figures"].setdefault(today["than"], found["figures"]["random"])
    found["claim"]["experiment"] = json.loads(json.dumps(today["experiment"]))
    assert "an earlier form" not in page({name: found})
    experiment = found["claim"]["experiment"]
    experiment["tuned"] = {"one that it does not run": {}}
    del experiment["first"]  # a setting that came later
    assert "an earlier form" not in page({name: found})
    experiment["sparsity"] = 0.75
    assert "an earlier form" in page({name: found})


def test_a_verdict_just_run_is_of_todays_claim(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METHODS["magnitude"], "claim", claim(model))
    found = reproduce("magnitude", tmp_path, texts=TEXTS)
    row = next(
        line for line in page({"magnitude": found.to_dict()}).splitlines() if "| `magnitude` |" in line
    )
    assert f"{found.ratio:.3g}" in row
    assert "an earlier form" not in row


def test_the_page_in_the_docs_is_that_of_the_verdicts_beside_it() -> None:
    verdicts = verdicts_in(ROOT / "benchmarks" / "results" / "claims.json")
    told = (ROOT / "docs" / "catalogue.md").read_text(encoding="utf-8")
    assert told == page(verdicts), (
        "gossamer reproduce --out benchmarks/results/claims.json --page docs/catalogue.md"
    )


CITED = re.compile(r"([A-Z][\w-]+)(?: et al\.| (?:&|and) [A-Z][\w-]+)?,? \(?(19\d\d|20[0-3]\d)\b")


def cited(text: str) -> set[tuple[str, str]]:
    """Last names and years of papers."""
    return set(CITED.findall(re.sub(r'\s*"?\s*\n\s*"?', " ", text)))


def test_papers_are_found_where_lines_break() -> None:
    text = '(Wilson 1927) of windows of 2048;\n"Boyd et al. "\n    "2011, a book; Martens &\n Grosse 2015"'
    assert cited(text) == {("Wilson", "1927"), ("Boyd", "2011"), ("Martens", "2015")}


def test_every_paper_is_on_the_page() -> None:
    """Of a module that registers a method, or says why no claim runs, that is so; others name none that is
    not there."""
    told, package = page({}), ROOT / "src" / "gossamer"
    made = [family[name] for family in FAMILIES.values() for name in family]
    homes = {one.__module__ for one in made} | set(WITHOUT_CLAIM)
    lost, unlisted = {}, []
    for path in sorted(package.rglob("*.py")):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        text = path.read_text(encoding="utf-8")
        if "UNCLAIMED = " in text and module not in WITHOUT_CLAIM:
            unlisted.append(module)
        if module not in homes and (missing := cited(text) - cited(told)):
            lost[module] = missing
    assert (lost, unlisted) == ({}, [])


def test_what_has_no_claim_says_where_its_figures_stand() -> None:
    told = page({}).partition("## Without a claim that runs")[2]
    figures = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")
    titles = set(re.findall("^#+ (.*)$", figures, re.MULTILINE))
    for one in without_claim():
        assert one.figures in {"", *titles}
        assert f"| {one.name} | {one.cite} | " in told
        assert one.why.endswith(".")
    assert "| [Sparse attention on a long prompt](figures.md#sparse-attention-on-a-long-prompt) |" in told


def test_the_page_says_what_is_searched_for_beforehand() -> None:
    rows = {line.split("|")[1].strip(" `"): line for line in page({}).splitlines() if line.startswith("| `")}
    assert "| a window of text |" in rows["minference"]
    assert "| no data |" in rows["sink_window"]


def test_damaged_verdicts_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "claims.json"
    assert verdicts_in(file) == {}
    file.write_text('{"claims": ')
    with pytest.raises(CheckpointError, match="holds no verdicts"):
        verdicts_in(file)


def test_no_interval_is_no_clear_verdict(model: str, tmp_path: Path) -> None:
    asked = claim(model, factor=1e3)
    one = reproduce("magnitude", tmp_path, claim=asked, texts=Texts([PROSE], [PROSE[5000:]], 1, 64))
    assert (one.interval, one.holds, one.clear) == (None, True, False)
    assert "holds (one run, no interval)" in page({"magnitude": one.to_dict()})
    two = reproduce("magnitude", tmp_path, claim=asked, texts=Texts([PROSE], [PROSE[5000:]], 2, 64))
    assert two.interval is not None
    assert two.clear
    assert "on 2 windows of 64" in page({"magnitude": two.to_dict()})


def test_distances_have_an_interval_too(model: str, tmp_path: Path) -> None:
    asked = replace(claim(model, factor=1.0), metric="kl")
    found = reproduce("magnitude", tmp_path, claim=asked, texts=TEXTS)
    ours, theirs = (found.figures[name]["window_kl"] for name in ("magnitude", "random"))
    want = paired_ratio(ours, theirs)
    assert found.ratio == pytest.approx(want.estimate)
    assert found.interval == (want.low, want.high)
    assert "window_kl" not in found.to_dict()["figures"]["magnitude"]
    nothing = replace(asked, than="dense")
    assert reproduce("magnitude", tmp_path, claim=nothing, texts=TEXTS).ratio == math.inf


def test_figures_are_of_the_text_and_the_model_not_of_their_names(tmp_path: Path) -> None:
    folder, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_folder(folder)
    text.write_text(PROSE[:8000])

    def perplexity() -> float:
        given = Texts([PROSE], str(text), 4, 64)
        found = reproduce("magnitude", tmp_path / "work", claim=claim(str(folder)), texts=given)
        value: float = found.figures["dense"]["perplexity"]
        return value

    first = perplexity()
    text.write_text(PROSE[8000:16000])
    second = perplexity()
    assert first != second
    tiny_folder(folder, seed=1)
    for kept in (texts._weights, one_shot._dense):  # of a process
        kept.cache_clear()
    assert perplexity() != second


def test_a_smoke_test_is_told_on_the_page(model: str, tmp_path: Path) -> None:
    """Also where the prose inside Python calibrated only."""
    for given in (Texts(None, [PROSE], 2, 64), Texts([PROSE], None, 2, 64), TEXTS):
        found = reproduce("magnitude", tmp_path, claim=claim(model), texts=given)
        assert ("SMOKE TEST" in page({"magnitude": found.to_dict()})) == (given is not TEXTS)


def test_the_command_lists_refuses_and_writes_the_page(tmp_path: Path) -> None:
    run = CliRunner().invoke
    listed = run(app, ["reproduce", "--list", "--json"])
    assert set(json.loads(listed.stdout)) == set(claimed())
    assert run(app, ["reproduce"]).exit_code == 2
    assert run(app, ["reproduce", "nothing"]).exit_code == 2
    assert run(app, ["reproduce", "nothing", "--list"]).exit_code == 2
    assert set(json.loads(run(app, ["reproduce", "obs", "obs", "--list", "--json"]).stdout)) == {"obs"}
    both = run(app, ["reproduce", "wanda", "--all"])
    assert both.exit_code == 2
    assert "leave wanda out" in both.stderr
    text = tmp_path / "same.txt"
    text.write_text(PROSE)
    same = run(app, ["reproduce", "wanda", "--calibration", str(text), "--text", str(text)])
    assert same.exit_code == 2
    assert "cannot both calibrate and measure" in same.stderr
    assert set(json.loads(run(app, ["reproduce", "gptq", "--list", "--json"]).stdout)) == {"obs"}
    for option in ("--out", "--page"):
        nowhere = run(app, ["reproduce", "wanda", option, str(tmp_path / "no" / "file")])
        assert nowhere.exit_code == 2
        assert "cannot write" in nowhere.stderr
    assert run(app, ["reproduce", "--page", str(tmp_path / "catalogue.md")]).exit_code == 0
    assert "| `obs` |" in (tmp_path / "catalogue.md").read_text()


def test_the_page_of_a_run_has_its_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words, file = of_a_run(tmp_path, monkeypatch, "magnitude")
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    row = next(line for line in file.read_text().splitlines() if line.startswith("| `magnitude` |"))
    assert "ratio" in row


def test_a_claim_that_cannot_run_does_not_stop_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, file = of_a_run(tmp_path, monkeypatch, "wanda", "magnitude")
    out = tmp_path / "claims.json"
    done = CliRunner().invoke(app, [*words, "--out", str(out), "--json"])
    assert done.exit_code == 2, done.output
    first, *_, last = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert first == "error: wanda: this model's folder is gone"
    assert last == "error: no verdict on wanda, as said above"
    assert "the budget is used up" not in done.stderr
    assert [one["name"] for one in json.loads(done.stdout)] == ["magnitude"] == list(verdicts_in(out))
    row = next(line for line in file.read_text().splitlines() if line.startswith("| `magnitude` |"))
    assert "ratio" in row


def of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[list[str], Path]:
    """The words of a command that runs small claims of ``names``, of which that of wanda fails, and the page
    that it writes."""
    long = tiny_folder(tmp_path / "model", max_position_embeddings=2048)
    module, file = import_module("gossamer.report.reproduce"), tmp_path / "catalogue.md"
    figures = one_shot.figures
    monkeypatch.setattr(module, "claimed", lambda: {name: claim(str(long)) for name in names})

    def made(name: str, *args: Any) -> dict[str, Any]:
        if name == "wanda":
            raise ModelError("this model's folder is gone")
        return figures(name, *args)

    monkeypatch.setattr(one_shot, "figures", made)
    words = ["reproduce", *names, "--page", str(file), "--work", str(tmp_path / "work"), "--windows", "1"]
    for option, text in (("--calibration", PROSE[:20_000]), ("--text", PROSE[20_000:])):
        (tmp_path / option).write_text(text)
        words += [option, str(tmp_path / option)]
    return words, file
