"""The work folder: one run at a time, and what it says where nothing can be written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossamer.calibrate import Inputs, WorkFolder
from gossamer.errors import GossamerError, OutputError, ResumeError

HOLD = """
import sys
from pathlib import Path
from gossamer.calibrate import WorkFolder
with WorkFolder(Path(sys.argv[1]), {"run": 1}):
    print("at work", flush=True)
    sys.stdin.read()
"""


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_one_run_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "out.work"
    with WorkFolder(path, {"run": 1}) as work:
        (path / "block-000.tmp").touch()
        for fingerprint in ({"run": 1}, {"run": 2}):
            with pytest.raises(
                ResumeError, match=r"another run is at work in out\.work: wait for it, or stop"
            ):
                WorkFolder(path, fingerprint)
        assert (path / "block-000.tmp").exists()
        with WorkFolder(path / "inner", {}):  # a folder inside is another one
            work.write("kept", b"")
    with WorkFolder(path, {"run": 1}) as again:
        assert again.resumed
        assert "block-000.tmp" not in names(path)
        again.remove()
    assert not path.exists()


@pytest.mark.skipif(os.name == "nt", reason="no locks there")
def test_a_process_that_ends_leaves_its_work_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "out.work"
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "at work\n"
        with pytest.raises(ResumeError, match="another run"):
            WorkFolder(path, {"run": 1})
        other.kill()
    with WorkFolder(path, {"run": 1}) as work:
        assert work.resumed


def test_work_that_is_refused_before_any_result_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "out.work"
    with pytest.raises(GossamerError), WorkFolder(path, {}):
        raise GossamerError("no")
    assert not path.exists()


@pytest.mark.parametrize(
    ("number", "room"), [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EACCES, False)]
)
def test_room_is_asked_for_only_where_there_is_none(
    number: int, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    work = WorkFolder(tmp_path / "out.work", {})
    inputs = Inputs(work.inputs_file(0), (1, 2), torch.float32)

    def fail(source: Path, target: Path) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OutputError, match=os.strerror(number)) as written:
        work.write("scores", b"x")
    with pytest.raises(OutputError, match=os.strerror(number)) as streamed:
        inputs.written(iter([torch.zeros(1, 2)]))
    for error in (written, streamed):
        assert ("make room" in str(error.value)) == room
        assert "run the same command again" in str(error.value)
