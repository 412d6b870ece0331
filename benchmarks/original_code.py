"""Runs the layer code of the original repositories, from checkouts that the user names, on one linear layer.

Nothing of that code lies in this project. The checkouts are those of
- locuslab/wanda (Sun et al. 2024): `lib/layerwrapper.py`, `lib/sparsegpt.py`, the masks in `lib/ablate.py`;
- IST-DASLab/sparsegpt (Frantar and Alistarh 2023): `sparsegpt.py` with `quant.py`;
- IST-DASLab/gptq (Frantar et al. 2022): `gptq.py` with `quant.py`.

Their `prune_n` / `prunen` is the number PRUNED of `prune_m`, ours (N:M) is the number kept; with 2:4 both are
2. Their SparseGPT compares scores over all rows of 128 columns, and prunes `int(n * sparsity) + 1` of n.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn


@contextlib.contextmanager
def _without_gpu() -> Iterator[None]:
    """The originals synchronise and move to a GPU; on a CPU both are nothing."""
    saved = torch.cuda.synchronize, torch.Tensor.cuda
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    torch.Tensor.cuda = lambda self, *_: self  # type: ignore[assignment,method-assign]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.cuda.synchronize, torch.Tensor.cuda = saved  # type: ignore[method-assign]


def _load(checkout: Path, relative: str) -> ModuleType:
    """Import one file of a checkout; its neighbours (`quant`) are found beside it and forgotten again."""
    path = checkout / relative
    if not path.exists():
        raise SystemExit(f"{relative} is not in {checkout}: name a checkout of the original repository")
    spec = importlib.util.spec_from_file_location(f"original_{checkout.name}_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.pop(0)
        sys.modules.pop("quant", None)
    return module


@dataclass
class Result:
    """What the original made of a layer: weight and kept mask [out, in]; codes and their scales if quantized.

    scales and zeros are per column [out, in] (equal within a group): weight = scale * (code - zero).
    """

    weight: torch.Tensor
    mask: torch.Tensor
    scales: torch.Tensor | None = None
    zeros: torch.Tensor | None = None

    @property
    def codes(self) -> torch.Tensor | None:
        if self.scales is None or self.zeros is None:
            return None
        return (torch.round(self.weight / self.scales) + self.zeros).to(torch.uint8)


@dataclass
class _Recorder:
    """Stands in for an original's `quantize` and notes, column by column, what it was given."""

    quantize: Any
    pruned: list[torch.Tensor] = field(default_factory=list)
    scales: list[torch.Tensor] = field(default_factory=list)
    zeros: list[torch.Tensor] = field(default_factory=list)

    def __call__(self, x: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, maxq: torch.Tensor) -> Any:
        if x.shape[1] == 1:  # a column of the sweep, not the quantizer's own search
            self.pruned.append(x == 0)  # the sweep zeroes what it prunes before it quantizes
            self.scales.append(scale.expand_as(x).clone())
            self.zeros.append(zero.expand_as(x).clone())
        return self.quantize(x, scale, zero, maxq)


