"""What llama.cpp calls an importance matrix: the mean square of each input of each linear layer, over the
calibration text that ours read. It weighs the errors of its quantizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import protocol
from benchmarks.decode_files import LINEARS
from gossamer.models.text import calibration_windows, read_text

FILE, WINDOWS = "importance.npz", 64  # as many windows as the longest tuned of ours read


@torch.inference_mode()
def importance(args: argparse.Namespace) -> Path:
    """The file of the model of ``args`` in the folder where its files are kept, made once."""
    file: Path = (args.work / args.name / FILE).absolute()
    if file.exists():
        return file
    text = read_text(str(Path(args.data) / protocol.CALIBRATION_TEXT))
    tokenizer = protocol.load_tokenizer(str(args.model))
    windows = calibration_windows(text, tokenizer, protocol.CALIBRATION_SEQLEN, WINDOWS)
    model: Any = protocol.load_model(str(args.model), "bfloat16")
    sums: dict[str, Tensor] = {}
    for i, layer in enumerate(model.model.layers):
        for name, short in LINEARS.items():
            module = layer.get_submodule(name)
            sums[f"blk.{i}.{short}.weight"] = total = torch.zeros(module.in_features, dtype=torch.float64)
            module.register_forward_pre_hook(_adding(total))
    for window in windows:
        model(window[None], use_cache=False)
    means = {name: (total / windows.numel()).float().numpy() for name, total in sums.items()}
    beside = file.with_suffix(".part.npz")
    np.savez(beside, **means)
    beside.replace(file)
    return file


def _adding(total: Tensor) -> Any:
    def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        total.add_(inputs[0].float().square().flatten(0, -2).sum(0))

    return add
