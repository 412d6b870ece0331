"""docs/cli.md lists the keys of every JSON document: they are those that commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from cli_run import SMALL, run

from gossamer.recipes import quickstart as room

PAGE = Path(__file__).parents[2] / "docs" / "cli.md"


def documented(line: str) -> set[str]:
    """The keys in the list item that begins with ``line``."""
    found = re.search(rf"^- {re.escape(line)}(?:, each [a-z ]+)?: (.*)$", PAGE.read_text(), re.MULTILINE)
    assert found, line
    return set(re.findall(r"`(\w+)`", found[1])) - {"info"}


def test_every_document_has_the_documented_keys(
    checkpoint: Path, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (
        ("SEQLEN", 48),
        ("MEASURED_WINDOWS", 2),
        ("PROMPT", 12),
        ("DECODE", 3),
        ("ROUNDS", 1),
    ):
        monkeypatch.setattr(room, name, value)
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    commands: dict[str, tuple[object, ...]] = {
        "`compress`": ("compress", model, "-o", tmp_path / "out", "--method", "magnitude", *SMALL),
        "`apply`": (
            "apply", "fast", model, "-o", tmp_path / "applied", "--threads", 1, "--set", "compress.seqlen=32",
            "--set", "compress.windows=4",
        ),
        "`apply --dry-run`": (
            "apply", "fast", model, "-o", tmp_path / "never", "--dry-run", "--set", "compress.seqlen=32",
        ),
        "`apply --list`": ("apply", "--list"),
        "`shrink`": ("shrink", model, "-o", tmp_path / "shorter", "--blocks", 1, *SMALL),
        "`tune`": (
            "tune", checkpoint, "-o", tmp_path / "tuned", "--teacher", model, "--text", text, "--tokens", 128,
            "--seqlen", 32, "--batch", 2, "--held-out", 1,
        ),
        "`sample`": ("sample", model, "-o", tmp_path / "own.jsonl", "--text", text, "--tokens", 4),
        "`gate`": ("gate", checkpoint, "-o", tmp_path / "gated", "--text", text, *SMALL),
        "`eval`": ("eval", checkpoint, "--text", text, "--windows", 2, "--seqlen", 32),
        "`essential`": ("essential", model, "--text", text, "--windows", 2, "--seqlen", 32),
        "`bench`": ("bench", checkpoint, "--prompt", 4, "--decode", 2, "--repeats", 1, "--threads", 1),
        "`bench --profile`": ("bench", checkpoint, "--profile", "--prompt", 4, "--decode", 2, "--threads", 1),
        "`bench --plan`": ("bench", checkpoint, "--plan", "--prompt", 4, "--decode", 2, "--threads", 1),
        "`run`": ("run", checkpoint, "hello", "--max-new-tokens", 2),
        "`info` of a checkpoint": ("info", checkpoint),
        "`info` of a model": ("info", model),
        "`verify`": ("verify", checkpoint),
        "`export`": ("export", checkpoint, "-o", tmp_path / "dense"),
        "`methods`": ("methods",),
        "`reproduce --list`": ("reproduce", "--list"),
        "`isa`": ("isa",),
        "`quickstart`": (
            "quickstart", "-o", tmp_path / "start", "--model", model, "--text", text, "--windows", 2,
            "--threads", 1,
        ),
    }  # fmt: skip
    for line, arguments in commands.items():
        done = run(*arguments, "--json")
        assert done.code == 0, (line, done.err)
        told = done.document
        told = list(told.values()) if line == "`reproduce --list`" else told
        for document in told if isinstance(told, list) else [told]:
            assert set(document) == documented(line), line
