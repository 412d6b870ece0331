"""The walk: what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.calibrate import InputNorm, WorkFolder, gather, walk
from gossamer.errors import ModelError
from gossamer.models.skeleton import WeightFiles, skeleton
from tiny import tiny_folder, tiny_tokens

ZAMBA2: dict[str, Any] = {
    "model_type": "zamba2",
    "layers_block_type": ["mamba", "hybrid", "mamba"],
    "num_mem_blocks": 1,
    "mamba_d_state": 16,
    "mamba_ngroups": 1,
    "n_mamba_heads": 8,
    "chunk_size": 16,
    "adapter_rank": 8,
}


def test_blocks_that_read_the_text_beside_hidden_states_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared block of Zamba2 reads the embeddings too; those of one batch serve no other."""
    folder = tiny_folder(tmp_path / "model", **ZAMBA2)
    windows = tiny_tokens(windows=4, seqlen=16)
    model, files = skeleton(folder), WeightFiles(folder)

    def first(name: str, **options: Any) -> Any:
        work = WorkFolder(tmp_path / name, {})
        return next(walk(model, files, (InputNorm,), work, windows=windows, dtype=torch.float32, **options))

    first("whole")  # all windows are one batch, whose own arguments these are
    with pytest.raises(ModelError, match="original_hidden_states"):
        first("targets", targets=True)  # but they are tuned on one by one
    monkeypatch.setattr("gossamer.calibrate.stream.BATCH_TOKENS", 32)
    with pytest.raises(ModelError, match=r"depends on the text \(original_hidden_states\)"):
        first("batches")
    with pytest.raises(ModelError, match="original_hidden_states"):
        gather(model, files, WorkFolder(tmp_path / "gradients", {}), windows)
