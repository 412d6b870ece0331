"""From a process's start to its first token: a model on disk, files warm, nothing loaded.

Each script says when it had come how far; the clock is the system's, so that the interpreter's own start
counts. Imports are taken apart from loading, though a user meets them together.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

TEXT = "Why is the sky blue?"
ROUNDS = 5
_HEAD = "import json, sys, time; marks = {'python': time.monotonic()}\n"
_TAIL = "marks['first token'] = time.monotonic(); print(json.dumps(marks))"
SCRIPTS = {
    "gossamer": """
import gossamer.recipes.load
marks["import gossamer and torch"] = time.monotonic()
import transformers.models.auto.modeling_auto
marks["import transformers"] = time.monotonic()
model = gossamer.load(sys.argv[1])
marks["load"] = time.monotonic()
text = model.generate(sys.argv[2], 1, chat=False)
""",
    "llama_cpp": """
from llama_cpp import Llama
marks["import llama_cpp"] = time.monotonic()
model = Llama(sys.argv[1], n_ctx=512, n_threads=int(sys.argv[3]), verbose=False)
marks["load"] = time.monotonic()
text = model(sys.argv[2], max_tokens=1)["choices"][0]["text"]
""",
}


def measure(
    programs: dict[str, tuple[str, str, Path]], threads: int, env: dict[str, str], rounds: int = ROUNDS
) -> dict[str, Any]:
    """Seconds of every part, in rounds. ``programs``: the python, the engine and the file, by name. A first
    round warms files up and does not count."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for turn in range(rounds + 1):
        for name, (python, engine, file) in programs.items():
            command = [python, "-c", _HEAD + SCRIPTS[engine] + _TAIL, str(file), TEXT, str(threads)]
            start = time.monotonic()
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
            marks = json.loads(done.stdout.splitlines()[-1])
            times = [start, *marks.values()]
            parts = {part: times[i + 1] - times[i] for i, part in enumerate(marks)}
            if turn:
                found[name].append({**parts, "in all": times[-1] - start})
    contenders = {
        name: {part: [run[part] for run in runs] for part in runs[0]} for name, runs in found.items()
    }
    return {"model": "start", "text": TEXT, "threads": threads, "contenders": contenders}


def medians(run: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Median seconds of every part, by contender."""
    return {
        name: {part: statistics.median(times) for part, times in parts.items()}
        for name, parts in run["contenders"].items()
    }
