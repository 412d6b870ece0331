"""A writer that is killed, or runs out of disk, at any moment: the output is whole, or not there."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoint_maker import all_bytes, tiny_checkpoint

from gossamer.models import is_checkpoint, load_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks and kills itself by signals")

# One process imports PyTorch once and forks for every case; children die in the middle of `finish`.
SCRIPT = """
import errno, json, os, random, resource, signal, sys, time
from pathlib import Path

import torch
from checkpoint_maker import FORMATS, MADE, filled_writer, tiny_matrices
from gossamer.errors import OutputError
from tiny import tiny_model

torch.set_num_threads(1)
folder = Path(sys.argv[1])
model = tiny_model(num_hidden_layers=1)
matrices = tiny_matrices(model, FORMATS)
import transformers.models.llama.modeling_llama  # before forking, so that children are fast

def finish(name):
    return filled_writer(folder / name, folder / "base", model, matrices).finish(MADE)

def child(work):
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except OutputError as error:
            (folder / "errors").open("a").write(str(error) + "\\n")
            os._exit(3)
        except BaseException:
            os._exit(4)
        os._exit(0)
    return pid

def result(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

STEPS = ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir")

def at_step(n, name, act):
    # calls `act` in place of the n-th step that touches the disk
    count = [0]
    for step in STEPS:
        def counted(*args, step=getattr(os, step), **options):
            count[0] += 1
            if count[0] == n:
                act()
            return step(*args, **options)
        setattr(os, step, counted)
    finish(name)
    if count[0] < n:
        os._exit(7)

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def full():
    raise OSError(errno.ENOSPC, "No space left on device")

done = {"killed": [], "full": [], "random": [], "limit": []}
for kind, act, stride in (("killed", die, 1), ("full", full, 2)):
    for n in range(1, 1000, stride):
        code = result(child(lambda: at_step(n, f"{kind}-{n}", act)))
        done[kind].append(code)
        if code == 7:
            break
began = time.time()
assert result(child(lambda: finish("timed"))) == 0
took = time.time() - began
for n in range(8):
    pid = child(lambda: finish(f"random-{n}"))
    time.sleep(random.Random(n).random() * took)
    os.kill(pid, signal.SIGKILL)
    done["random"].append(result(pid))
for size in (0, 1000, 20_000, 40_000):
    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        finish(f"limit-{size}")
    done["limit"].append(result(child(limited)))
print(json.dumps(done))
"""


def test_killed_or_out_of_disk_at_every_step(tmp_path):
    folder = tiny_checkpoint(tmp_path, num_hidden_layers=1)[0]
    whole = all_bytes(folder)
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={"PYTHONPATH": f"{root}:{root / 'models'}:" + ":".join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stderr
    codes = json.loads(ran.stdout.splitlines()[-1])
    assert set(codes["killed"][:-1]) == {-9}
    assert len(codes["killed"]) > 20
    assert len(codes["full"]) > 10
    assert set(codes["full"][:-1]) <= {0, 3}  # making a folder that is there may fail without harm
    assert codes["full"][:-1].count(0) <= 1
    assert codes["limit"] == [3, 3, 3, 3]

    finished = [out for out in tmp_path.iterdir() if out.name.partition("-")[2].isdecimal()]
    assert len(finished) >= 3
    for out in finished:
        assert all_bytes(out) == whole, out
    for out in tmp_path.iterdir():
        # what a killed process leaves under another name is no checkpoint, or a whole one
        if ".tmp-" in out.name and is_checkpoint(out):
            load_checkpoint(out)
    # a process that lives to say so leaves nothing behind
    assert not list(tmp_path.glob("full-*.tmp-*"))
    assert not list(tmp_path.glob("limit-*"))
    errors = (tmp_path / "errors").read_text().splitlines()
    assert all("No space left" in error or "File too large" in error for error in errors)
    assert any("bytes are needed" in error and "free on that disk" in error for error in errors)
