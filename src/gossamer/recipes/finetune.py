"""Whole-model fine-tuning: a sparse or quantized checkpoint in, a better one of the same form out.

    check -> load it and its teacher -> tune, evaluate, save, tune ... -> pack the best state -> write

Work in progress lies in ``OUT.work``; the same call goes on where it stopped, with the same result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gossamer.calibrate import WorkFolder
from gossamer.errors import CheckpointError, GossamerError, ModelError, TextError
from gossamer.matrices import Matrix, Packed
from gossamer.matrices.atomic import check_free
from gossamer.matrices.storage import nbytes
from gossamer.models.checkpoint import is_checkpoint, load_checkpoint
from gossamer.models.checkpoint_writer import CheckpointWriter
from gossamer.models.contents import Contents, Verify, open_checkpoint
from gossamer.models.manifest import WEIGHTS as WEIGHTS_FILE
from gossamer.models.skeleton import empty_model, load_model
from gossamer.models.sources import resolve
from gossamer.models.text import Text, TextSource, learned_tokens, read_text, tuning_windows
from gossamer.models.tokenizer import load_tokenizer
from gossamer.outputs import work_of
from gossamer.paths import expanded
from gossamer.progress import Progress, silent
from gossamer.recipes.finetune_settings import FinetuneSettings
from gossamer.recipes.fingerprint import files_of, made_with, sha256_of, surroundings
from gossamer.recipes.load import check_context
from gossamer.recipes.prune_layer import form_of, mean_sparsity
from gossamer.recipes.room import check_room, saves_bytes
from gossamer.recipes.settings import checked
from gossamer.tune import Outcome, Saves, SparseTuning, Windows, held_out_losses, train
from gossamer.tune.beside import apart

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Finetuned:
    """The finished checkpoint, how it was made (as in its gossamer.json), and how tuning went; ``learned``:
    of the tokens in windows that were tuned on, the share that losses counted."""

    path: Path
    made: dict[str, Any]
    outcome: Outcome
    learned: float
    resumed: bool
    smoke_test: bool

    @property
    def worse(self) -> bool:
        """Whether its held-out loss is above the checkpoint's, where masks are searched from dense ones."""
        return self.outcome.after["total"] > self.outcome.before["total"]


def finetune(
    checkpoint: str | Path,
    out: str | Path,
    *,
    text: TextSource = None,
    teacher: str | Path | None = None,
    progress: Progress = silent,
    **settings: Any,
) -> Finetuned:
    """Tunes the weights that ``checkpoint`` keeps, masks and number formats exact at every step, and writes
    the best state as the new checkpoint ``out``.

    ``text``: what is tuned on, as for `compress`; a few windows of it are held out. Of documents that are a
    prompt and a response, losses count the response alone. ``teacher``: the dense model for losses that need
    one (None: the one that the checkpoint was made from, where it is named so that it can be found).
    ``settings`` are those of :class:`FinetuneSettings`. Raises a GossamerError for whatever
    a person can mend; an interrupted run leaves ``OUT.work``, and the same call resumes it.
    """
    chosen = checked(FinetuneSettings, settings)
    chosen.check()
    check_free(Path(out))
    return _Job(expanded(checkpoint), Path(out), chosen, text, teacher, progress).run()


