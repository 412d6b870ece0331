"""Zero-shot tasks: likelihoods against plain transformers, questions whose answers are known, flips."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import binomtest

import gossamer as gs
from gossamer.errors import EvaluationError
from gossamer.evaluate.likelihood import LikelihoodReader
from gossamer.evaluate.task_files import TASKS, check_tasks, read_task
from gossamer.evaluate.task_scores import flips, wilson
from gossamer.models.session import Session
from tiny import tiny_folder, tiny_model, tiny_tokenizer, tiny_tokens

CHOICES = ["red paint", "a very long sentence about nothing", "7", "zebra"]


def plain(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """The log-likelihood as anybody would compute it: one forward pass over everything."""
    ids = torch.tensor([[*context, *continuation]])
    with torch.inference_mode():
        logp = model(ids).logits[0, len(context) - 1 : -1].double().log_softmax(-1)
    targets = torch.tensor(continuation)
    return float(logp.gather(-1, targets[:, None]).sum()), bool((logp.argmax(-1) == targets).all())


@pytest.mark.parametrize("arch", ["llama", "mistral", "gpt2"])  # mistral's window is 8 tokens: no rewinding
def test_likelihoods_are_those_of_transformers(arch: str) -> None:
    model = tiny_model(arch)
    read = LikelihoodReader(lambda: Session(model))
    one, two = tiny_tokens(2, 30).tolist()
    cases = [
        (one[:20], one[20:23]),
        (one[:20], two[:1]),
        (one[:20], two[:7]),
        (one[:12] + two[:4], one[20:22]),
        (one[:3], one[3:9]),
        (two[:1], two[1:2]),
        (two[:1], two[1:2]),
    ]
    reused = []
    for context, continuation in cases:
        total, greedy = read(context, continuation)
        expected, likeliest = plain(model, context, continuation)
        assert total == pytest.approx(expected, abs=2e-4)
        assert greedy is likeliest
        reused.append(read.reused)
    assert reused == ([0] * 7 if arch == "mistral" else [0, 19, 19, 12, 2, 0, 0])


def test_the_likeliest_continuation_is_greedy() -> None:
    model = tiny_model()
    context = tiny_tokens(1, 10)[0].tolist()
    ids = list(context)
    for _ in range(3):
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert LikelihoodReader(lambda: Session(model))(context, ids[10:])[1]


def test_a_long_context_loses_its_first_tokens() -> None:
    model = tiny_model(max_position_embeddings=16)
    read = LikelihoodReader(lambda: Session(model), 16)
    ids = tiny_tokens(1, 40)[0].tolist()
    # 16 positions: 13 of the context and 3 of the continuation, whose last token is only predicted
    assert read(ids[:36], ids[36:])[0] == pytest.approx(plain(model, ids[23:36], ids[36:])[0], abs=2e-4)
    with pytest.raises(EvaluationError, match="does not fit"):
        read(ids[:2], ids[2:20])
    with pytest.raises(EvaluationError, match="token or more"):
        read([], ids[:2])


def test_logits_that_are_not_finite_are_refused() -> None:
    model = tiny_model()
    model.model.layers[1].mlp.down_proj.weight.data[:] = float("nan")
    with pytest.raises(EvaluationError, match="NaN"):
        LikelihoodReader(lambda: Session(model))([5, 6], [7])


def lines(path: Path, rows: list[Any]) -> Path:
    data = "\n".join(json.dumps(row) for row in rows).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def questions(count: int) -> list[dict[str, Any]]:
    return [
        {"query": f"Question: what is number {i}?\n", "choices": CHOICES[: 2 + i % 3], "gold": 0}
        for i in range(count)
    ]


def test_which_items_are_asked_is_fixed_and_spread(tmp_path: Path) -> None:
    path = lines(tmp_path / "own.jsonl.gz", questions(10))
    task = read_task(str(path), 4)
    assert (task.name, task.total) == ("own", 10)
    assert [item.contexts[0][-2] for item in task.items] == ["0", "2", "5", "7"]
    assert len(read_task(str(path), None).items) == len(read_task(str(path), 99).items) == 10


def test_named_tasks_ask_as_the_harness_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_DATA", str(tmp_path))
    (tmp_path / "llm_tasks").mkdir()
    lines(tmp_path / "llm_tasks/piqa.jsonl.gz", questions(1))
    item = read_task("piqa").items[0]
    assert item.contexts == ("Question: what is number 0?\nAnswer:",) * 2
    assert item.continuations == ("red paint", "a very long sentence about nothing")
    with pytest.raises(EvaluationError, match=r"boolq has no file"):
        read_task("boolq")
    monkeypatch.delenv("GOSSAMER_DATA")
    with pytest.raises(EvaluationError, match="GOSSAMER_DATA is not set"):
        read_task("piqa")


def test_the_shared_tasks_are_whole(shared_data: Path) -> None:
    totals = {name: read_task(name).total for name in TASKS}
    assert totals == {
        "arc_easy": 2376, "piqa": 1838, "openbook_qa": 500, "winogrande": 1267, "boolq": 3270,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"query": "q", "choices": ["a"], "gold": 0}, "two or more choices"),
        ({"query": "q", "choices": ["a", ""], "gold": 0}, "all of them text"),
        ({"query": "q", "choices": ["a", "b"], "gold": 2}, "gold must be the index of one of its 2"),
        ({"query": "q", "choices": ["a", "b"], "gold": True}, "gold must be"),
        ({"context_options": ["a", "b"], "gold": 0}, "is no question"),
        ([], "is no question"),
    ],
)
def test_damaged_rows_are_named(tmp_path: Path, row: Any, says: str) -> None:
    path = lines(tmp_path / "own.jsonl", [*questions(1), row])
    with pytest.raises(EvaluationError, match=f"line 2 of own.jsonl.*{says}"):
        read_task(str(path))


def test_bad_files_and_names(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl.gz").write_bytes(b"no gzip")
    (tmp_path / "empty.jsonl").write_bytes(b"\n")
    (tmp_path / "no.jsonl").write_bytes(b"{")
    mixed = [*questions(1), {"context_options": ["a", "b"], "continuation": "c", "gold": 1}]
    for name, says in (
        ("broken.jsonl.gz", "cannot read"), ("empty.jsonl", "no items"), ("no.jsonl", "is no JSON"),
        ("away.jsonl", "no task file"),
    ):  # fmt: skip
        with pytest.raises(EvaluationError, match=says):
            read_task(str(tmp_path / name))
    with pytest.raises(EvaluationError, match="mixes"):
        read_task(str(lines(tmp_path / "mixed.jsonl", mixed)))
    with pytest.raises(EvaluationError, match="unknown task 'hellaswag'"):
        check_tasks(["hellaswag"])
    with pytest.raises(EvaluationError, match="at least one task"):
        check_tasks([])
    own = str(lines(tmp_path / "own.jsonl", questions(2)))
    with pytest.raises(EvaluationError, match="named twice"):
        check_tasks([own, own])
    with pytest.raises(EvaluationError, match="at least one item"):
        read_task(own, 0)


@pytest.mark.parametrize(("right", "items"), [(0, 5), (3, 5), (5, 5), (117, 200)])
def test_wilson_is_that_of_scipy(right: int, items: int) -> None:
    expected = binomtest(right, items).proportion_ci(method="wilson")
    assert wilson(right, items) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_flips_count_both_ways() -> None:
    found = flips((True, True, False, False, True), (True, False, True, True, True))
    assert (found.lost, found.gained) == (2, 1)
    assert found.difference.estimate == pytest.approx(-0.2)
    assert found.difference.low < -0.2 < found.difference.high
    same = flips([True] * 200, [True] * 200).difference  # no flips among few are no proof that there are none
    assert (same.low, same.estimate, same.high) == pytest.approx((-0.0097, 0.0, 0.0097), abs=1e-4)
    many = flips(
        [True] * 60 + [False] * 40 + [True] * 900, [False] * 60 + [True] * 40 + [True] * 900
    ).difference
    wald = 1.96 * (0.1 - 0.02**2) ** 0.5 / 1000**0.5
    assert (many.low, many.high) == pytest.approx((0.02 - wald, 0.02 + wald), abs=3e-4)
    assert flips([True], [False]).difference.high == 1.0


def right_ones(model: Any, row: dict[str, Any], *, norm: bool) -> int:
    """The choice that the model finds likeliest, computed without sessions or the harness."""
    encode = tiny_tokenizer()
    if "query" in row:
        pairs = [(row["query"].rstrip(), choice) for choice in row["choices"]]
    else:
        pairs = [(context, row["continuation"]) for context in row["context_options"]]
    found = []
    for context, choice in pairs:
        whole, start = encode(f"{context} {choice}")["input_ids"], encode(context)["input_ids"]
        total = plain(model, start, whole[len(start) :])[0]
        found.append(total / len(choice) if norm else total)
    return max(range(len(found)), key=found.__getitem__)


def test_a_task_whose_answers_are_known(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder, other = tiny_folder(tmp_path / "model"), tiny_folder(tmp_path / "other", seed=1)
    model = tiny_model()
    rows = questions(9)
    for index, row in enumerate(rows):  # right by likelihood at 0 to 5, and wrong from there on
        row["gold"] = (right_ones(model, row, norm=False) + (index > 5)) % len(row["choices"])
    norm = [right_ones(model, row, norm=True) == row["gold"] for row in rows]
    contexts = [
        {"context_options": [f"The {i} dog", f"A {i} green cat"], "continuation": "sleeps.", "gold": i % 2}
        for i in range(4)
    ]
    right = [right_ones(model, row, norm=False) == row["gold"] for row in contexts]
    tasks = [str(lines(tmp_path / "own.jsonl", rows)), str(lines(tmp_path / "schema.jsonl", contexts))]
    found = gs.measure_tasks(folder, tasks, against=other)
    assert found.scores[0].correct == (True,) * 6 + (False,) * 3
    assert found.scores[0].correct_norm == tuple(norm)
    assert found.scores[1].correct == tuple(right)
    assert found.scores[1].correct_norm is None
    assert found.accuracy == pytest.approx((6 / 9 + sum(right) / 4) / 2)
    document = found.to_dict()
    assert document["tasks"]["own"]["accuracy"] == pytest.approx(6 / 9)
    assert document["engines"] == ["the native decoder"] * 2
    reference = document["tasks"]["own"]["against"]["correct"]
    assert document["tasks"]["own"]["flips"]["gained"] == reference[:6].count(0)
    assert document["tasks"]["own"]["flips"]["lost"] == reference[6:].count(1)
    with pytest.raises(EvaluationError, match="two items"):
        gs.measure_tasks(folder, tasks, items=1, against=other)


def test_the_native_decoder_answers_as_transformers(tmp_path: Path) -> None:
    harness = pytest.importorskip("lm_eval") and __import__("gossamer.evaluate.harness", fromlist=["ask"])
    gs.compress(
        tiny_folder(tmp_path / "model"), tmp_path / "sparse", method="magnitude", pattern="2:4", values="int8"
    )
    native, torch_ = (gs.load(tmp_path / "sparse", engine=engine) for engine in ("native", "transformers"))
    readers = [LikelihoodReader(loaded.session) for loaded in (native, torch_)]
    ids = tiny_tokens(1, 40)[0].tolist()
    for context, continuation in ((ids[:30], ids[30:36]), (ids[:30], ids[3:5]), (ids[:20], ids[25:26])):
        here, there = (read(context, continuation)[0] for read in readers)
        assert here == pytest.approx(there, abs=0.05)
    assert readers[0].reused == readers[1].reused == 19
    task = read_task(str(lines(tmp_path / "own.jsonl", questions(6))))
    lm = harness.SessionLM(native.session, native.tokenizer, 512)
    assert harness.ask(lm, [task])[0].items == 6
    with pytest.raises(EvaluationError, match="writes an answer"):
        lm.generate_until([])


def test_without_the_harness_a_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "gossamer.evaluate.harness", raising=False)
    monkeypatch.delattr("gossamer.evaluate.harness", raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.task", None)
    own = str(lines(tmp_path / "own.jsonl", questions(2)))
    with pytest.raises(EvaluationError, match=r"pip install 'gossamer\[eval\]'"):
        gs.measure_tasks(tmp_path / "no model is looked for", [own])
