"""Recipes as files: what YAML means, and what is wrong with one before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.calibrate import Gradient, Gram
from gossamer.errors import GossamerError, RecipeError, TextError
from gossamer.models.text import Exchange, Text
from gossamer.models.tokenizer import load_tokenizer
from gossamer.prune import obs
from gossamer.recipes.predict import (
    LEFT_OVER,
    _lengths,
    _sample,
    _shrink_seconds,
    _Sizes,
    _tune_bytes,
    predict,
)
from gossamer.recipes.prepare import Prepared, prepare
from gossamer.recipes.rates import Bench, BlockRates
from gossamer.recipes.recipe import parse_changes, read_recipe, shipped
from gossamer.recipes.sample import SampleSettings, exchanges
from gossamer.recipes.shrink import ShrinkSettings
from gossamer.recipes.strict_yaml import parse_yaml
from gossamer.tune.self_data import Rewrites
from tiny import tiny_folder, tiny_model, tiny_tokenizer

TEXT = [topics["lambda"] + topics["class"] + topics["try"]]
SMALL: dict[str, Any] = {
    "name": "small",
    "shrink": {"blocks": 1, "seqlen": 32, "windows": 4},
    "compress": {"pattern": "2:4", "values": "int4", "seqlen": 32, "windows": 4},
    "tune": {"seqlen": 32, "tokens": 512, "batch": 2, "held_out": 2},
}


MIXED: dict[str, Any] = {
    "values": "nl4,nl3", "allocation": "sensitivity", "budget": "3.5bits", "seqlen": 32, "windows": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_values_mean_what_they_look_like() -> None:
    text = "a: 2:4\nb: 1e-4\nc: no\nd: [1, -2.5, .5, 010, '3']\ne:\nf: ~\ng: true\nh: 2026-11-28\ni: 32:64"
    assert parse_yaml(text, "x") == {
        "a": "2:4", "b": 1e-4, "c": "no", "d": [1, -2.5, 0.5, 10, "3"], "e": None, "f": None, "g": True,
        "h": "2026-11-28", "i": "32:64",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: {c: 2, c: 3}", r"line 2, column 11: the key c is there twice"),
        ("a: [1", "line 1"),
        ("a: !!python/name:os.system x", "could not determine a constructor"),
        ("a: *b", "undefined alias"),
        ("a: 1\n? [b]\n: 2", "line 2, column 3: a key is a word"),
        ("a: !!timestamp x", ""),
        ("a: 1\n---\nb: 2", "another document"),
        ("\x00", "special characters"),
    ],
)
def test_what_is_no_yaml_is_placed(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=f"mine.yaml is no YAML.*{says}"):
        parse_yaml(text, "mine.yaml")


def test_masks_that_a_model_has_may_move_as_those_that_are_made() -> None:
    stages = {"compress": {"method": "zeros", "values": "bf16"}, "tune": {"method": "ast"}}
    assert read_recipe({"name": "mine", **stages}).compress.combination().pattern_name is None


EXAMPLES = sorted((Path(__file__).parents[2] / "examples" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_recipes_of_papers_are_whole(path: Path) -> None:
    found = read_recipe(path)
    assert found.name == path.stem
    assert found.about.endswith(".")


def test_shipped_recipes_are_whole() -> None:
    found = shipped()
    assert list(found) == ["balanced", "best", "fast", "small", "sparse"]
    for name, recipe in found.items():
        assert recipe.name == name
        assert recipe.about.endswith(".")
        assert (recipe.compress.pattern == "32:64") == (name == "sparse")
        assert (recipe.model, recipe.text) == (None, None)
    assert len({recipe.sha256 for recipe in found.values()}) == len(found)


def test_the_hash_is_of_what_is_done() -> None:
    recipe = read_recipe(SMALL)
    spelled_out = {**SMALL, "about": "other words", "text": "other.txt", "model": "other"}
    spelled_out["compress"] = {**SMALL["compress"], "method": "obs", "windows": 4}
    assert read_recipe(spelled_out).sha256 == recipe.sha256
    assert read_recipe(SMALL, {"compress.windows": 5}).sha256 != recipe.sha256
    assert read_recipe(SMALL, {"tune": None}).sha256 != recipe.sha256
    assert recipe.stages == ("shrink", "compress", "tune")
    assert read_recipe(SMALL, {"tune": None, "shrink": None}).stages == ("compress",)


def test_changes_reach_into_settings() -> None:
    changes = parse_changes(["compress.values=int3", "tune.losses={kl: 1, task: 0.5}", "shrink=null"])
    recipe = read_recipe(SMALL, changes)
    assert recipe.compress.values == "int3"
    assert recipe.tune is not None
    assert recipe.tune.losses == {"kl": 1, "task": 0.5}
    assert recipe.shrink is None
    assert read_recipe("fast", {"tune.tokens": 1000}).tune is not None
    assert SMALL["compress"]["values"] == "int4"  # what was given stays as it is


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"quantize.values": "int4"}, r"compress\.values are int4, which quantize would round a second time"),
        (
            {"quantize.values": "int4", "compress.values": "bf16"},
            r"compress\.head_values are int8, which quantize would round a second time",
        ),
        (
            {
                "quantize.values": "int4",
                "compress": {"values": "bf16", "head_values": "bf16"},
                "tune": {"values": "int4"},
            },
            r"tune\.values are int4, which quantize would round a second time",
        ),
        (
            {
                "quantize.values": "int4",
                "compress": {"values": "bf16", "head_values": "bf16"},
                "tune": {"beside": {"sums": 16}},
            },
            r"leave tune\.beside out",
        ),
        ({"quantize.values": "int5"}, "int5"),
        (
            {"shrink": {"blocks": 1}, "tune": {"losses": {"kl": 1}, "beside": {"rank": 2, "begin": "lost"}}},
            r"beside, which begins as lost, brings back dense weights by the names of layers, and shrink",
        ),
        ({"quantize.method": "obs"}, "method"),
        ({"compress": None}, "compress: "),
        (
            {"compress": None, "compres": {}, "tune.tokens": 0},
            r"compres: .*did you mean 'compress'(.|\n)*recipe: compress: (.|\n)*recipe: tune.tokens: ",
        ),
        (
            {"compress.valuez": 1},
            r"compress.valuez: there is no such setting \(did you mean 'values'\? there are: allocation",
        ),
        (
            {"prune": {}},
            r"prune: there is no such setting \(did you mean 'tune'\? there are: about",
        ),
        ({"compress.windows": "many"}, "compress.windows: .*integer"),
        ({"compress.windows": 0}, "compress.windows: .*greater than or equal to 1"),
        ({"name.first": "x"}, "name holds no settings"),
        ({"compress.pattern": "2x4:4"}, "comparison group"),
        ({"compress.sparsity": 0.7}, "2:4"),
        ({"compress.method": "wander"}, "did you mean 'wanda'"),
        ({"compress.values": "int5"}, "int5"),
        ({"compress.tune": "blockwize"}, "did you mean 'blockwise'"),
        ({"shrink.method": "angle"}, "method of removing blocks"),
        ({"shrink.blocks": 0}, "share between 0 and 1"),
        ({"tune.losses": {}}, "no loss is left"),
        ({"tune.losses": {"kl": 0}}, "no loss is left"),
        ({"tune.losses": {"squarehead": 1}}, "squarehead pairs the blocks"),
        (
            {"tune.method": "ast", "tune.options": {"begin": "dense"}, "compress.pattern": "2:4"},
            "ast brings back dense weights by the names of layers, and shrink takes some away",
        ),
        ({"tune.values": "int3"}, "round a second time"),
        ({"tune.group": 7}, "a scale covers 64 or 32 inputs, got group 7"),
        ({"compress.group": 7}, "a scale covers 64 or 32 inputs, got group 7"),
        ({"tune.group": 32}, "int4 in groups of 64, which groups of 32 would round a second time"),
        ({"tune.group": 64, "compress.group": 32}, "in groups of 32, which groups of 64 would round"),
        ({"tune.group": 32, "compress.values": "bf16"}, "bf16, which has no scales: leave tune.group out"),
        ({"sample": {"tokens": 100}}, "tune needs 128 tokens of text .* but sample.tokens is 100"),
        ({"sample": {"temperature": -1}}, "temperature"),
        ({"sample": {}, "tune": None}, "there is no tune"),
        ({"tune.micro": 3}, "do not split"),
        (
            {"tune.method": "ast", "compress.pattern": "16x4", "compress.sparsity": 0.5},
            "ast moves masks within N:M",
        ),
        ({"tune.method": "maskllm"}, "maskllm tunes floats, and compress makes int4"),
        ({"tune.method": "scales", "compress.values": "bf16"}, "scales tunes integers, and compress makes"),
        (
            {"tune.method": "scales", "compress": {**MIXED, "values": "nl4,bf16"}},
            "scales tunes integers, and compress makes nl4,bf16",
        ),
        ({"tune.values": "int4", "compress": {**MIXED, "values": "bf16,nl4"}}, "round a second time"),
        ({"tune.method": "jackpot", "compress": {**MIXED, "values": "bf16,float32"}}, "prunes nothing"),
        ({"tune.method": "jackpot", "compress": {"values": "bf16", "sparsity": 0.0}}, "prunes nothing"),
    ],
)
def test_settings_that_are_wrong_alone_or_together(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(GossamerError, match=says):
        read_recipe(SMALL, changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"tune.group": 64},
        {"tune.group": 32, "compress.group": 32},
        {"tune.group": 32, "tune.values": "int4", "compress.values": "bf16"},
    ],
)
def test_a_group_that_rounds_once_is_taken(changes: dict[str, Any]) -> None:
    assert read_recipe(SMALL, changes).tune is not None


def test_formats_by_layer_are_tuned_as_one_is() -> None:
    found = read_recipe(SMALL, {"tune.method": "scales", "compress": MIXED})
    assert [one.name for one in found.compress.combination().stored] == ["nl4", "nl3"]


def test_files_that_are_no_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="name a YAML file, or one of balanced, best, fast, small, sparse"):
        read_recipe("fats")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(RecipeError, match=r"list\.yaml is no recipe"):
        read_recipe(tmp_path / "list.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"name: \xe9")
    with pytest.raises(RecipeError, match=r"cannot read the recipe latin.yaml"):
        read_recipe(tmp_path / "latin.yaml")
    with pytest.raises(RecipeError, match="KEY=VALUE"):
        parse_changes(["compress.values"])
    with pytest.raises(RecipeError, match=r"the value of compress.values is no YAML"):
        parse_changes(["compress.values=[int4"])


@pytest.mark.parametrize(
    ("changes", "given", "says"),
    [
        ({}, {"model": None}, "names no model"),
        ({}, {"model": "nowhere"}, "there is no model 'nowhere'"),
        ({}, {"text": None}, "give a text"),
        ({}, {"text": "nowhere.txt"}, "there is no text file"),
        ({}, {"text": ["too short"]}, r"shrink: the text given strings has \d tokens, but a window of 32"),
        ({"shrink": None}, {"text": ["word " * 40]}, r"tune: the text .* gives \d windows of 32 tokens, but"),
        (
            {"shrink": None},
            {"text": [Exchange("word " * 200, "a few words")] * 3},
            r"tune: the text .* gives \d windows of 32 tokens in which something is learned, but",
        ),
        (
            {"shrink": None, "compress.seqlen": 2, "sample": {"prompt_tokens": 99}},
            {"text": ["word " * 20]},
            "sample: the text .* a window of 99",
        ),
        ({"shrink": None, "sample": {}, "tune.seqlen": 600}, {}, "tune: windows of 600 tokens are longer"),
        ({}, {"text": [Path("there.txt"), Path("nowhere.txt")]}, "there is no text file or folder"),
        ({"compress.seqlen": 4096}, {}, "compress: windows of 4096 tokens are longer"),
        ({"shrink.blocks": 3}, {}, "3 of 3 blocks cannot be removed"),
        ({"tune.beside": {"sums": 17}}, {}, "inputs are not sums of 17"),
        ({"tune.beside": {"rank": 4000}}, {}, "the rank of a .* matrix is at most"),
    ],
)
def test_what_is_missing_is_said_before_any_work(
    changes: dict[str, Any], given: dict[str, Any], says: str, folder: Path, tmp_path: Path
) -> None:
    arguments = {"model": folder, "text": TEXT, **given}
    with pytest.raises(GossamerError, match=says):
        prepare(read_recipe(SMALL, changes), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_names_several_texts(folder: Path, tmp_path: Path) -> None:
    names = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for name in names:
        name.write_text(TEXT[0])
    recipe = read_recipe({**SMALL, "text": [str(name) for name in names]})
    assert prepare(recipe, tmp_path / "out", model=folder).record["text"] == "a.txt + b.txt"
    few = recipe.model_copy(update={"compress": recipe.compress.model_copy(update={"windows": 1})})
    with pytest.raises(TextError, match="compress: 1 windows cannot be drawn from 2 texts"):
        prepare(few, tmp_path / "out", model=folder)


def test_outputs_and_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/gossamer.json").write_text("{}")
    with pytest.raises(GossamerError, match="exists already"):
        prepare(read_recipe(SMALL), tmp_path / "taken", model=folder, text=TEXT)
    with pytest.raises(GossamerError, match="is a checkpoint already"):
        prepare(read_recipe(SMALL), tmp_path / "out", model=tmp_path / "taken", text=TEXT)


class Seconds:
    """Stands in for what is measured: a forward pass takes a second, one with gradients three, an update four
    more, all else a thousandth."""

    def __init__(self, _prepared: Prepared) -> None: ...
    def __enter__(self) -> Seconds:
        return self

    def __exit__(self, *_: object) -> None: ...
    def rates(self, seqlen: int, windows: int = 1) -> BlockRates:
        return BlockRates(1.0, 3.0, 4.0)

    def head(self) -> float:
        return 0.001

    def statistics(self, needs: tuple[type, ...]) -> float:
        return 0.001

    solve = head


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, [3 * 4, 2 * (0.001 + 8 + 0.128), 16 * (2 * (3 + 2) + 3 + 0.128) + 11 * 2 * (2 + 3 + 0.064)]),
        ({"shrink": None, "tune": None}, [3 * (0.001 + 8 + 0.128)]),
        ({"compress.tune": "blockwise", "compress.windows": 8, "tune": None, "shrink": None},
         [3 * (0.001 + 4 * 8 + 0.256 + 4 * 7 * 7 + 5)]),
        ({"shrink.method": "loss", "shrink.blocks": 2, "tune": None},
         [(9 + 4) / 2 * 4 + 5 * 0.128, 0.001 + 8 + 0.128]),
        ({"tune.tokens": None, "tune.minutes": 10, "shrink": None},
         [3 * (0.001 + 8 + 0.128), 600 + 11 * 2 * (3 + 3 + 0.064)]),
        ({"compress.method": "wanda", "compress.pattern": None, "compress.sparsity": 0.5, "tune": None,
          "compress.allocation": "sensitivity", "shrink": None}, [3 * (8 * 0.001 + 8 * 4 + 0.256)]),
        ({"compress.method": "wanda", "compress.budget": "80kB", "tune": None,
          "compress.allocation": "sensitivity", "shrink": None}, [3 * (2 * 0.001 + 8 * 4 + 0.256)]),
    ],
)  # fmt: skip
def test_predictions_count_what_stages_do(
    changes: dict[str, Any],
    seconds: list[float],
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gossamer.recipes.predict.Bench", Seconds)
    prepared = prepare(read_recipe(SMALL, changes), tmp_path / "out", model=folder, text=TEXT)
    found = predict(replace(prepared, reading=0.0))
    assert [stage.seconds for stage in found.stages] == pytest.approx(seconds)
    assert found.seconds == pytest.approx(sum(seconds))
    assert found.bytes == max(stage.bytes for stage in found.stages) > 50e6


@pytest.mark.parametrize("method", ["obs", "fisher"])
def test_one_block_is_timed(method: str, folder: Path, tmp_path: Path) -> None:
    recipe = read_recipe(SMALL, {"compress.method": method})
    prepared = prepare(recipe, tmp_path / "out", model=folder, text=TEXT)
    with Bench(prepared) as bench:
        rates = bench.rates(32)
        assert 0 < rates.forward < rates.backward < 10
        assert 0 <= rates.update < 10
        assert 0 < bench.head() < 1
        assert 0 < bench.solve() < 60
        assert 0 < bench.statistics((Gram, Gradient)) < 1
    assert all(p.device.type == "meta" for p in prepared.bare.parameters())


def test_what_layers_share_is_timed_once_for_each_input(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that gives a call one second, and ten more where it factorizes a matrix."""
    made: list[int] = []
    factorize = obs._upper_of_inverse

    def clock(work: Callable[[], Any]) -> float:
        work()
        made.clear()
        work()
        return 1 + 10 * len(made)

    def count(H: Tensor) -> bool:
        made.append(len(H))
        return factorize(H)

    monkeypatch.setattr("gossamer.recipes.rates.seconds_of", clock)
    monkeypatch.setattr(obs, "_upper_of_inverse", count)
    prepared = prepare(read_recipe(SMALL), tmp_path / "out", model=folder, text=TEXT)
    with Bench(prepared) as bench:
        # of 32 x 64 the others are 2, 1, 2, 4, 4 and 8 times as much; inputs of 64, of 64 and of 128 features
        assert bench.solve() * bench.team == pytest.approx(1 + 21 + 10 * (1 + 1 + 8))


