"""Perplexity, KL and agreement against independent computations on whole logits in float64."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from gossamer.errors import EvaluationError
from gossamer.evaluate import Quality, compare, evaluate
from gossamer.evaluate.confidence import confidence
from gossamer.evaluate.logits import LogitReader
from tiny import VOCABULARY, tiny_model

WINDOWS = torch.randint(3, VOCABULARY, (5, 40), generator=torch.Generator().manual_seed(3))


def tiny_llama(seed: int = 0, **changes: int) -> nn.Module:
    """Weights large enough that predictions are far from uniform."""
    model: nn.Module = tiny_model("llama_untied", seed, initializer_range=0.4, **changes)
    return model


class Bigram(nn.Module):
    """A language model that is not of transformers: the logits of a token depend on the token before it."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.table[ids]


def test_perplexity_is_exp_of_transformers_own_loss() -> None:
    model = tiny_llama()
    quality = evaluate(model, WINDOWS)
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in WINDOWS]
    assert quality.nll == pytest.approx(losses, rel=1e-5)
    assert quality.perplexity == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert quality.tokens == 5 * 39
    assert quality.kl is None
    assert quality.reference_perplexity is None


def test_kl_and_agreement_equal_float64_kl_div_on_whole_logits() -> None:
    dense, other = tiny_llama(0), tiny_llama(1)
    quality = evaluate(other, WINDOWS, reference=dense)
    with torch.no_grad():
        p = dense(WINDOWS).logits[:, :-1].double().log_softmax(-1)
        q = other(WINDOWS).logits[:, :-1].double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1).mean(-1)
    assert quality.kl == pytest.approx(kl.tolist(), rel=1e-4)
    assert quality.mean_kl == pytest.approx(kl.mean().item(), rel=1e-4)
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean(-1)
    assert quality.agreement == pytest.approx(agreement.tolist())
    reference = evaluate(dense, WINDOWS)
    assert quality.reference_nll == reference.nll
    assert quality.perplexity_ratio == pytest.approx(quality.perplexity / reference.perplexity)


def test_predictions_from_a_position_on_are_those_of_whole_windows() -> None:
    dense, other = tiny_llama(0), tiny_llama(1)
    quality = evaluate(other, WINDOWS, reference=dense, first=25, chunk=8)
    with torch.no_grad():
        p = dense(WINDOWS).logits[:, 25:-1].double().log_softmax(-1)
        q = other(WINDOWS).logits[:, 25:-1].double().log_softmax(-1)
    nll = -q.gather(-1, WINDOWS[:, 26:, None])[..., 0].mean(-1)
    kl = (p.exp() * (p - q)).sum(-1).mean(-1)
    assert quality.nll == pytest.approx(nll.tolist(), rel=1e-5)
    assert quality.kl == pytest.approx(kl.tolist(), rel=1e-4)
    assert (quality.tokens, quality.first, len(quality.nll)) == (5 * 14, 25, 5)
    assert evaluate(other, WINDOWS, first=38).tokens == 5
    for nothing in (39, -1):
        with pytest.raises(EvaluationError, match="nothing to measure"):
            evaluate(other, WINDOWS, first=nothing)


def test_known_values_of_a_bigram_table() -> None:
    uniform = Bigram(torch.zeros(4, 4))
    skewed = Bigram(torch.tensor([0.5, 0.25, 0.125, 0.125]).log().repeat(4, 1))
    ids = torch.tensor([[3, 0, 1, 2, 0]])
    quality = evaluate(skewed, ids, reference=uniform)
    bits = [1, 2, 3, 1]  # of the predicted tokens 0, 1, 2, 0
    assert quality.nll[0] == pytest.approx(math.log(2) * sum(bits) / 4, rel=1e-6)
    assert quality.reference_perplexity == pytest.approx(4.0, rel=1e-6)
    assert quality.mean_kl == pytest.approx(
        math.log(2) * (9 / 4 - 2), rel=1e-5
    )  # mean of 1, 2, 3, 3 bits less 2
    assert quality.top1_agreement == 1.0


@pytest.mark.parametrize("chunk", [1, 7, 39, 1000])
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_result_does_not_depend_on_chunk_or_batch(chunk: int, batch: int) -> None:
    dense, other = tiny_llama(0), tiny_llama(1)
    whole = evaluate(other, WINDOWS, reference=dense, chunk=39)
    parts = evaluate(other, WINDOWS, reference=dense, chunk=chunk, batch=batch)
    assert parts.nll == pytest.approx(whole.nll, rel=1e-5)
    assert parts.kl == pytest.approx(whole.kl, rel=1e-4)
    assert parts.agreement == whole.agreement


def test_each_window_starts_anew() -> None:
    model = tiny_llama()
    together = evaluate(model, WINDOWS)
    alone = [evaluate(model, w[None]).nll[0] for w in WINDOWS]
    assert list(together.nll) == alone


def test_logits_capped_after_the_head_are_read_whole() -> None:
    model = tiny_model("gemma2", final_logit_softcapping=2.0, initializer_range=0.4)
    reader = LogitReader(model)
    with torch.inference_mode():
        rows = reader(WINDOWS)
        assert not reader.chunked
        assert torch.equal(rows(3, 9), model(WINDOWS, use_cache=False).logits[:, 3:9])
    with torch.no_grad():
        losses = [model(input_ids=w[None], labels=w[None]).loss.item() for w in WINDOWS]
    assert evaluate(model, WINDOWS).nll == pytest.approx(losses, rel=1e-5)


