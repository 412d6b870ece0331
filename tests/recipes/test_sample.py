"""Sampled text as a file: the same bytes each time, after a kill too, and read by what tunes on it."""

from __future__ import annotations

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

import gossamer as gs
from gossamer.errors import GossamerError, OutputError, ResumeError, TextError
from gossamer.models.text import Exchange, read_text
from gossamer.recipes import sample as module
from tiny import VOCABULARY, tiny_folder

SMALL: dict[str, Any] = {"tokens": 60, "prompt_tokens": 6, "max_new_tokens": 12, "seed": 5}
TEXT = ["Sparse networks are small. " * 20, "They are fast too, on the machine that you have. " * 10]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def test_the_file_is_text_for_others_and_says_what_it_took(model: Path, tmp_path: Path) -> None:
    done = gs.sample(model, tmp_path / "own.jsonl", text=TEXT, **SMALL)
    records = [json.loads(line) for line in done.path.read_text().splitlines()]
    assert read_text(done.path).documents == tuple(record["text"] for record in records)
    assert sum(record["tokens"] for record in records) == done.tokens
    assert 60 <= done.tokens < 60 + 12
    assert all(set(record) == {"text", "tokens"} for record in records)
    made = json.loads((tmp_path / "own.jsonl.made.json").read_text())
    assert made == done.made
    assert made["tokens"] == done.tokens
    assert 0 < made["seconds"] == pytest.approx(done.seconds, abs=1e-3)
    assert made["settings"]["temperature"] == 1.0
    assert made["sha256"] == hashlib.sha256(done.path.read_bytes()).hexdigest()
    assert (made["text"], made["text_sha256"]) == ("given strings", read_text(TEXT).sha256)
    assert made["own"] == 1.0
    assert not (tmp_path / "own.jsonl.work").exists()
    with pytest.raises(OutputError, match="exists already"):
        gs.sample(model, done.path, text=TEXT, **SMALL)


def test_a_killed_run_goes_on_to_the_same_bytes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gs.sample(model, tmp_path / "whole.jsonl", text=TEXT, **SMALL)
    out, all_of_it = tmp_path / "cut.jsonl", module.samples

    def dies(*given: Any) -> Any:
        yield from islice(all_of_it(*given), 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "samples", dies)
    with pytest.raises(KeyboardInterrupt):
        gs.sample(model, out, text=TEXT, **SMALL)
    monkeypatch.undo()
    assert not out.exists()
    with open(tmp_path / "cut.jsonl.work" / "samples.jsonl", "ab") as file:
        file.write(b'{"text": "cut off in the mid')
    with pytest.raises(ResumeError, match="it differs in settings"):
        gs.sample(model, out, text=TEXT, **{**SMALL, "seed": 6})
    again = gs.sample(model, out, text=TEXT, together=2, **SMALL)  # which changes nothing but the speed
    assert again.resumed
    assert out.read_bytes() == whole.path.read_bytes()
    assert again.tokens == whole.tokens


def test_an_instruction_set_is_answered_anew(tmp_path: Path) -> None:
    # a model of which most answers end before they are cut off
    model = tiny_folder(tmp_path / "brief", eos_token_id=list(range(0, 384, 8)))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "Add 2 and 2.", "response": "4"}\n\n{"prompt": "Hi", "response": "Ho"}\n')
    done = gs.sample(
        model, tmp_path / "out.jsonl", rewrite=pairs, **{**SMALL, "temperature": 2.0, "max_new_tokens": 40}
    )
    records = [json.loads(line) for line in done.path.read_text().splitlines()]
    assert done.own == sum(record["own"] for record in records) > 0
    assert done.made["own"] == pytest.approx(done.own / len(records), abs=1e-4)
    assert done.made["text_sha256"] == read_text(pairs).sha256
    assert [record["prompt"] for record in records[:3]] == ["Add 2 and 2.", "Hi", "Add 2 and 2."]
    for i, record in enumerate(records):
        assert record["own"] != (record["response"] == ("4", "Ho")[i % 2])
    read = read_text(done.path).documents  # an instruction set again
    assert read == tuple(Exchange(record["prompt"], record["response"]) for record in records)
    assert done.smoke_test is False


def test_what_cannot_be_is_refused_before_the_model_is_loaded(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    bad = tmp_path / "bad.jsonl"
    for line, said in (
        ('{"prompt": "x"}', "line 1 of bad.jsonl has no prompt and response"),
        ("nonsense", "line 1 of bad.jsonl has no prompt and response"),
        ('{"prompt": " ", "response": "x"}', "line 1 of bad.jsonl: prompt and response are text"),
        ("", "the instruction set bad.jsonl is empty"),
    ):
        bad.write_text(line)
        with pytest.raises(TextError, match=said):
            gs.sample("no-such-model", out, rewrite=bad)
    bad.write_text(json.dumps({"prompt": "word " * 400, "response": "x"}))
    with pytest.raises(TextError, match="but the model knows only 512 positions"):
        gs.sample(model, out, rewrite=bad)
    with pytest.raises(TextError, match=r"call it own.txt.jsonl"):
        gs.sample(model, tmp_path / "own.txt", text=TEXT)
    with pytest.raises(TextError, match="give one of them"):
        gs.sample(model, out, text=TEXT, rewrite=bad)
    with pytest.raises(GossamerError, match="tokens"):
        gs.sample(model, out, text=TEXT, tokens=0)
    made = tmp_path / "out.jsonl.made.json"
    made.write_text("kept")
    with pytest.raises(OutputError, match="exists already"):
        gs.sample("no-such-model", out, text=TEXT)
    assert made.read_text() == "kept"
    made.unlink()
    with pytest.raises(TextError, match="cannot be cut from a text"):
        gs.sample(model, out, text=["short"], prompt_tokens=500)
    assert not list(tmp_path.glob("*.work"))


def test_a_model_that_says_nothing_is_told(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    every = frozenset(range(VOCABULARY))
    monkeypatch.setattr("gossamer.tune.self_data.stop_tokens", lambda *given: every)
    with pytest.raises(TextError, match="ended 100 answers in a row"):
        gs.sample(model, tmp_path / "own.jsonl", text=TEXT, **SMALL)