@pytest.mark.parametrize(
    ("arch", "dtype", "item", "gain"),
    [
        ("llama", torch.bfloat16, 2, 4),
        ("llama", torch.float16, 4, 4),
        ("llama", torch.float32, 4, 4),
        ("gpt2", torch.float16, 2, 1),  # which transformers runs
    ],
)
def test_texts_written_together_read_weights_together(
    arch: str, dtype: torch.dtype, item: int, gain: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.recipes.predict.read_bandwidth", lambda: 1e9)
    source = tmp_path / "model"
    tiny_model(arch).to(dtype).save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    changes = {"shrink": None, "sample": {"tokens": 1000, "prompt_tokens": 8}}
    prepared = prepare(read_recipe(SMALL, changes), tmp_path / "out", model=source, text=TEXT)
    with Bench(prepared) as bench:
        sizes = _Sizes(prepared.bare, prepared.blocks)
        weights = sizes.model(sizes.all_blocks, 1)
        for together, faster in ((1, 1), (2, min(2, gain)), (8, gain)):
            settings = SampleSettings(tokens=1000, together=together)
            seconds, needed = _sample(bench, prepared, settings, sizes)
            assert seconds == pytest.approx(1000 * weights * item / 1e9 / faster)
            assert needed - sizes.base == weights * (dtype.itemsize + 2 * item)
        wide = SampleSettings(tokens=1000, dtype="float32", together=1)
        assert _sample(bench, prepared, wide, sizes)[1] - sizes.base == weights * (4 + 2 * 4)


INSTRUCTIONS = "".join(
    json.dumps({"prompt": f"Say {i} in words.", "response": "In words, please. " * 4}) + "\n"
    for i in range(3)
)


def rewriting(folder: Path, **changes: Any) -> dict[str, Any]:
    """The small recipe, tuned on instructions that the dense model answers anew."""
    pairs = folder / "pairs.jsonl"
    if not pairs.exists():
        pairs.write_text(INSTRUCTIONS)
    sample = {"rewrite": str(pairs), "tokens": 4000, "max_new_tokens": 200}
    return {**SMALL, "shrink": None, "sample": {**sample, **changes}}


def test_instructions_are_held_against_the_model_before_any_work(folder: Path, tmp_path: Path) -> None:
    def refused(says: str, **changes: Any) -> None:
        with pytest.raises(GossamerError, match=says):
            prepare(read_recipe(rewriting(tmp_path, **changes)), tmp_path / "out", model=folder)

    recipe = read_recipe(rewriting(tmp_path))
    prepared = prepare(recipe, tmp_path / "out", model=folder)  # and no text, which compress has of Python
    assert prepared.instructions is not None
    assert [str(one.prompt) for one in exchanges(prepared.instructions)][:1] == ["Say 0 in words."]
    assert prepared.record["steps"]["sample"]["rewrite"] == "pairs.jsonl"  # and no path
    assert json.loads(json.dumps(prepared.record)) == prepared.record
    refused("sample: cannot read the instruction set nowhere.jsonl", rewrite="nowhere.jsonl")
    refused("sample.tokens of 200 may be too few: the text pairs.jsonl", tokens=200)
    refused("sample.dtype: ", dtype="int8")
    long = {"prompt": "word " * 400, "response": "x"}
    (tmp_path / "long.jsonl").write_text(INSTRUCTIONS + json.dumps(long))
    says = r"sample: instruction 4 and its answer are a prompt of [\d,]+ tokens, .* knows only 512"
    refused(says, rewrite=str(tmp_path / "long.jsonl"))
    (tmp_path / "bad.jsonl").write_text('{"prompt": "x"}')
    refused("sample: line 1 of bad.jsonl has no prompt and response", rewrite=str(tmp_path / "bad.jsonl"))
    assert not (tmp_path / "out").exists()


def test_rewriting_reads_prompts_besides(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.recipes.predict.read_bandwidth", lambda: 1e9)
    prepared = prepare(read_recipe(rewriting(tmp_path)), tmp_path / "out", model=folder)
    asked, answered = _lengths(prepared, 200)
    tokenizer, pairs = load_tokenizer(folder), exchanges(prepared.instructions or Text((), ""))
    prompts = [len(Rewrites(pairs, tokenizer).prompt(i)) for i in range(3)]
    assert asked == pytest.approx(sum(prompts) / 3)
    assert 20 < answered == len(tokenizer(pairs[0].response)["input_ids"])
    assert _lengths(prepared, 5)[1] == 5
    clock, settings = Seconds(prepared), SampleSettings(tokens=4000, max_new_tokens=200)
    with Bench(prepared):
        sizes = _Sizes(prepared.bare, prepared.blocks)
        given, _ = _sample(clock, prepared, settings, sizes)  # type: ignore[arg-type]
        plain, _ = _sample(clock, replace(prepared, instructions=None), settings, sizes)  # type: ignore[arg-type]
    assert given - plain == pytest.approx(4000 / answered * sizes.all_blocks * 1.0)


def test_every_expert_has_a_gram_matrix_of_its_own(tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / "experts", "qwen3_moe")
    prepared = prepare(read_recipe(SMALL), tmp_path / "out", model=source, text=TEXT)
    config = prepared.bare.config
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    attention = {hidden, config.num_attention_heads * config.head_dim}
    sizes = _Sizes(prepared.bare, prepared.blocks)
    assert sizes.grams == sum(w**2 for w in attention) + config.num_experts * (hidden**2 + inner**2)
    assert 0 < sizes.solved <= torch.get_num_threads() * hidden**2


def test_a_share_of_blocks_is_that_which_is_removed() -> None:
    clock: Any = Seconds(Any)
    settings = [ShrinkSettings(method="loss", windows=1, blocks=blocks) for blocks in (0.25, 3)]
    assert len({_shrink_seconds(clock, one, 10) for one in settings}) == 1


@pytest.mark.parametrize(
    ("way", "values", "least", "most"),
    [
        ({}, "int4", 17, 17),
        ({"method": "ast"}, "int4", 17, 17),
        ({"method": "lora", "options": {"rank": 2}}, "int4", 9.5, 10.5),
        ({"method": "scales"}, "int4", 10, 10),
        ({"method": "jackpot"}, "bf16", 21 + 4, 21 + 4),  # and the dense model's weights in float32
        ({"method": "maskllm"}, "bf16", 38 + 4, 38 + 4),
    ],
)
def test_every_way_to_tune_takes_memory_of_its_own(
    way: dict[str, Any], values: str, least: float, most: float, folder: Path, tmp_path: Path
) -> None:
    """Bytes a weight of the linears, beside what the loss ``task`` takes for the model by itself; and a
    teacher counts where a loss reads it."""
    tune = {"seqlen": 2, "batch": 1, "held_out": 2, "losses": {"task": 1}, "bfloat16": False, **way}
    recipe = read_recipe(SMALL, {"shrink": None, "tune": tune, "compress.values": values})
    prepared = prepare(recipe, tmp_path / "out", model=folder, text=TEXT)
    assert recipe.tune is not None
    sizes = _Sizes(prepared.bare, prepared.blocks)
    teacher = sizes.model(sizes.all_blocks, 1)
    weights = sizes.blocks * sizes.linear
    needed = _tune_bytes(sizes, recipe.tune, "2:4", teacher)
    kept = 2 * (sizes.blocks * sizes.wide * 4 * 2 + sizes.blocks * sizes.hidden * 4)
    made = (4 + LEFT_OVER) * weights
    alone = sizes.model(sizes.blocks, 4) + made + kept + 32 * sizes.vocabulary + 4 * sizes.edge
    dense = 4 * (teacher - weights) if most in (25, 42) else 0  # embeddings and norms come along
    assert least <= (needed - sizes.base - alone - dense) / weights <= most
    taught = recipe.tune.model_copy(update={"losses": {"kl": 1.0}})
    assert _tune_bytes(sizes, taught, "2:4", teacher) - needed == 4 * teacher
