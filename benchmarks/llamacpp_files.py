"""Makes llama.cpp's quantized files. Needs llama-cpp-python alone."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

CALIBRATED, IMPORTANCE = ", calibrated", "importance.npz"


def _constant(prefix: str, name: str) -> int:
    import llama_cpp

    value = getattr(llama_cpp, prefix + name, None)
    if value is None:
        raise SystemExit(f"llama.cpp knows no type {name}")
    return int(value)


def _importance(file: Path) -> Any:
    """Arrays by tensor as llama.cpp takes them: an entry without a name is the last."""
    import llama_cpp
    import numpy as np

    with np.load(file) as arrays:
        held = {name.encode(): np.ascontiguousarray(arrays[name], np.float32) for name in arrays.files}
    entries = (llama_cpp.llama_model_imatrix_data * (len(held) + 1))()
    for entry, (name, values) in zip(entries, held.items(), strict=False):
        entry.name, entry.size = name, values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    entries.held = held  # as long as the entries live
    return entries


def quantize(source: Path, target: Path, variant: str, threads: int) -> Path:
    """Write `target` from `source` in the variant's type, unless it is there already.

    `QUANT` leaves the tied head as llama.cpp chooses it; `QUANT+TYPE` sets it: `Q4_0+q4_0`; with
    `, calibrated` errors are weighed by the file `importance.npz` beside the source.
    """
    import llama_cpp

    if target.exists():
        return target
    plain = variant.removesuffix(CALIBRATED)
    quant, _, head = plain.partition("+")
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = threads
    params.allow_requantize = True
    params.ftype = _constant("LLAMA_FTYPE_ALL_" if quant == "F32" else "LLAMA_FTYPE_MOSTLY_", quant)
    if head:
        # With tied embeddings llama.cpp has one tensor for both, and asks either option for its type.
        params.token_embedding_type = params.output_tensor_type = _constant("GGML_TYPE_", head.upper())
    if plain != variant:
        params.imatrix = _importance(source.with_name(IMPORTANCE))
    beside = target.with_suffix(".part")
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(beside).encode(), ctypes.byref(params))
    if code != 0:
        raise SystemExit(f"llama.cpp could not quantize to {variant} (code {code})")
    beside.replace(target)
    return target
