"""What llama.cpp calls an importance matrix: the mean square of each input of each linear layer, over the
calibration text that ours read. It weighs the errors of its quantizer.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import protocol
from benchmarks.decode_files import LINEARS
from benchmarks.llamacpp_files import IMPORTANCE
from gossamer.calibrate import InputNorm
from gossamer.calibrate.modules import gather_inputs
from gossamer.models.text import calibration_windows, read_text
from gossamer.nn.views import weight_views

WINDOWS = 64  # as many windows as the longest tuned of ours read


def importance(args: argparse.Namespace) -> Path:
    """The file of the model of ``args`` in the folder where its files are kept, made once."""
    file: Path = (args.work / args.name / IMPORTANCE).absolute()
    if file.exists():
        return file
    text = read_text(str(Path(args.data) / protocol.CALIBRATION_TEXT))
    tokenizer = protocol.load_tokenizer(str(args.model))
    windows = calibration_windows(text, tokenizer, protocol.CALIBRATION_SEQLEN, WINDOWS)
    model: Any = protocol.load_model(str(args.model), "bfloat16")
    names = {
        f"model.layers.{i}.{name}": f"blk.{i}.{short}.weight"
        for i in range(len(model.model.layers))
        for name, short in LINEARS.items()
    }
    views = [view for view in weight_views(model)[0] if view.name in names]
    batches = [{"input_ids": window[None], "use_cache": False} for window in windows]
    seen = gather_inputs(model, views, batches, [InputNorm], {})
    means = {names[name]: (one[InputNorm].norm ** 2 / windows.numel()).numpy() for name, one in seen.items()}
    beside = file.with_suffix(".part.npz")
    np.savez(beside, **means)
    beside.replace(file)
    return file