class _Job:
    def __init__(
        self,
        checkpoint: Path,
        out: Path,
        settings: FinetuneSettings,
        text: TextSource,
        teacher: str | Path | None,
        progress: Progress,
    ) -> None:
        self.out, self.settings, self.progress = out, settings, progress
        self.dtype = settings.dtype()
        self.contents = open_to_tune(checkpoint)
        self.teacher_files: dict[str, str] = {}
        self.teacher: PreTrainedModel | None = None
        self.dense: PreTrainedModel | None = None
        self.teacher_label: str | None = None
        self._load_teacher(teacher)
        self.model = load_checkpoint(checkpoint, verify="none", dtype=self.dtype)
        check_context(self.model.config, settings.seqlen, checkpoint.name)
        self.text = read_text(text)
        self.windows, self.held_out = self._windows(checkpoint)
        self.work = WorkFolder(work_of(out), self._fingerprint())

    def run(self) -> Finetuned:
        with self.work:
            return self._run()

    def _run(self) -> Finetuned:
        s, saves = self.settings, Saves(self.work)
        before = self._before() if self.dense is not None and saves.numbers() is None else None
        tuning = SparseTuning(
            self.model,
            teacher=self.teacher,
            dense=self.dense,
            losses=s.chosen_losses(),
            method=s.method,
            options=s.options_within(self.contents.manifest.made.get("pattern")),
            pruned=[layer["name"] for layer in self._layers() if layer.get("sparsity", 0) > 0],
            values=s.values,
            group=s.group,
            beside=s.beside,
            norms=s.norms,
            rate=s.rate,
            scale_rate=s.scale_rate,
            warmup=s.warmup,
            weight_decay=s.weight_decay,
            clip=s.clip,
            gradient_checkpointing=s.gradient_checkpointing,
        )
        self._check_room(tuning, saves)
        self.teacher = self.dense = None  # the tuning keeps them for as long as it needs them
        outcome = train(
            tuning, self.windows, self.held_out, s.loop(), saves, progress=self.progress, before=before
        )
        tuned = tuning.merge()
        made = self._made(outcome, tuned)
        self._write(tuned, made)
        self.work.remove()
        learned = self.windows.share
        return Finetuned(self.out, made, outcome, learned, self.work.resumed, self.text.smoke)

    def _check_room(self, tuning: SparseTuning, saves: Saves) -> None:
        """Of a run that begins; one that goes on has had it."""
        if saves.numbers() is not None:
            return
        s, steps = self.settings, 1
        if s.patience is None and s.minutes is None:
            steps = math.ceil((s.loop().tokens or 1) / (s.batch * s.seqlen))
        values = sum(nbytes(tensor) for tensor in tuning.values().values())
        moments = 2 * sum(nbytes(parameter) for parameter in tuning.parameters())
        same = s.values is None and not s.weights().frees_masks
        size = self.contents.manifest.files[WEIGHTS_FILE].size if same else 0
        check_room({self.work.path: saves_bytes(values, moments, size, min(s.evaluations, steps))})

    def _before(self) -> dict[str, float]:
        """Held-out losses of the checkpoint as it is, where what is tuned begins elsewhere: at dense
        weights."""
        tuning = SparseTuning(
            self.model, teacher=self.teacher, losses=self.settings.chosen_losses(), norms=False
        )
        losses = held_out_losses(tuning, self.held_out, self.settings.micro)
        tuning.merge()
        return losses

    def _layers(self) -> list[dict[str, Any]]:
        """What the checkpoint says of its layers."""
        return list(self.contents.manifest.made.get("layers") or [])

    def _load_teacher(self, asked: str | Path | None) -> None:
        """The teacher, where a loss needs one, and where dense weights are brought back the model that has
        all their bits."""
        needed = any(loss.needs_teacher for loss, _ in self.settings.chosen_losses())
        brings_back = self.settings.brings_back(self.contents.manifest.made.get("pattern"))
        if brings_back:
            self.dense = self._loaded(asked, torch.float32)
        if needed:
            same = brings_back and self.dtype == torch.float32
            self.teacher = self.dense if same else self._loaded(asked, self.dtype)

    def _loaded(self, asked: str | Path | None, dtype: torch.dtype) -> PreTrainedModel:
        """The dense model in evaluation mode."""
        with _of_teacher(self.contents, asked) as source:
            label, folder = _find(source, self.progress)
            if is_checkpoint(folder):
                model = load_checkpoint(folder, dtype=dtype)
            else:
                model, _ = load_model(folder, dtype, apart=True)
        ours, theirs = (load_tokenizer(f).get_vocab() for f in (self.contents.path, folder))
        if ours != theirs:
            raise ModelError(f"the teacher {label} has another vocabulary than the checkpoint")
        self.teacher_files, self.teacher_label = files_of(folder), label
        return model.requires_grad_(False).eval()

    def _windows(self, checkpoint: Path) -> tuple[Windows, Windows]:
        """The windows to tune on, and those held out, of which none is both."""
        s = self.settings
        tokens = learned_tokens(self.text, load_tokenizer(checkpoint))
        windows = windows_to_tune(self.text, tokens, s)
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(s.seed))
        return windows[order[s.held_out :]], windows[order[: s.held_out]]

    def _fingerprint(self) -> dict[str, Any]:
        """All that the result depends on, so that resumed work is never mixed with other work."""
        return {
            "settings": self.settings.model_dump(),
            "checkpoint": self.contents.manifest.files[WEIGHTS_FILE].sha256,
            "teacher": [self.teacher_label, self.teacher_files],
            "tokens": sha256_of(*self.windows.tensors, *self.held_out.tensors),
            **surroundings(),
            "multiplied in": str(self.dtype),
        }

    def _made(self, outcome: Outcome, tuned: dict[str, Matrix | Tensor]) -> dict[str, Any]:
        """How the checkpoint was made, and how it was tuned since: a list, since it may be tuned again.
        Seconds are left out: the same input gives the same bytes. So are the errors of layers as they were
        before."""
        before = self.contents.manifest.made
        told = {key: value for key, value in asdict(outcome).items() if key != "seconds"}
        record = {
            "job": "finetune",
            "teacher": self.teacher_label,
            "settings": self.settings.model_dump(),
            "text": {
                "text": self.text.label,
                "smoke_test": self.text.smoke,
                "windows": len(self.windows),
                "learned": round(self.windows.share, 4),
            },
            **told,
            "with": made_with(),
        }
        layers = [_retold(layer, tuned) for layer in self._layers()]
        now: dict[str, Any] = {"layers": layers, "tuned": [*(before.get("tuned") or []), record]}
        chosen = self.settings.chosen_options(before.get("pattern"))
        if hasattr(chosen, "pattern"):  # its masks are no longer those of before
            now["pattern"] = chosen.pattern
            now["sparsity"] = mean_sparsity(layers)
        return {**before, **now}

    def _write(self, tuned: dict[str, Matrix | Tensor], made: dict[str, Any]) -> None:
        contents = self.contents
        writer = CheckpointWriter(
            self.out, contents.path, scratch=self.work.path / "checkpoint", progress=self.progress
        )
        stored: dict[str, Matrix | Tensor] = {n: contents.weights.tensor(n) for n in contents.plain}
        stored |= {n: contents.matrix(n) for n in contents.manifest.matrices if n not in tuned}
        for name, value in tuned.items():
            stored[name] = value if isinstance(value, Matrix) else value.to(contents.weights.dtype(name))
        for name, target in [*((n, n) for n in stored), *contents.manifest.ties.items()]:
            value = stored[target]
            writer.add_matrix(name, value) if isinstance(value, Matrix) else writer.add_tensor(name, value)
        writer.finish(made)


