"""The measuring protocol that every tool here follows: texts, windows, perplexity, peak memory, result files.

Needs torch and transformers only, so that rivals' own environments can use it.

- Measured text: WikiText-2 raw test, the file's text as it is, tokenised once without special tokens, the
  first 20 windows of 2,048 without overlap: 2,047 predictions each, 40,940 in all.
- Calibration text: a part of WikiText-2 raw train, tokenised likewise; windows of 1,024 that start at
  `random.Random(seed).randint(0, tokens - 1024 - 1)`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import resource
import sys
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
TEST_TEXT = "text/wikitext2_raw_test.txt"
CALIBRATION_TEXT = "text/wikitext2_raw_train_part.txt"
EVAL_WINDOWS, EVAL_SEQLEN = 20, 2048
CALIBRATION_SEQLEN = 1024


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """Of the command ``python -m benchmarks.MODULE``, which its module's own words describe."""
    return argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_model_arguments(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Options that all scripts share: the dense model (not ``required`` where a script has parts that need
    none, see `model_folder`), the texts, the threads."""
    parser.add_argument(
        "--model", required=required, metavar="DIR", help="Hugging Face folder of the dense model"
    )
    add_data_arguments(parser, f"folder that holds {TEST_TEXT} and {CALIBRATION_TEXT}")


def add_data_arguments(parser: argparse.ArgumentParser, words: str) -> None:
    """``--data``, ``words`` saying what it holds, and ``--threads``."""
    parser.add_argument(
        "--data",
        default=os.environ.get("GOSSAMER_DATA"),
        metavar="DIR",
        help=f"{words} (default: $GOSSAMER_DATA)",
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of every library (default 1)")


def model_folder(model: str | None) -> Path:
    """The folder of ``--model``, or the end of the script where none was given."""
    if not model:
        raise SystemExit("the dense model is needed: pass --model DIR")
    return Path(model).resolve()


def data_folder(data: str | None) -> Path:
    """The folder of ``--data``, or the end of the script where none was given."""
    if not data:
        raise SystemExit("the data are needed: pass --data DIR or set GOSSAMER_DATA")
    return Path(data).resolve()


def load_tokenizer(model_dir: str) -> Any:
    """The tokenizer of a Hugging Face folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_dir)


def load_model(model_dir: str, dtype: str = "float32") -> Any:
    """The dense model with its weights in `dtype`, in eval mode."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype)).eval()


def _tokens(tokenizer: Any, data: str | None, name: str) -> list[int]:
    text = (data_folder(data) / name).read_text(encoding="utf-8")
    return list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def measured_windows(
    tokenizer: Any, data: str | None, windows: int = EVAL_WINDOWS, seqlen: int = EVAL_SEQLEN
) -> torch.Tensor:
    """The first windows of the measured text, int64 [windows, seqlen], no begin token, no overlap."""
    ids = _tokens(tokenizer, data, TEST_TEXT)[: windows * seqlen]
    return torch.tensor(ids).reshape(windows, seqlen)


def calibration_windows(
    tokenizer: Any, data: str | None, windows: int, seqlen: int = CALIBRATION_SEQLEN, seed: int = 0
) -> torch.Tensor:
    """Random windows of the calibration text, int64 [windows, seqlen]; the seed gives the starts."""
    ids = _tokens(tokenizer, data, CALIBRATION_TEXT)
    rng = random.Random(seed)
    starts = [rng.randint(0, len(ids) - seqlen - 1) for _ in range(windows)]
    return torch.tensor([ids[start : start + seqlen] for start in starts])


@torch.no_grad()
def perplexity(model: Any, windows: torch.Tensor) -> float:
    """exp of the mean negative log likelihood over all predicted tokens, windows [count, seqlen]."""
    total = 0.0
    for ids in windows:
        logits = model(ids[None], use_cache=False).logits[0, :-1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").double().item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))


def reset_peak_rss() -> bool:
    """Forget the highest resident memory so far; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_gb() -> float:
    """The highest resident memory of this process since it began or since the reset, GB (10^9 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def set_threads(threads: int) -> None:
    """Limit torch, and the libraries that read the environment when they are imported later."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    torch.set_num_threads(threads)


def machine() -> dict[str, Any]:
    """What a figure depends on: processor, cores, versions."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    import transformers

    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def read_json(path: Path) -> dict[str, Any]:
    """A result file, or nothing where there is none yet."""
    return dict(json.loads(path.read_text())) if path.exists() else {}


def update_json(path: Path, content: dict[str, Any]) -> None:
    """Merge `content` into a result file, one level deep, so that long runs can be done one by one."""
    old = read_json(path)
    for key, value in content.items():
        if isinstance(value, dict) and isinstance(old.get(key), dict):
            old[key] = {**old[key], **value}
        else:
            old[key] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(old, indent=2) + "\n")
    beside.replace(path)


def print_table(head: list[str], rows: list[list[Any]]) -> None:
    """A plain aligned table on stdout."""
    texts = [head] + [["" if cell is None else str(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in texts) for i in range(len(head))]
    for row in texts:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def markdown_table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def write_between(document: Path, mark: str, text: str) -> None:
    """Puts ``text`` between the lines ``<!-- mark: begin -->`` and ``<!-- mark: end -->`` of a Markdown file.
    Raises SystemExit where it has none."""
    begin, end = f"<!-- {mark}: begin -->", f"<!-- {mark}: end -->"
    before, found, rest = document.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise SystemExit(f"{document} has no place for the tables: {begin} and {end} on lines of their own")
    document.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
