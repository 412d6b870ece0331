"""Runs by every way to tune, stopped and taken up again to the bit; and all of them in forced bfloat16."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tuned_models import RUN, Stopped, same_files

import gossamer as gs
from gossamer.matrices import Packed
from gossamer.models import load_checkpoint
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.sparse import parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.tune import saves
from tiny import tiny_folder

STEPS = RUN | {"tokens": 6 * 64, "evaluations": 3, "rate": None}


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny", num_hidden_layers=1)


def made(dense: Path, out: Path, values: str) -> Path:
    return compress(dense, out, method="magnitude", pattern="2:4", values=values, windows=1, seqlen=32).path


def packed(path: Path) -> dict[str, Packed]:
    """The packed linears of the blocks, by name."""
    return {
        name: module.matrix
        for name, module in load_checkpoint(path).named_modules()
        if isinstance(module, StructuredLinear) and "layers" in name and isinstance(module.matrix, Packed)
    }


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize(
    ("method", "values", "options"),
    [
        ("full", "int4", {}),
        ("lora", "int4", {"rank": 4}),
        ("lora", "bfloat16", {"rank": 4}),
        ("scales", "int4", {}),
        ("ast", "int4", {"every": 1, "begin": "dense"}),
        ("maskllm", "bfloat16", {}),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_bits(
    method: str, values: str, options: dict[str, Any], bfloat16: bool, dense: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    begun = made(dense, tmp_path / "made", values)
    run = {**STEPS, "teacher": dense, "method": method, "options": options, "bfloat16": bfloat16}
    whole = gs.finetune(begun, tmp_path / "whole", **run)
    steps = Stopped(monkeypatch, at=4)
    with pytest.raises(KeyboardInterrupt):
        gs.finetune(begun, tmp_path / "again", **run)
    assert json.loads((tmp_path / "again.work" / saves.LOOP).read_text())["numbers"]["step"] == 2
    again = gs.finetune(begun, tmp_path / "again", **run)
    assert again.resumed
    assert steps.calls == 4 + 4
    assert same_files(whole.path, again.path)


@pytest.mark.parametrize("values", ["int4", "bfloat16"])
@pytest.mark.parametrize("method", ["full", "lora", "ast"])
def test_tuning_in_bfloat16_keeps_masks_and_formats_and_wins(
    method: str, values: str, dense: Path, tmp_path: Path
) -> None:
    begun = made(dense, tmp_path / "made", values)
    options = {"full": {}, "lora": {"rank": 4}, "ast": {"every": 1}}[method]
    run = {**STEPS, "teacher": dense, "method": method, "options": options, "norms": False}
    run |= {"rate": 3e-3, "tokens": 20 * 64}
    plain = gs.finetune(begun, tmp_path / "plain", bfloat16=False, **run).outcome
    done = gs.finetune(begun, tmp_path / "out", bfloat16=True, **run)
    assert done.outcome.before["kl"] == pytest.approx(plain.before["kl"], rel=0.02)
    assert done.outcome.before["kl"] != plain.before["kl"]
    assert done.outcome.after["kl"] == pytest.approx(plain.after["kl"], rel=0.02)
    assert done.outcome.after["kl"] < 0.9 * done.outcome.before["kl"]
    old, new = packed(begun), packed(done.path)
    assert old.keys() == new.keys()
    for name, was in old.items():
        assert was.describe() | {"clamped": 0} == new[name].describe() | {"clamped": 0}
        check_mask(new[name].mask(), parse_pattern("2:4"))
        if method != "ast":
            assert torch.equal(was.mask(), new[name].mask())
        assert not new[name].to_dense()[~new[name].mask()].any()
        assert not torch.equal(was.to_dense(), new[name].to_dense())
