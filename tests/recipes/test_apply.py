"""A recipe end to end: the stages called by hand, byte for byte; interrupted, the same bytes again."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest

import gossamer as gs
from gossamer.errors import ResumeError, TextError
from gossamer.models import load_checkpoint
from gossamer.nn import StructuredLinear
from gossamer.recipes import apply as room
from gossamer.recipes.apply import Applied, apply_recipe
from gossamer.recipes.finetune import finetune
from gossamer.recipes.prepare import Prepared, prepare
from gossamer.recipes.recipe import read_recipe
from gossamer.recipes.sample import sample
from tiny import tiny_folder

TEXT = [topics["lambda"] + topics["class"] + topics["try"]]
RECIPE: dict[str, Any] = {
    "name": "small",
    "shrink": {"blocks": 1, "seqlen": 32, "windows": 4},
    "compress": {
        "pattern": "2:4", "values": "int4", "seqlen": 32, "windows": 4, "tune": "blockwise",
        "tune_options": {"epochs": 1},
    },
    "tune": {"seqlen": 32, "tokens": 256, "batch": 2, "held_out": 2, "evaluations": 2},
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def prepared(folder: Path, out: Path, **changes: Any) -> Prepared:
    return prepare(read_recipe(RECIPE, changes), out, model=folder, text=TEXT)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return apply_recipe(prepared(folder, tmp_path_factory.mktemp("outs") / "whole")).path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_recipe_is_its_stages_called_by_hand(folder: Path, whole: Path, tmp_path: Path) -> None:
    short = gs.remove_blocks(folder, tmp_path / "tiny-shorter", calibration=TEXT, **RECIPE["shrink"]).path
    sparse = gs.compress(short, tmp_path / "compress", calibration=TEXT, **RECIPE["compress"]).path
    tuned = finetune(sparse, tmp_path / "tune", text=TEXT, teacher=folder, **RECIPE["tune"]).path
    ours, theirs = contents(whole), contents(tuned)
    table, by_hand = (json.loads(found.pop("gossamer.json")) for found in (ours, theirs))
    assert ours == theirs
    recipe = table["made"].pop("recipe")
    assert table.pop("crc32") != by_hand.pop("crc32")
    assert table == by_hand
    assert recipe["sha256"] == read_recipe(RECIPE).sha256
    assert recipe["steps"] == read_recipe(RECIPE).steps
    assert (recipe["name"], recipe["model"], recipe["text"]) == ("small", "tiny", "given strings")
    assert str(tmp_path.parent) not in json.dumps(table)


def test_what_comes_out_is_a_checkpoint(whole: Path) -> None:
    assert gs.verify_checkpoint(whole).ok
    loaded = gs.load(whole)
    assert len(loaded.model.model.layers) == 2
    assert [path.name for path in whole.parent.iterdir()] == ["whole"]  # no work is left


class Killed(BaseException):
    """What no stage expects."""


def die_in(name: str, recipe: Prepared) -> None:
    """Applies ``recipe`` up to where ``name`` would be called."""

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, name, die)
        with pytest.raises(Killed):
            apply_recipe(recipe)


@pytest.mark.parametrize("place", ["compress", "finetune", "_rename"])
def test_killed_between_stages_it_goes_on_to_the_same_bytes(
    place: str, folder: Path, whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "whole"
    die_in(place, prepared(folder, out))
    assert not out.exists()
    again = apply_recipe(prepared(folder, out))
    assert again.resumed
    left = {"compress": ["compress", "tune"], "finetune": ["tune"]}.get(place, [])
    assert list(again.seconds) == left  # finished stages do not run again
    assert contents(again.path) == contents(whole)
    assert not (tmp_path / "whole.work").exists()


@pytest.mark.parametrize(("stage", "done"), [("pruning and tuning", 1), ("tuning", 160)])
def test_killed_within_a_stage_it_goes_on_to_the_same_bytes(
    stage: str, done: int, folder: Path, whole: Path, tmp_path: Path
) -> None:
    def stop(at: str, now: int, total: int) -> None:
        if at == stage and now >= done:
            raise Killed

    with pytest.raises(Killed):
        apply_recipe(prepared(folder, tmp_path / "whole"), progress=stop)
    assert contents(apply_recipe(prepared(folder, tmp_path / "whole")).path) == contents(whole)


def test_work_of_another_recipe_is_refused(folder: Path, tmp_path: Path) -> None:
    die_in("compress", prepared(folder, tmp_path / "out"))
    with pytest.raises(ResumeError, match="differs in recipe"):
        apply_recipe(prepared(folder, tmp_path / "out", **{"compress.values": "int3"}))
    other = prepare(read_recipe(RECIPE), tmp_path / "out", model=folder, text=[TEXT[0] + "more"])
    with pytest.raises(ResumeError, match="differs in text"):
        apply_recipe(other)


def test_compress_alone_needs_no_text(folder: Path, tmp_path: Path) -> None:
    recipe = read_recipe({"name": "plain", "compress": {"method": "magnitude", "values": "int8"}})
    made = apply_recipe(prepare(recipe, tmp_path / "out", model=folder))
    by_hand = gs.compress(folder, tmp_path / "hand", method="magnitude", values="int8")
    assert list(made.seconds) == ["compress"]
    assert {**by_hand.made, "recipe": made.made["recipe"]} == made.made


LATE: dict[str, Any] = {
    "compress": {
        **RECIPE["compress"],
        "values": "bf16",
        "head_values": "bf16",
        "tune": None,
        "tune_options": {},
    },
    "quantize": {"values": "int4", "seqlen": 32, "windows": 4},
    "shrink": None,
}


@pytest.mark.parametrize("method", ["full", "maskllm"])
def test_what_was_tuned_in_floats_is_quantized_under_its_own_zeros(
    method: str, folder: Path, tmp_path: Path
) -> None:
    changes = {**LATE, "tune": {**RECIPE["tune"], "method": method}}
    whole = apply_recipe(prepared(folder, tmp_path / "whole", **changes))
    assert list(whole.seconds) == ["compress", "tune", "quantize"]
    assert whole.made["model"] == "tiny"
    assert whole.made["pattern"] == "2:4"
    assert [one["settings"]["method"] for one in whole.made["tuned"]] == [method]
    assert whole.made["sparsity"] == pytest.approx(0.5)
    assert {layer["values"] for layer in whole.made["layers"]} == {"int4"}

    floats = apply_recipe(prepared(folder, tmp_path / "floats", **{**changes, "quantize": None}))
    before, after = (
        {n: m.matrix for n, m in load_checkpoint(one.path).named_modules() if isinstance(m, StructuredLinear)}
        for one in (floats, whole)
    )
    lost = []
    for layer in whole.made["layers"]:
        name = layer["name"]
        was, now = before[name].to_dense().float(), after[name].to_dense().float()
        assert not now[was == 0].any()
        lost.append(float((now - was).norm() / was.norm()))
    assert 0 < max(lost) < 0.3

    die_in("export_dense", prepared(folder, tmp_path / "again", **changes))
    again = apply_recipe(prepared(folder, tmp_path / "again", **changes))
    assert list(again.seconds) == ["quantize"]
    assert contents(again.path) == contents(whole.path)


DRAWN: dict[str, Any] = {"tokens": 200, "prompt_tokens": 8, "max_new_tokens": 40}


@pytest.fixture(scope="module")
def sampled(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Applied:
    out = tmp_path_factory.mktemp("outs") / "sampled"
    return apply_recipe(prepared(folder, out, sample=DRAWN, shrink=None))


def test_the_dense_model_writes_what_is_tuned_on(folder: Path, sampled: Applied, tmp_path: Path) -> None:
    made = sampled
    assert list(made.seconds) == ["compress", "sample", "tune"]
    sparse = gs.compress(folder, tmp_path / "compress", calibration=TEXT, **RECIPE["compress"]).path
    wrote = sample(folder, tmp_path / "samples.jsonl", text=TEXT, **DRAWN)
    tuned = finetune(sparse, tmp_path / "tune", text=wrote.path, teacher=folder, **RECIPE["tune"])
    ours, theirs = contents(made.path), contents(tuned.path)
    assert ours.pop("gossamer.json") != theirs.pop("gossamer.json")
    assert ours == theirs
    told = json.loads(json.dumps(tuned.made["tuned"]))  # lists, as on disk
    assert made.made["tuned"] == told
    assert made.made["tuned"][0]["text"]["text"] == "samples.jsonl"
    told = json.loads((made.path / "gossamer.json").read_text())["made"]["sampled"]
    assert told == {key: value for key, value in wrote.made.items() if key != "seconds"}
    assert told["sha256"] == hashlib.sha256(wrote.path.read_bytes()).hexdigest()
    assert (told["tokens"], told["own"], told["text"]) == (wrote.tokens, 1.0, "given strings")
    assert told["settings"]["prompt_tokens"] == 8


@pytest.mark.parametrize("stage", ["sampling", "tuning"])
def test_killed_while_it_writes_or_behind_that_it_says_the_same(
    stage: str, folder: Path, sampled: Applied, tmp_path: Path
) -> None:
    def stop(at: str, now: int, total: int) -> None:
        if at == stage and now > 0:
            raise Killed

    again = partial(prepared, folder, tmp_path / "sampled", sample=DRAWN, shrink=None)
    with pytest.raises(Killed):
        apply_recipe(again(), progress=stop)
    assert contents(apply_recipe(again()).path) == contents(sampled.path)


def test_a_text_that_was_changed_is_told(folder: Path, tmp_path: Path) -> None:
    recipe = prepared(folder, tmp_path / "out", sample=DRAWN, shrink=None)
    die_in("finetune", recipe)
    with open(tmp_path / "out.work" / room.SAMPLES, "ab") as file:
        file.write(b'{"text": "of others"}\n')
    with pytest.raises(TextError, match=r"samples.jsonl is not the text that .*made.json tells of"):
        apply_recipe(recipe)


def test_answers_are_rewritten_as_by_hand(folder: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    lines = [{"prompt": f"Say {i} in words.", "response": "In words, please. " * 4} for i in range(3)]
    pairs.write_text("\n".join(map(json.dumps, lines)))
    asked = {"rewrite": str(pairs), "tokens": 900, "max_new_tokens": 100}
    made = apply_recipe(prepared(folder, tmp_path / "out", sample=asked, shrink=None))
    wrote = sample(folder, tmp_path / "samples.jsonl", **asked)
    assert made.made["sampled"] == {key: value for key, value in wrote.made.items() if key != "seconds"}
    assert (wrote.made["text"], wrote.made["settings"]["rewrite"]) == ("pairs.jsonl", "pairs.jsonl")
    sparse = gs.compress(folder, tmp_path / "compress", calibration=TEXT, **RECIPE["compress"]).path
    tuned = finetune(sparse, tmp_path / "tune", text=wrote.path, teacher=folder, **RECIPE["tune"])
    assert made.made["tuned"] == json.loads(json.dumps(tuned.made["tuned"]))
    assert made.made["tuned"][0]["text"]["learned"] < 1
    assert str(tmp_path) not in (made.path / "gossamer.json").read_text()


def test_work_on_other_instructions_is_refused(folder: Path, tmp_path: Path) -> None:
    pairs = tmp_path / "pairs.jsonl"
    asked = {"rewrite": str(pairs), "tokens": 900, "max_new_tokens": 100}
    for response in ("In words, please. " * 4, "In other words, please. " * 4):
        pairs.write_text(json.dumps({"prompt": "Say it.", "response": response}))
        recipe = prepared(folder, tmp_path / "out", sample=asked, shrink=None)
        if not (tmp_path / "out.work").exists():
            die_in("sample", recipe)
    with pytest.raises(ResumeError, match="differs in instructions"):
        apply_recipe(recipe)
