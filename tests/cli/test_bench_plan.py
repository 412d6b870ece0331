"""`gossamer bench --plan`: what it prints, from times that the test makes up, and what it refuses."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_run import Outcome, run

from gossamer.bench import planning
from gossamer.bench.timing import TORCH, Times
from gossamer.matrices import Packed

SECONDS = {"32:64": 10e-6, "bitmap": 15e-6, "dense": 12e-6, TORCH: 40e-6}


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each kind that was measured."""
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    rows_asked: list[int] = []

    def times(forms: Sequence[Packed], rows: int, copies: int, zeros: float) -> list[Times]:
        rows_asked.append(rows)
        found = [Times(form.layout, form.nbytes, 0, SECONDS.get(form.layout, 11e-6), 3e-4) for form in forms]
        return [*found, Times(TORCH, 10_000, 0, SECONDS[TORCH], 2e-4)]

    monkeypatch.setattr(planning, "time_forms", times)
    monkeypatch.setattr(planning, "call_seconds", lambda: 1e-6)
    monkeypatch.setattr(planning, "read_bandwidth", lambda working_set: 20e9)
    return rows_asked


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def refused(done: Outcome, *words: str) -> None:
    assert done.code == 2, done
    assert done.out == ""
    assert all(word in done.err.splitlines()[-1] for word in ("error: ", *words)), done.err


def test_a_checkpoint_is_planned_and_left_as_it_is(
    checkpoint: Path, asked: list[int], tmp_path: Path
) -> None:
    before = digests(checkpoint)
    arguments = ("bench", checkpoint, "--plan", "--prompt", "100", "--decode", "8", "--threads", "1")
    done = run(*arguments, "--json")
    assert done.code == 0, done.err
    told: dict[str, Any] = done.document
    assert told["model"] == str(checkpoint)
    assert (told["prompt"], told["decode"], told["machine"]["threads"]) == (100, 8, 1)
    assert {row["chosen"] for row in told["rows"]} == {"32:64", "dense"}  # dense: the head
    assert sum(row["layers"] for row in told["rows"]) == 22
    assert told["totals"]["chosen"]["decode_seconds"] == pytest.approx(21 * 10e-6 + 12e-6)
    assert asked == [100, 100, 100, 100, 1]
    printed = run(*arguments)
    assert len(asked) == 5  # from this machine's cache
    for word in (
        "Plan: products with one weight (prompt of 100 tokens, then 8 tokens)",
        "6 x gate_proj, up_proj",
        "128 x 64",
        "32:64 int4",
        "torch bfloat16",
        "as it is, chosen",
        "stays 32:64: ",
        "bound by ",
        "all planned weights, chosen: ",
        "other processes kept",
    ):
        assert word in printed.out, word
    assert run(*arguments, "--refresh").code == 0
    assert len(asked) == 10
    assert digests(checkpoint) == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["plans"]


def test_a_plain_model_needs_values(model: Path, checkpoint: Path) -> None:
    refused(run("bench", model, "--plan"), "no packed weights", "values")
    done = run("bench", model, "--plan", "--values", "int4", "--pattern", "32:64", "--json")
    assert done.code == 0, done.err
    assert {row["layout"] for row in done.document["rows"]} == {"32:64"}
    done = run("bench", model, "--plan", "--values", "int8", "--sparsity", "0.75", "--json")
    assert done.document["rows"][0]["keep"] == 16
    refused(run("bench", checkpoint, "--plan", "--values", "int4"), "packed already")


def test_zeros_offer_columns(model: Path) -> None:
    arguments = ("bench", model, "--plan", "--values", "int4", "--json")
    for more, layouts in (((), ["dense"]), (("--zeros", "0.7"), ["dense", "columns"])):
        done = run(*arguments, *more)
        assert done.code == 0, done.err
        measured = done.document["rows"][0]["measured"]
        assert [form["form"] for form in measured] == [*layouts, TORCH]
        assert done.document["zeros"] == (0.7 if more else None)


def test_options_that_do_not_go_together(model: Path, checkpoint: Path) -> None:
    refused(run("bench", model, checkpoint, "--plan"), "one model", "2")
    for option in (("--values", "int4"), ("--pattern", "2:4"), ("--sparsity", "0.5"), ("--zeros", "0.5")):
        refused(run("bench", model, *option), "--plan")
    refused(run("bench", model, "--refresh"), "--plan")
    refused(run("bench", checkpoint, "--plan", "--zeros", "70"), "from 0 to 1", "70")
    refused(run("bench", model, "--plan", "--values", "int5"), "int5")


@pytest.mark.parametrize("option", [("--dtype", "float32"), ("--engine", "transformers"), ("--repeats", "9"),
                                    ("--cache", "kivi4"), ("--huge-pages",)])  # fmt: skip
def test_options_of_measuring_have_no_place_in_a_plan(checkpoint: Path, option: tuple[str, ...]) -> None:
    done = run("bench", checkpoint, "--plan", *option)
    assert done.code == 2
    assert f"{option[0]} is of measuring a model" in done.err
