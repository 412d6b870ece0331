"""`gossamer bench --profile`: the table, the document, and models that are not run natively."""

from __future__ import annotations

from pathlib import Path

import pytest
from cli_run import Outcome, run

from gossamer import kernels
from gossamer.bench import Machine, profiling
from gossamer.errors import EvaluationError
from gossamer.recipes.load import load
from gossamer.recipes.measure import profile
from tiny import tiny_folder

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

QUICK = ("--profile", "--prompt", "20", "--decode", "4", "--repeats", "1")
PARTS = ["attention_products", "attention", "mlp", "head", "rest"]


@pytest.fixture(autouse=True)
def _facts(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = Machine("some processor", 2, 1, "portable", 1 << 30, 1 << 30, 0.0, "2", "3", 10.0)
    monkeypatch.setattr(profiling, "machine_facts", lambda: facts)


def refused(done: Outcome, *words: str) -> None:
    assert done.code == 2, done
    assert done.out == ""
    assert all(word in done.err.splitlines()[-1] for word in ("error: ", *words)), done.err


def test_a_checkpoint_and_a_plain_model_are_profiled(checkpoint: Path, model: Path) -> None:
    told = run("bench", checkpoint, *QUICK, "--json")
    assert told.code == 0, told.err
    assert list(told.document["parts"]) == PARTS
    assert told.document["model"] == str(checkpoint)
    assert (told.document["prompt"], told.document["decode"]) == (20, 4)
    whole, parts = told.document["whole"], told.document["parts"].values()
    assert whole["bytes"] == sum(part["bytes"] for part in parts) > 0
    assert whole["share_of_reading"] == pytest.approx(whole["gb_per_second"] / 10)
    printed = run("bench", checkpoint, *QUICK)
    assert printed.code == 0, printed.err
    for word in ("tokens 21 to 24", "q, k, v, o", "attention", "MLP", "head", "rest", "whole",
                 "of plain reading", "Gop/s", "cache, at least in part", "some processor"):  # fmt: skip
        assert word in printed.out, word
    plain = run("bench", model, *QUICK, "--json", "--dtype", "float32")
    assert plain.code == 0, plain.err
    assert plain.document["parts"]["head"]["bytes"] == 4 * 384 * 64


def test_what_runs_in_transformers_is_refused_with_the_reason(checkpoint: Path, tmp_path: Path) -> None:
    refused(run("bench", tiny_folder(tmp_path / "gpt2", "gpt2"), *QUICK), "native decoder", "family 'gpt2'")
    refused(run("bench", checkpoint, *QUICK, "--engine", "transformers"), "--engine transformers")
    with pytest.raises(EvaluationError, match="transformers: asked for"):
        profile(load(checkpoint, engine="transformers"))


def test_options_that_do_not_go_together(model: Path, checkpoint: Path) -> None:
    refused(run("bench", model, checkpoint, *QUICK), "--profile", "one model", "2")
    refused(run("bench", checkpoint, *QUICK, "--plan"), "--plan and --profile")
    refused(run("bench", checkpoint, *QUICK, "--values", "int4"), "--plan")
    refused(run("bench", checkpoint, "--profile", "--prompt", "510", "--decode", "4"), "512 positions")