def open_to_tune(checkpoint: Path, verify: Verify = "crc") -> Contents:
    """The checkpoint in that folder; raises a GossamerError for what is none, or is damaged or gated."""
    if not is_checkpoint(checkpoint):
        raise CheckpointError(f"{checkpoint} is no Gossamer checkpoint: `gossamer compress` makes one")
    if (checkpoint / "activations.json").is_file():
        raise ModelError(f"{checkpoint.name} was gated for the weights it has: tune first, then gate")
    return open_checkpoint(checkpoint, verify)


def teacher_sketch(
    contents: Contents, asked: str | Path | None, progress: Progress = silent
) -> PreTrainedModel:
    """The dense model that a checkpoint is tuned by (as `finetune` takes it), without weights."""
    with _of_teacher(contents, asked) as source:
        return empty_model(_find(source, progress)[1])


@contextmanager
def _of_teacher(contents: Contents, asked: str | Path | None) -> Iterator[str | Path]:
    """The name or folder of the teacher; errors inside tell of one that nobody named."""
    source = asked or contents.manifest.made.get("model")
    if source is None:
        raise ModelError("the checkpoint does not say which model it was made from: name the teacher")
    try:
        yield source
    except GossamerError as error:
        if asked is not None:
            raise
        raise ModelError(
            f"the checkpoint was made from {source!r}, which is not found from here: name the dense "
            f"model as the teacher ({error})"
        ) from error


def _find(source: str | Path, progress: Progress) -> tuple[str, Path]:
    """The label and the folder of a dense model, or of a checkpoint."""
    path = expanded(source)
    if is_checkpoint(path):
        return path.resolve().name, path
    found = resolve(str(source), progress=progress)
    return found.label, found.folder


def windows_to_tune(text: Text, tokens: tuple[Tensor, Tensor], settings: FinetuneSettings) -> Windows:
    """All windows of ``text`` that are tuned on or held out; ``tokens`` as of `learned_tokens`. Raises
    TextError where they are too few."""
    s = settings
    windows = Windows.of(*tuning_windows(text, tokens, s.seqlen))
    if len(windows) < s.held_out + s.batch:
        of = " in which something is learned" if windows.share < 1 else ""
        raise TextError(
            f"the text {text.label} gives {len(windows)} windows of {s.seqlen} tokens{of}, but "
            f"{s.held_out} are held out and a step takes {s.batch}: give more text, or shorter windows"
        )
    return windows


def _retold(layer: dict[str, Any], tuned: dict[str, Matrix | Tensor]) -> dict[str, Any]:
    """The record of a layer without what is true no more, and with what is true now."""
    matrix = tuned.get(f"{layer.get('name')}.weight")
    if not isinstance(matrix, Matrix) or not matrix.is_packed:
        return layer
    kept = {key: value for key, value in layer.items() if not key.endswith("_error")}
    now = form_of(matrix)
    main, beside = apart(matrix)
    mask = main.unpack().mask if isinstance(main, Packed) else None
    if mask is not None:
        now["sparsity"] = 1.0 - int(mask.sum()) / mask.numel()
    if beside is not None:
        now["rank_beside"] = beside.B.shape[1]
    return kept | now