class Originals:
    """The original layer classes; any checkout may be None as long as nothing asks for it."""

    def __init__(self, wanda: str | None, sparsegpt: str | None, gptq: str | None) -> None:
        self._paths = {"wanda": wanda, "sparsegpt": sparsegpt, "gptq": gptq}
        self._modules: dict[str, ModuleType] = {}

    def _module(self, repository: str, relative: str) -> ModuleType:
        key = f"{repository}/{relative}"
        if key not in self._modules:
            path = self._paths[repository]
            if path is None:
                raise SystemExit(f"this needs the original code: pass --{repository} PATH")
            self._modules[key] = _load(Path(path), relative)
        return self._modules[key]

    # -- collectors: objects with add_batch(input, output), as the originals' forward hooks call them

    def wanda_collector(self, layer: nn.Linear) -> Any:
        """Input norms (lib/layerwrapper.py)."""
        return self._module("wanda", "lib/layerwrapper.py").WrappedGPT(layer)

    def sparsegpt_collector(self, layer: nn.Linear) -> Any:
        """Running mean of 2 x xᵀ (lib/sparsegpt.py of the wanda repository)."""
        return self._module("wanda", "lib/sparsegpt.py").SparseGPT(layer)

    def joint_collector(self, layer: nn.Linear, bits: int, sym: bool) -> Any:
        """The same, with a quantizer per output channel (sparsegpt.py of the sparsegpt repository)."""
        module = self._module("sparsegpt", "sparsegpt.py")
        collector = module.SparseGPT(layer)
        collector.quantizer = module.Quantizer()
        collector.quantizer.configure(bits, perchannel=True, sym=sym, mse=False)
        return collector

    def gptq_collector(self, layer: nn.Linear, bits: int, sym: bool) -> Any:
        """The same, for quantization alone (gptq.py)."""
        module = self._module("gptq", "gptq.py")
        collector = module.GPTQ(layer)
        collector.quantizer = module.Quantizer()
        collector.quantizer.configure(bits, perchannel=True, sym=sym, mse=False)
        return collector

    # -- decisions: each changes collector.layer's weight in place and returns what it did

    def prune_magnitude(self, layer: nn.Linear, sparsity: float, prune: tuple[int, int] = (0, 0)) -> Result:
        """|w| against one threshold for the whole layer, or N:M."""
        ablate = self._module("wanda", "lib/ablate.py").AblateGPT
        holder = type("Holder", (), {"layer": layer})()
        with _without_gpu():
            pruned = ablate.get_mag_mask(holder, sparsity, *prune)
        layer.weight.data[pruned] = 0
        return Result(layer.weight.data, ~pruned)

    def prune_wanda(self, collector: Any, sparsity: float, prune: tuple[int, int] = (0, 0)) -> Result:
        """|w| times input norm, compared within each output row, or N:M."""
        ablate = self._module("wanda", "lib/ablate.py").AblateGPT
        pruned = ablate.get_wanda_mask(collector, sparsity, *prune)
        collector.layer.weight.data[pruned] = 0
        return Result(collector.layer.weight.data, ~pruned)

    def prune_sparsegpt(self, collector: Any, sparsity: float, prune: tuple[int, int] = (0, 0)) -> Result:
        """The sweep of SparseGPT, blocks of 128 columns, damping 0.01."""
        with _without_gpu():
            collector.fasterprune(sparsity, *prune, blocksize=128, percdamp=0.01)
        weight = collector.layer.weight.data
        return Result(weight, weight != 0)

    def prune_joint(self, collector: Any, sparsity: float, prune: tuple[int, int] = (0, 0)) -> Result:
        """The same sweep that also quantizes each column; the scales come from the dense weight."""
        module = self._module("sparsegpt", "sparsegpt.py")
        with _recording(module) as recorder, _without_gpu():
            collector.fasterprune(sparsity, *prune, blocksize=128, percdamp=0.01)
        return Result(
            collector.layer.weight.data,
            ~torch.cat(recorder.pruned, 1),
            torch.cat(recorder.scales, 1),
            torch.cat(recorder.zeros, 1),
        )

    def quantize_gptq(self, collector: Any, group: int, block: int = 128) -> Result:
        """GPTQ with groups of `group` inputs. With block > group the original finds the scales of a block's
        later groups on weights that lack the corrections from earlier columns of that block."""
        module = self._module("gptq", "gptq.py")
        with _recording(module) as recorder, _without_gpu():
            collector.fasterquant(blocksize=block, percdamp=0.01, groupsize=group)
        weight = collector.layer.weight.data
        return Result(
            weight,
            torch.ones_like(weight, dtype=torch.bool),
            torch.cat(recorder.scales, 1),
            torch.cat(recorder.zeros, 1),
        )


@contextlib.contextmanager
def _recording(module: ModuleType) -> Iterator[_Recorder]:
    recorder = _Recorder(module.quantize)
    module.quantize = recorder  # type: ignore[attr-defined]
    try:
        yield recorder
    finally:
        module.quantize = recorder.quantize  # type: ignore[attr-defined]
