"""Tasks of lm-evaluation-harness: scores against its own model class and our files, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import gossamer as gs
from gossamer.errors import EvaluationError
from tiny import tiny_folder, tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval")
CHOICES = ["red paint", "a very long sentence about nothing", "7", "zebra"]


def rows(count: int) -> list[dict[str, Any]]:
    return [
        {"query": f"Question: what is number {i}?", "choices": CHOICES[: 2 + i % 3], "gold": i % 2}
        for i in range(count)
    ]


def written(folder: Path, name: str, count: int = 12, **changes: Any) -> str:
    """A task of the harness in a YAML (JSON is YAML) over a local file, so that nothing is fetched."""
    folder.mkdir(exist_ok=True)
    data = folder / "rows.jsonl"
    data.write_text("\n".join(map(json.dumps, rows(count))), encoding="utf-8")
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{query}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        **changes,
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(task), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def test_a_yaml_scores_as_the_harness_scores_transformers(folder: Path, tmp_path: Path) -> None:
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    changes = {"num_fewshot": 2, "fewshot_split": "test", "description": "Answer well. "}
    task = written(tmp_path, "own", **changes)
    found = gs.measure_tasks(folder, [task], items=None, against=folder)
    manager = TaskManager(include_defaults=False)
    model = HFLM(pretrained=tiny_model(), tokenizer=tiny_tokenizer(), backend="causal", device="cpu")
    theirs = simple_evaluate(model, tasks=[task], task_manager=manager, bootstrap_iters=0)
    samples = sorted(theirs["samples"]["own"], key=lambda row: row["doc_id"])
    score = found.scores[0]
    assert score.correct == tuple(row["acc"] == 1.0 for row in samples)
    assert score.correct_norm == tuple(row["acc_norm"] == 1.0 for row in samples)
    assert found.accuracy == theirs["results"]["own"]["acc,none"]
    assert 0 < sum(score.correct) < 12
    likelihoods = [row["filtered_resps"] for row in samples]
    assert score.picked == tuple(one.index(max(one)) for one in likelihoods)
    # examples are drawn at random: the second model must get the same ones
    assert found.reference == found.scores
    told = found.to_dict()["tasks"]["own"]
    assert (told["of"], told["items"], told["examples"], told["dataset"]) == (12, 12, 2, ["json", None])


def test_a_yaml_asks_the_items_of_our_own_file(folder: Path, tmp_path: Path) -> None:
    yaml = written(tmp_path / "theirs", "own_yaml")
    local = tmp_path / "own.jsonl"
    local.write_text("\n".join(map(json.dumps, rows(12))), encoding="utf-8")
    found = gs.measure_tasks(folder, [yaml, str(local)], items=5)
    one, two = found.scores
    assert (one.name, two.name, one.items) == ("own_yaml", "own", 5)
    assert (one.correct, one.correct_norm, one.picked) == (two.correct, two.correct_norm, two.picked)


def test_a_task_of_likelihoods_alone(folder: Path, tmp_path: Path) -> None:
    changes = {"output_type": "loglikelihood", "doc_to_choice": None, "doc_to_target": " {{choices[0]}}"}
    task = written(tmp_path, "last_word", **changes, metric_list=[{"metric": "acc"}])
    score = gs.measure_tasks(folder, [task]).scores[0]
    assert score.items == 12
    assert score.correct_norm is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"output_type": "generate_until"}, "lets the model write"),
        ({"output_type": "loglikelihood_rolling"}, "measures loglikelihood_rolling"),
        ({"metric_list": [{"metric": "f1"}]}, "right or wrong"),
        ({"unsafe_code": True}, "unsafe_code"),
        ({"doc_to_choice": "{{nothing.at.all}}"}, "cannot prepare"),
        ({"dataset_kwargs": {"data_files": {"test": "/no/such/file.jsonl"}}}, "cannot be fetched"),
    ],
)
def test_what_cannot_be_asked(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(EvaluationError, match=says):
        gs.measure_tasks(tmp_path / "no model is looked for", [written(tmp_path, "own", **changes)])


def test_bad_files(tmp_path: Path) -> None:
    nothing = tmp_path / "no model is looked for"
    with pytest.raises(EvaluationError, match=r"no task file away\.yaml"):
        gs.measure_tasks(nothing, [str(tmp_path / "away.yaml")])
    for name, text in (("broken.yaml", "task: [1"), ("odd.yaml", "a: 1\n"), ("list.yaml", "- 1\n")):
        (tmp_path / name).write_text(text)
        with pytest.raises(EvaluationError, match="cannot prepare"):
            gs.measure_tasks(nothing, [str(tmp_path / name)])
    group = tmp_path / "group.yaml"
    group.write_text(json.dumps({"group": "two", "task": []}))
    with pytest.raises(EvaluationError, match="is a group"):
        gs.measure_tasks(nothing, [str(group)])
    own = written(tmp_path, "own")
    with pytest.raises(EvaluationError, match="own is named twice"):
        gs.measure_tasks(nothing, [own, written(tmp_path / "other", "own")])
    with pytest.raises(EvaluationError, match="at least one item"):
        gs.measure_tasks(nothing, [own], items=0)


def test_names_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager, manager

    import gossamer.evaluate.harness_tasks as tasks

    # one folder of its tasks in place of all: reading those takes half a minute
    few = Path(manager.__file__).parent / "arc"
    whole = TaskManager(include_path=few, include_defaults=False)
    monkeypatch.setattr(tasks, "TaskManager", lambda include_defaults: whole)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, says in (
        ("harness:arc_chalenge", "did you mean harness:arc_challenge"),
        ("harness:ai2_arc", "is a group"),
        ("harness:arc_challenge_chat", "lets the model write"),
    ):
        with pytest.raises(EvaluationError, match=says):
            gs.measure_tasks("no model is looked for", [name])

    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(EvaluationError, match="arc_challenge cannot be fetched: the hub"):
        gs.measure_tasks("no model is looked for", ["harness:arc_challenge"])