def test_plain_head_is_applied_apart_from_the_body() -> None:
    model = tiny_llama()
    reader = LogitReader(model)
    with torch.inference_mode():
        reader(WINDOWS)
    assert reader.chunked


def test_compare_equals_separate_runs_and_runs_the_reference_once() -> None:
    dense, a, b = tiny_llama(0), tiny_llama(1), tiny_llama(2)
    calls = []
    dense.model.register_forward_hook(lambda *_: calls.append(1))
    found = compare({"a": a, "dense": dense, "b": b}, WINDOWS, reference=dense)
    assert len(calls) <= len(WINDOWS) + 2  # a pass per window, and the two of the probe
    assert found["a"] == evaluate(a, WINDOWS, reference=dense)
    assert found["b"] == evaluate(b, WINDOWS, reference=dense)
    assert found["dense"].kl == (0.0,) * 5
    assert found["dense"].agreement == (1.0,) * 5
    assert found["dense"].perplexity_ratio == 1.0


def test_a_reader_that_remembers_reads_each_window_once() -> None:
    dense, other = tiny_llama(0), tiny_llama(1)
    runs = []
    dense.base_model.register_forward_hook(lambda *_: runs.append(1))
    reader = LogitReader(dense, remember=True)
    first = evaluate(other, WINDOWS, reference=reader)
    before = len(runs)
    again = evaluate(other, WINDOWS, reference=reader)
    assert len(runs) == before >= len(WINDOWS)
    assert first == again == evaluate(other, WINDOWS, reference=dense)


def test_model_is_left_as_it_was_and_progress_is_told() -> None:
    model = tiny_llama().train()
    model.lm_head.eval()
    seen: list[tuple[str, int, int]] = []
    quality = evaluate(model, WINDOWS, batch=2, progress=lambda *args: seen.append(args))
    assert model.training
    assert not model.lm_head.training
    assert [done for _, done, _ in seen] == [2, 4, 5]
    assert {total for _, _, total in seen} == {5}
    assert quality == evaluate(model.eval(), WINDOWS, batch=2)  # measured without dropout


def test_to_dict_is_json_with_intervals() -> None:
    quality = evaluate(tiny_llama(1), WINDOWS, reference=tiny_llama(0))
    data = json.loads(json.dumps(quality.to_dict()))
    assert data["tokens"] == 195
    assert set(data["intervals"]) == {"perplexity", "perplexity_ratio", "kl", "agreement"}
    assert data["intervals"]["kl"]["low"] <= data["kl"] <= data["intervals"]["kl"]["high"]
    assert len(data["per_window"]["nll"]) == 5
    assert Quality(2, (1.0,)).to_dict()["intervals"] == {}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[5] = value
    with pytest.raises(EvaluationError, match="NaN or infinite"):
        evaluate(model, WINDOWS)
    broken = tiny_llama()
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0] = value
    with pytest.raises(EvaluationError, match="broken gives logits"):
        compare({"fine": tiny_llama(), "broken": broken}, WINDOWS)


def test_bad_windows_are_refused() -> None:
    model = tiny_llama()
    for windows in (
        torch.zeros(0, 8, dtype=torch.long),
        torch.zeros(8, dtype=torch.long),
        torch.zeros(2, 1, dtype=torch.long),
    ):
        with pytest.raises(EvaluationError, match="shape"):
            evaluate(model, windows)
    with pytest.raises(EvaluationError, match="integer"):
        evaluate(model, torch.zeros(2, 8))
    with pytest.raises(EvaluationError, match="negative"):
        evaluate(model, torch.full((1, 8), -1))
    with pytest.raises(EvaluationError, match=r"token 384.*ends at 383"):
        evaluate(model, torch.full((1, 8), VOCABULARY))
    with pytest.raises(EvaluationError, match="at least 1"):
        evaluate(model, WINDOWS, chunk=0)
    with pytest.raises(EvaluationError, match="same tokens"):
        evaluate(model, WINDOWS, reference=tiny_llama(vocab_size=401))


def test_a_model_that_gives_no_logits_is_refused() -> None:
    with pytest.raises(EvaluationError, match="logits of shape"):
        evaluate(tiny_llama().model, WINDOWS)


def test_a_hopeless_loss_gives_infinite_perplexity_not_an_overflow() -> None:
    assert Quality(2, (1000.0,)).perplexity == math.inf


def test_the_calibration_error_is_that_of_the_whole_text() -> None:
    dense, other = tiny_llama(0), tiny_llama(1)
    quality = evaluate(other, WINDOWS, reference=dense, chunk=7)
    assert quality.calibration_error == pytest.approx(confidence(other, WINDOWS).calibration_error)
    assert quality.reference_calibration_error == pytest.approx(confidence(dense, WINDOWS).calibration_error)
    assert quality.to_dict()["calibration_error"] == quality.calibration_error
    alone = evaluate(dense, WINDOWS)
    assert alone.calibration_error == pytest.approx(quality.reference_calibration_error)
    assert alone.reference_calibration_error is None
