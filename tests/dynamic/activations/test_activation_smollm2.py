"""Activation sparsity on the real model: what a quarter of the inputs is worth."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.dynamic.activations import calibrate, method
from gossamer.evaluate import evaluate
from gossamer.models.skeleton import load_model


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_quarter_of_the_inputs_costs_little(smollm2: Path, shared_data: Path) -> None:
    model, tokenizer = load_model(smollm2, torch.float32)

    def windows(file: str, count: int, seqlen: int) -> torch.Tensor:
        text = (shared_data / "text" / file).read_text(encoding="utf-8")
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(ids[: count * seqlen]).reshape(count, seqlen)

    calibration = windows("wikitext2_raw_train_part.txt", 4, 512)
    measured = windows("wikitext2_raw_test.txt", 2, 1024)
    dense = evaluate(model, measured).perplexity
    for name in ("teal", "wina"):
        with calibrate(model, method(name), calibration).gates(0.25).attach(model) as attached:
            sparse = evaluate(model, measured).perplexity
        shares = attached.achieved()
        assert len(shares) == 30 * 7
        assert sum(shares.values()) / len(shares) == pytest.approx(0.25, abs=0.02)
        assert 1.0005 * dense < sparse < 1.05 * dense, name
