"""Resident memory: of this process, its peak, and what a model takes in a fresh one."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from gossamer.errors import EvaluationError

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_CHILD = "from gossamer.bench.memory import _report; _report()"


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of resident memory of a fresh process that loads a model and runs it.

    ``base``: with the libraries loaded and no model; ``loaded``: after loading; ``running``: after a prompt
    and one decoded token, so that every weight was touched (a memory map counts what was touched);
    ``peak``: the most at any time. ``model`` is what the model adds while it runs.
    """

    base: int
    loaded: int
    running: int
    peak: int

    @property
    def model(self) -> int:
        """running - base."""
        return self.running - self.base

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "model": self.model}


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_bytes() -> int:
    """The most resident memory of this process since it started, or since `reset_peak` returned True."""
    try:
        for line in _STATUS.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10  # macOS counts bytes, Linux KiB


def reset_peak() -> bool:
    """Start counting the peak anew; False where the system cannot (it counts from the process's start)."""
    try:
        _CLEAR.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def resident_memory(source: str | Path, *, prompt: int = 512, threads: int | None = None) -> MemoryUse:
    """Load the model or checkpoint ``source`` in a fresh process, run ``prompt`` random tokens and one step.

    Raises EvaluationError with the process's last words where it fails.
    """
    command = [sys.executable, "-c", _CHILD, str(source), str(prompt), str(threads or 0)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()
        raise EvaluationError(
            f"{source} could not be run in a process of its own: {words[-1] if words else done.returncode}"
        )
    return MemoryUse(**json.loads(done.stdout.splitlines()[-1]))


def _measure(source: str, prompt: int, threads: int) -> MemoryUse:
    """What `resident_memory` runs in the fresh process."""
    import torch
    import transformers.models.auto.modeling_auto  # noqa: F401  (belongs to the base, not to the model)

    from gossamer.models.checkpoint import is_checkpoint, load_checkpoint
    from gossamer.models.session import Session
    from gossamer.models.skeleton import load_model

    if threads:
        torch.set_num_threads(threads)
    base = resident_bytes()
    reset_peak()
    model = load_checkpoint(Path(source)) if is_checkpoint(Path(source)) else load_model(source)[0]
    loaded = resident_bytes()
    session = Session(model)
    ids = torch.randint(model.config.vocab_size, (prompt,), generator=torch.Generator().manual_seed(0))
    session.step(int(session.prompt(ids).argmax()))
    return MemoryUse(base, loaded, resident_bytes(), peak_bytes())


def _report() -> None:
    print(json.dumps(asdict(_measure(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
