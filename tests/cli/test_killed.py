"""Commands that tune, killed by SIGKILL at random moments: what is left resumes, to the same bytes."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from cli_run import run

from gossamer.models import load_checkpoint
from gossamer.outputs import work_of
from tiny import tiny_folder

KILLS = 5
COMMAND = """
import sys
import transformers.models.llama.modeling_llama
from gossamer.cli.app import main
from gossamer.recipes import compress, finetune
print("imported", flush=True)
main()
"""


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def started(*arguments: object) -> subprocess.Popen[bytes]:
    """The command in a process of its own, imports over."""
    command = [sys.executable, "-c", COMMAND, *map(str, arguments), "--threads", "1", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    assert process.stdout.readline() == b"imported\n"
    return process


def finished(process: subprocess.Popen[bytes], seconds: float = 300) -> Any:
    """What a command said, or None where it had to be killed after ``seconds``."""
    try:
        told, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return None
    assert process.returncode == 0
    return json.loads(told)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["tune", "compress"])
def test_killed_at_random_moments_it_ends_with_the_same_bytes(
    command: str, text: Path, tmp_path: Path
) -> None:
    model = tiny_folder(tmp_path / "model", num_hidden_layers=4)
    arguments: tuple[object, ...] = (
        "compress", model, "--calibration", text, "--windows", 16, "--seqlen", 64, "--pattern", "2:4",
        "--tune", "blockwise", "--tune-option", "epochs=3",
    )  # fmt: skip
    if command == "tune":
        made = run("compress", model, "-o", tmp_path / "made", "--method", "magnitude", "--pattern", "2:4")
        assert made.code == 0, made.err
        arguments = (
            "tune", tmp_path / "made", "--teacher", model, "--text", text, "--tokens", 40 * 4 * 32,
            "--seqlen", 32, "--batch", 4, "--held-out", 4,
        )  # fmt: skip
    process = started(*arguments, "-o", tmp_path / "whole")
    began = time.monotonic()
    assert finished(process) is not None
    whole_time, expected = time.monotonic() - began, digests(tmp_path / "whole")
    moments = random.Random(0)
    kills = resumed = finishes = 0
    while kills < KILLS or not resumed:
        out = tmp_path / f"out{finishes}"
        lasting = kills >= KILLS and work_of(out).exists()
        seconds = 300 if lasting else whole_time * moments.uniform(0.0, 0.8)
        told = finished(started(*arguments, "-o", out), seconds)
        kills += told is None
        if out.exists():
            assert digests(out) == expected
            load_checkpoint(out)
            finishes += 1
            resumed += told is not None and told["resumed"]
