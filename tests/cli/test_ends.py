"""Ctrl-C, SIGTERM, closed pipes and slow imports: what only shows in a process of its own, or almost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer
from cli_run import SMALL, run
from test_failures import digests

from gossamer.cli.guard import guarded, resumable, stoppable
from gossamer.cli.progress import progress
from tiny import tiny_folder

COMMAND = (sys.executable, "-c", "from gossamer.cli.app import main; main()")
WAIT = 240  # seconds: imports of a busy machine take their time


def test_ctrl_c_leaves_work_that_the_same_command_finishes(text: Path, tmp_path: Path) -> None:
    """SIGINT after the first of six blocks: exit 130, no output; then the same bytes as if never stopped."""
    model = tiny_folder(tmp_path / "deep", num_hidden_layers=6, intermediate_size=256)
    out, work = tmp_path / "out", tmp_path / "out.work"
    arguments = ["compress", str(model), "-o", str(out), "--calibration", str(text), *SMALL]
    process = subprocess.Popen(
        [*COMMAND, *arguments], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    give_up = time.monotonic() + WAIT
    while not (work / "block-000.json").exists() and time.monotonic() < give_up:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    printed, told = process.communicate(timeout=WAIT)
    assert process.returncode == 130, told
    assert printed == ""
    assert f"interrupted: what is done is kept in {work}: run the same command again" in told
    assert "Traceback" not in told
    assert not out.exists()
    assert work.is_dir()

    done = run(*arguments)
    assert done.code == 0, done.err
    assert "(resumed)" in done.out
    assert not work.exists()
    whole = [str(tmp_path / "whole") if argument == str(out) else argument for argument in arguments]
    assert run(*whole).code == 0
    assert digests(out) == digests(tmp_path / "whole")


def test_sigterm_ends_like_ctrl_c(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out.work").mkdir()
    undone: list[str] = []

    @guarded
    def command() -> None:
        try:
            with resumable(tmp_path / "out.work"):
                signal.raise_signal(signal.SIGTERM)
        finally:
            undone.append("cleaned up")

    before = signal.getsignal(signal.SIGTERM)
    with stoppable(), pytest.raises(typer.Exit) as end:
        command()
    assert end.value.exit_code == 143
    assert undone == ["cleaned up"]
    assert f"stopped (SIGTERM): what is done is kept in {tmp_path / 'out.work'}" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_that_python_loses_is_raised_at_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    class Dying:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGINT)

    lost: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lost.append)
    before = signal.getsignal(signal.SIGINT)
    with stoppable(), progress() as report:
        report("pruning", 0, 2)
        Dying()
        assert len(lost) == 1
        with pytest.raises(KeyboardInterrupt):
            report("pruning", 1, 2)
    assert signal.getsignal(signal.SIGINT) is before
    with progress() as report:
        report("pruning", 0, 2)


def test_ctrl_c_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    @guarded
    def command() -> None:
        with resumable(tmp_path / "out.work"):
            raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as end:
        command()
    assert end.value.exit_code == 130
    assert "interrupted: nothing was begun" in capsys.readouterr().err


def test_what_nobody_expected_keeps_its_traceback() -> None:
    @guarded
    def command() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        command()


def test_help_and_isa_start_fast_and_a_closed_pipe_is_quiet() -> None:
    """Neither needs transformers, help not even torch; a reader that goes away ends a command in silence."""
    script = """
import sys
import gossamer
assert not {"torch", "numpy"} & set(sys.modules), "import gossamer"
from gossamer.cli.app import app
def end(*arguments):
    try:
        app(arguments)
    except SystemExit as error:
        return error.code
assert end("--help") == 0 and end("compress", "--help") == 0
assert not {"torch", "numpy", "transformers"} & set(sys.modules), "--help"
assert end("isa") == 0
assert "transformers" not in sys.modules, "isa"
print("so far", file=sys.stderr, flush=True)
sys.stdin.read()  # until the test has closed our stdout
sys.exit(end("methods"))
"""
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE, text=True
    )
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        while b"GOSSAMER_ISA" not in pipe.readline():
            assert process.poll() is None, process.stderr.read() if process.stderr else ""
    _, told = process.communicate(timeout=WAIT)
    assert told == "so far\n"
    assert process.returncode == 141


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_behind_the_output_is_told() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run([*COMMAND, "isa"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=WAIT)
    assert done.returncode == 2
    assert done.stderr == "error: the output: No space left on device\n"


def test_streams_that_are_closed_disturb_nothing() -> None:
    script = """
import os, sys
for number in (0, 1, 2):
    os.close(number)
sys.stdin = sys.stdout = sys.stderr = None  # as Python begins where they are closed
sys.argv = ["gossamer", "isa"]
from gossamer.cli.app import main
main()
"""
    assert subprocess.run([sys.executable, "-c", script], timeout=WAIT).returncode == 0


def test_what_is_no_utf8_on_standard_input_is_left_to_whoever_reads_it() -> None:
    script = """
import sys
sys.argv = ["gossamer", "isa"]
from gossamer.cli.app import main
try:
    main()
except SystemExit:
    print(repr(sys.stdin.read()))
"""
    command, environment = [sys.executable, "-c", script], {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, input=b"caf\xe9", capture_output=True, timeout=WAIT, env=environment)
    assert done.stdout.splitlines()[-1] == rb"'caf\udce9'"


def test_a_file_that_nobody_expected_to_fail_is_named() -> None:
    with pytest.raises(typer.Exit) as end:
        guarded(lambda: open("/dev/null/x").close())()
    assert end.value.exit_code == 2
