"""The published protocol on the real model, against the figure that an independent script gave."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gossamer.evaluate import evaluate, size_of
from gossamer.models.skeleton import load_model


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_dense_perplexity_on_wikitext2(smollm2: Path, shared_data: Path) -> None:
    model, tokenizer = load_model(smollm2, torch.bfloat16)
    text = (shared_data / "text" / "wikitext2_raw_test.txt").read_text(encoding="utf-8")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    quality = evaluate(model, torch.tensor(ids[: 20 * 2048]).reshape(20, 2048))
    assert quality.tokens == 40_940
    assert quality.perplexity == pytest.approx(20.98, abs=0.03)  # bfloat16 differs by machine


def test_size_of_the_real_folder(smollm2: Path) -> None:
    found = size_of(smollm2)
    assert found.parameters == 134_515_008  # the model card's 135M, the tied head once
    assert found.linear_parameters == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536)
    assert found.sparsity < 0.01
