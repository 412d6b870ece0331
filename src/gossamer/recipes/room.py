"""Whether memory and disk have room for a job, asked before it begins; of the disk the least that it takes,
so that nothing is refused that would have fitted."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from gossamer.bench import usable_memory
from gossamer.calibrate import Gradient, fast_dtype
from gossamer.errors import MethodError, OutputError
from gossamer.matrices.values import value_type
from gossamer.recipes.compress_settings import CompressSettings
from gossamer.recipes.layer_shares import allocation_needs
from gossamer.sparse.allocate import LayerInfo

LEAST_KEPT = 0.05  # of a layer, where a budget or the model decides


def gradient_bytes(settings: CompressSettings, layers: Sequence[LayerInfo], hidden: int) -> tuple[int, int]:
    """At the peak of the gradient pass and behind it, 0 where there is none. ``hidden``: numbers a token
    between blocks."""
    if Gradient not in (*settings.layer_needs(), *allocation_needs(settings.combination())):
        return 0, 0
    stream = _stream(settings, hidden)
    blocks = len({layer.block for layer in layers})
    sums = sum(8 * math.prod(layer.shape) for layer in layers)
    return max((blocks + 2) * stream, 3 * stream + sums), sums


def walk_bytes(settings: CompressSettings, layers: Sequence[LayerInfo], hidden: int, edges: int) -> int:
    """At the peak of all else: hidden states before and behind a block, the finished layers, and at the end
    the checkpoint beside them. ``edges``: weights of embedding and head."""
    combination, tuned = settings.combination(), settings.tune is not None
    unknown = combination.method.finds_masks or (combination.budget is not None and combination.prunes)
    kept = LEAST_KEPT if unknown else 1 - combination.sparsity
    weights = kept * sum(math.prod(layer.shape) for layer in layers)
    inner = weights * min(values.bits for values in combination.stored) / 8
    outer = edges * value_type(settings.head_values).bits / 8
    reads = tuned or any(kind.passes == "streaming" for kind in settings.layer_needs())
    beside = min(2, len({layer.block for layer in layers}))  # what the last block gives is not kept
    streams = (2 if tuned else 1) * beside * reads * _stream(settings, hidden)
    return int(max(streams + inner, 2 * (inner + outer)))


def saves_bytes(values: int, moments: int, checkpoint: int, evaluations: int) -> int:
    """At the peak of tuning: the last state and the best one, and beside them the next state, or at the end
    the checkpoint. ``values``: of what is tuned, ``moments``: of the optimizer once it has stepped;
    ``checkpoint``: of the weight file that is made; ``evaluations``: how many there are at least."""
    state = values + moments
    first = values if evaluations < 2 else state
    return max(first + values + state, values + state + checkpoint)


def _stream(settings: CompressSettings, hidden: int) -> int:
    return settings.windows * settings.seqlen * hidden * fast_dtype().itemsize


def check_memory(needed: int) -> None:
    """Raises MethodError where a job would need more bytes than this process may have."""
    total = usable_memory().total
    if needed > total:
        raise MethodError(
            f"about {needed / 1e9:.1f} GB of memory are needed, and {total / 1e9:.1f} GB may be used here: "
            "tune shorter windows or fewer at once (micro, gradient_checkpointing), or start --anyway"
        )


def check_room(needed: Mapping[Path, int]) -> None:
    """Raises OutputError where a disk has no room for the bytes ``needed`` at one time in folders that do not
    lie in one another; what lies there already is among them."""
    disks: dict[int, list[Path]] = {}
    for folder in needed:
        disks.setdefault(_place(folder).stat().st_dev, []).append(folder)
    for folders in disks.values():
        more = sum(needed[folder] for folder in folders) - sum(map(_held, folders))
        free = shutil.disk_usage(_place(folders[0])).free
        if more > free:
            places = " and ".join(map(str, folders))
            raise OutputError(
                f"at least {more:,} bytes are needed in {places}, {free:,} are free on that disk; make room "
                "there or name another output"
            )


def _place(folder: Path) -> Path:
    """The folder itself, or the first above it that is there."""
    return next(one for one in (folder, *folder.absolute().parents) if one.exists())


def _held(folder: Path) -> int:
    held = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # another run may be done with it
            held += path.stat().st_size if path.is_file() else 0
    return held
