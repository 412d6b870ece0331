"""Probes: their items, models whose answers are known, what changes between two models, and bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import gossamer as gs
from gossamer.errors import EvaluationError, MethodError
from gossamer.evaluate.probes import PROBES, ProbeScore, changed
from gossamer.evaluate.probes.retrieval import Retrieval
from gossamer.evaluate.probes.structured import KINDS, Structured, parsed, shape
from gossamer.progress import silent
from tiny import VOCABULARY, tiny_folder, tiny_tokenizer


class Copier:
    """A session that expects what followed the longest earlier copy of the last tokens: it retrieves."""

    def __init__(self) -> None:
        self.ids: list[int] = []

    @property
    def length(self) -> int:
        return len(self.ids)

    def prompt(self, ids: Tensor) -> Tensor:
        self.ids += ids.tolist()
        last = [i for i in range(1, len(self.ids)) if self.ids[i - 1] == self.ids[-1]]
        logits = torch.zeros(VOCABULARY)
        if last:
            logits[self.ids[max(last, key=self._shared)]] = 9.0
        return logits

    def step(self, token: int) -> Tensor:
        return self.prompt(torch.tensor([token]))

    def _shared(self, end: int) -> int:
        """How many tokens before ``end`` are those at the end of all."""
        found = 0
        while found < end and self.ids[end - 1 - found] == self.ids[-1 - found]:
            found += 1
        return found


class Unsure(Copier):
    """A session that expects every token alike."""

    def prompt(self, ids: Tensor) -> Tensor:
        self.ids += ids.tolist()
        return torch.zeros(VOCABULARY)


def subject(
    session: Callable[[], Any] = Unsure, says: Callable[[str], str] = str, positions: int | None = None
) -> Any:
    def generate_each(prompts: Any, max_new_tokens: int, *, stop: str, chat: bool) -> Any:
        assert (stop, chat) == ("\n", False)
        return map(says, prompts)

    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=positions))
    return SimpleNamespace(
        model=model, tokenizer=tiny_tokenizer(), session=session, generate_each=generate_each
    )


def test_an_item_of_retrieval_holds_its_answer_once_and_at_its_depth() -> None:
    probe = Retrieval()
    for depth, place in ((0.0, 0), (0.5, 4), (1.0, 7)):
        context, values, gold = probe.item(8, depth, 3)
        lines = context.split("\n")
        assert len(lines) == 8 + 1 + 3 + 1
        assert set(lines[9:12]) < set(lines[:8])
        assert lines[place] == f"{lines[-1]} {values[gold]}."
        assert len(set(values)) == 4
        assert context.count(f" {values[gold]}.") == 1
        assert all(any(line.endswith(f" {value}.") for line in lines[:8]) for value in values)
    assert probe.item(8, 0.5, 3) == Retrieval().item(8, 0.5, 3)
    assert probe.item(8, 0.5, 3) != Retrieval(seed=1).item(8, 0.5, 3)
    golds = {probe.item(8, 0.0, number)[2] for number in range(40)}
    assert golds == {0, 1, 2, 3}


def test_a_model_that_copies_retrieves_all_and_one_that_is_unsure_nothing() -> None:
    probe = Retrieval(facts=(4, 8))
    found = probe.ask(subject(Copier), 10, silent)
    assert found.measures == {"choice": (True,) * 10, "exact": (True,) * 10}
    assert found.groups["facts"] == ("4 facts", "8 facts") * 5
    assert found.by("depth", "exact") == {
        f"depth {d}": (True, True) for d in ("0", "0.25", "0.5", "0.75", "1")
    }
    unsure = probe.ask(subject(Unsure), 10, silent)
    assert not any(unsure.measures["exact"])
    assert not all(unsure.measures["choice"])


def test_what_does_not_fit_the_context_is_left_out() -> None:
    probe = Retrieval(facts=(4, 40))
    found = probe.ask(subject(Unsure, positions=192), 6, silent)
    assert (found.items, found.left_out) == (3, 3)
    assert set(found.groups["facts"]) == {"4 facts"}
    with pytest.raises(EvaluationError, match="longer than the model's context"):
        probe.ask(subject(Unsure, positions=16), 6, silent)
    with pytest.raises(EvaluationError, match="longer than the model's context"):
        Structured().ask(subject(positions=16), 2, silent)
    other = probe.ask(subject(Unsure), 6, silent)
    with pytest.raises(EvaluationError, match="not asked the same items"):
        changed(found, other)


def test_items_of_json_show_what_they_ask_for() -> None:
    probe = Structured()
    for number in range(16):
        prompt, record, label = probe.item(number)
        *shown, asked = prompt.split("\n\n")
        assert len(shown) == 3
        assert asked.endswith(f"Keys: {', '.join(record)}\nJSON:")
        shapes = [shape(json.loads(one.partition("JSON: ")[2])) for one in shown]
        assert all((one == shape(record)) is (label == "same kind") for one in shapes)
    kinds = {json.dumps(shape(probe.item(number)[1])) for number in range(16)}
    assert len(kinds) == len(KINDS)
    assert probe.item(5) == Structured().item(5) != Structured(seed=1).item(5)


def test_answers_in_json_are_judged() -> None:
    probe = Structured()
    known = {probe.item(number)[0]: probe.item(number)[1] for number in range(4)}
    right = probe.ask(subject(says=lambda prompt: f" {json.dumps(known[prompt])}"), 4, silent)
    assert all(all(one) for one in right.measures.values())
    assert right.groups["examples"] == ("same kind", "other kinds") * 2

    def broken(prompt: str) -> str:
        return json.dumps(known[prompt])[:-1]

    wrong = probe.ask(subject(says=lambda prompt: json.dumps({**known[prompt], "x": 1})), 4, silent)
    assert [sum(one) for one in wrong.measures.values()] == [4, 0, 0]
    cut = probe.ask(subject(says=broken), 4, silent)
    assert [sum(one) for one in cut.measures.values()] == [0, 0, 0]
    told = changed(cut, right)
    assert (told.flips["values"].lost, told.flips["values"].gained) == (4, 0)
    assert told.agreement == (False,) * 4

    def turned(prompt: str) -> str:
        return json.dumps(dict(reversed(known[prompt].items())), separators=(" ,", ":"))

    # the same object in another order of keys and with other spaces is the same answer
    assert changed(probe.ask(subject(says=turned), 4, silent), right).agreement == (True,) * 4


def test_the_strictest_measure_of_json_is_the_strictest() -> None:
    """``1`` is no ``true``, though Python takes them for equal; 5 and 5.0 are one number."""
    probe = Structured()
    orders = [probe.item(number) for number in range(200) if "paid" in probe.item(number)[1]]
    prompt, record, _ = next(item for item in orders if item[1]["paid"])
    known = {probe.item(number)[0]: probe.item(number)[1] for number in range(200)}

    def ask(said: dict[str, Any]) -> Any:
        return probe.ask(
            subject(says=lambda asked: json.dumps(said if asked == prompt else known[asked])), 200, silent
        )

    loose, right = ask({**record, "paid": 1}), ask(record)
    where = next(i for i, (a, b) in enumerate(zip(loose.answers, right.answers, strict=True)) if a != b)
    assert [one[where] for one in loose.measures.values()] == [True, False, False]
    whole = next(item for item in orders if item[1]["price"].is_integer())
    prompt, record = whole[0], whole[1]
    same = ask({**record, "price": int(record["price"])})
    assert all(changed(same, right).agreement)


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1]", "1", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": 1} and so on', "{'a': 1}", "[" * 9999],
)
def test_what_is_no_json_object(text: str) -> None:
    assert parsed(text) is None


def test_shapes_are_keys_and_types() -> None:
    assert shape({"a": 1, "b": ["x", "y"]}) == shape({"b": ["z"], "a": 2.5})
    for other in (
        {"a": "1", "b": ["x"]},
        {"a": 1},
        {"a": True, "b": ["x"]},
        {"a": 1, "b": [1]},
        {"a": 1, "b": {}},
    ):
        assert shape(other) != shape({"a": 1, "b": ["x"]})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), max_position_embeddings=2048)


def test_two_models_are_compared_item_by_item(folder: Path, tmp_path: Path) -> None:
    other = tiny_folder(tmp_path / "other", seed=1, max_position_embeddings=2048)
    probes = [Retrieval(facts=(4,)), Structured(examples=1)]
    found = gs.measure_probes(folder, probes, items=3, against=other)
    assert found.reference is not None
    changes = found.changes()
    assert changes is not None
    for name, score in found.scores.items():
        before = found.reference[name]
        for measure, right in score.measures.items():
            pairs = list(zip(right, before.measures[measure], strict=True))
            told = changes[name].flips[measure]
            assert (told.lost, told.gained) == (pairs.count((False, True)), pairs.count((True, False)))
        assert changes[name].agreement == tuple(map(str.__eq__, score.answers, before.answers))
    document = found.to_dict()
    assert set(document["probes"]) == {"retrieval", "json"}
    assert document["probes"]["retrieval"]["groups"]["facts"]["4 facts"]["items"] == 3
    alone = gs.measure_probes(folder, probes[:1], items=3, against=gs.load(folder))
    assert alone.scores == alone.reference
    assert found.engines == ("the native decoder",) * 2
    assert alone.engines[1] == gs.load(folder).engine  # as it was given
    assert json.loads(json.dumps(document)) == document


def test_knowledge_is_the_local_task(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "llm_tasks").mkdir()
    rows = [{"query": f"What is {i}?", "choices": ["a dog", "two", "zero"], "gold": i % 3} for i in range(9)]
    (tmp_path / "llm_tasks/openbook_qa.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path))
    found = gs.measure_probes(folder, ["knowledge"], items=None).scores["knowledge"]
    task = gs.measure_tasks(folder, ["openbook_qa"]).scores[0]
    assert tuple(found.measures.values()) == (task.correct, task.correct_norm)
    assert found.answers == tuple(map(str, task.picked))


def test_what_cannot_be_asked_is_skipped_with_a_reason_unless_it_was_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GOSSAMER_DATA", raising=False)
    monkeypatch.setattr(Retrieval, "ask", lambda *_: ProbeScore({"choice": (True,)}, ("1",)))
    monkeypatch.setattr(Structured, "ask", lambda *_: ProbeScore({"choice": ()}, ()))
    found = gs.measure_probes(folder, items=1)
    assert set(found.scores) == {"retrieval"}
    assert "GOSSAMER_DATA is not set" in found.skipped["knowledge"]
    assert "longer than" in found.skipped["json"]
    for name, says in (("knowledge", "GOSSAMER_DATA"), ("json", "longer than")):
        with pytest.raises(EvaluationError, match=says):
            gs.measure_probes(folder, [name], items=1)


@pytest.mark.parametrize(
    "options", [{"facts": (3,)}, {"facts": (401,)}, {"facts": ()}, {"depths": (1.5,)}, {"depths": ()}]
)
def test_retrieval_of_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(EvaluationError, match="retrieval takes 4 to 400 facts"):
        Retrieval(**options)


def test_bad_input_is_refused_before_a_model_is_looked_for() -> None:
    nothing = "no/model/is/looked/for"
    with pytest.raises(MethodError, match="unknown probe 'retrival'; did you mean 'retrieval'"):
        gs.measure_probes(nothing, ["retrival"])
    with pytest.raises(EvaluationError, match="named twice"):
        gs.measure_probes(nothing, ["json", Structured()])
    with pytest.raises(EvaluationError, match="at least one probe of json, knowledge, retrieval"):
        gs.measure_probes(nothing, [])
    with pytest.raises(EvaluationError, match="at least 1 items"):
        gs.measure_probes(nothing, ["json"], items=0)
    with pytest.raises(EvaluationError, match="at least 2 items"):
        gs.measure_probes(nothing, ["json"], items=1, against=nothing)


def test_every_probe_is_named_as_it_is_registered() -> None:
    assert [PROBES[name].name for name in PROBES] == ["json", "knowledge", "retrieval"]
    assert set(PROBES.citations) == set(PROBES)
