"""What a method of removing blocks is: it is shown a model and a text, and says which blocks can go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from gossamer.calibrate import Visit, WorkFolder, walk
from gossamer.claim import Claim, Experiment
from gossamer.errors import MethodError
from gossamer.models.skeleton import WeightFiles
from gossamer.models.walk import ModelParts, find_parts
from gossamer.progress import Progress, silent
from gossamer.registry import Registry, with_options

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Choice:
    """``removed``: indices of the blocks to take away, ascending; ``measured``: by what, as plain JSON."""

    removed: tuple[int, ...]
    measured: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Subject:
    """A dense model to look at: a skeleton and its weight files, calibration windows ``(n, seqlen)``, and a
    folder in which an interrupted method finds what it had measured."""

    model: PreTrainedModel
    files: WeightFiles
    windows: Tensor
    work: WorkFolder
    progress: Progress = silent

    @property
    def parts(self) -> ModelParts:
        return find_parts(self.model)

    def visits(self) -> Iterator[Visit]:
        """Every block that is left to measure, with its inputs and outputs on the windows (``visit.calls``);
        one block is in memory at a time."""
        return walk(
            self.model,
            self.files,
            (),
            self.work,
            windows=self.windows,
            targets=True,
            unchanged=True,
            progress=self.progress,
            stage="measuring blocks",
        )


@dataclass
class DepthMethod:
    """Base of all. ``windows``: of calibration text, where nothing else is asked for."""

    name: ClassVar[str] = ""
    windows: ClassVar[int] = 64
    claim: ClassVar[Claim | None] = None

    def choose(self, subject: Subject, count: int) -> Choice:
        """The ``count`` blocks of ``subject`` that can go. Raises CalibrationError for what is not finite."""
        raise NotImplementedError


DEPTH: Registry[DepthMethod] = Registry(
    "method of removing blocks",
    {
        "angular": "gossamer.shrink.angular",
        "influence": "gossamer.shrink.influence",
        "loss": "gossamer.shrink.loss",
    },
)


TENTH = Experiment(
    shrunk={name: {"method": name, "blocks": 0.1} for name in ("angular", "influence", "loss")},
    against=("angular", "influence"),
)


def depth_method(name: str, **options: Any) -> DepthMethod:
    """The method called ``name`` with its options; raises MethodError for an unknown name or option."""
    found = DEPTH[name]
    return with_options(found, options, f"the method {name}")


def block_count(blocks: float, total: int) -> int:
    """How many of ``total`` blocks go: ``blocks`` itself from 1 on, below 1 that share of them, rounded half
    up. Raises MethodError unless one goes and one stays."""
    if not (blocks >= 1 and blocks % 1 == 0) and not 0 < blocks < 1:
        raise MethodError(f"blocks is a share between 0 and 1 or a whole number, not {blocks:g}")
    count = int(blocks) if blocks >= 1 else int(blocks * total + 0.5)
    if not 0 < count < total:
        raise MethodError(f"{count} of {total} blocks cannot be removed: at least one goes and one stays")
    return count
