"""The structure of speed measurements, and bytes counted by hand; never how long anything took."""

from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch

from gossamer.bench import Machine, Speed, SpeedComparison, compare_speed, decode_bytes, measure_speed
from gossamer.bench import machine as machine_module
from gossamer.bench import speed as speed_module
from gossamer.errors import EvaluationError
from gossamer.evaluate.layers import linear_layers
from gossamer.matrices import Packed
from gossamer.models.session import Session
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module
from gossamer.nn.experts import take_apart
from tiny import tiny_model

LINEAR = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)
EDGE = 384 * 64
NORMS = 7 * 64


@pytest.fixture(autouse=True)
def _memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_module, "read_bandwidth", lambda: 10e9)  # half a second, tested by itself


def facts(cache_bytes: int | None = 1000) -> Machine:
    return Machine("cpu", 2, 1, "portable", cache_bytes, 1 << 30, 0.0, "2", "3", 10.0)


def test_measure_returns_every_run_and_leaves_the_model_alone() -> None:
    model = tiny_model("llama").train()
    before = torch.get_num_threads()
    seen: list[tuple[str, int, int]] = []
    found = measure_speed(
        model, prompt=12, decode=3, repeats=2, threads=1, progress=lambda *args: seen.append(args)
    )
    assert (found.prompt, found.decode, found.threads) == (12, 3, 1)
    assert len(found.prompt_seconds) == len(found.decode_seconds) == 2
    assert all(s > 0 for s in (*found.prompt_seconds, *found.decode_seconds))
    assert torch.get_num_threads() == before
    assert model.training
    assert seen == [("bench", i, 3) for i in (1, 2, 3)]
    json.dumps(found.to_dict())


def test_medians_are_those_of_the_runs() -> None:
    speed = Speed(100, 10, 1, (2.0, 1.0, 50.0), (5.0, 20.0, 4.0), 3_000_000)
    assert speed.prompt_tokens_per_second == 50.0
    assert speed.decode_tokens_per_second == 2.0
    assert speed.first_token_seconds == 2.0
    assert speed.decode_gb_per_second == pytest.approx(0.006)


def test_ratios_are_paired_by_round() -> None:
    # the machine slows down tenfold after the first round; the second contender is twice as fast throughout
    base = Speed(10, 10, 1, (1.0, 10.0, 10.0), (1.0, 10.0, 10.0), 5000)
    fast = Speed(10, 10, 1, (0.5, 5.0, 5.0), (0.25, 2.5, 2.5), 4000)
    found = SpeedComparison({"dense": base, "sparse": fast}, facts())
    assert found.baseline == "dense"
    assert found.ratio("sparse", "prompt") == 2.0
    assert found.ratio("sparse") == 4.0
    assert found.ratio("dense") == 1.0
    assert found.past_cache("dense") is True
    assert found.past_cache("sparse") is False  # exactly four times is not past
    assert SpeedComparison({"dense": base}, facts(None)).past_cache("dense") is None
    data = json.loads(json.dumps(found.to_dict()))
    assert data["contenders"]["sparse"]["decode_ratio"] == 4.0
    assert data["machine"]["read_gb_per_second"] == 10.0


def test_contenders_alternate_in_a_shifting_order(monkeypatch: pytest.MonkeyPatch) -> None:
    models = {name: tiny_model("llama", seed) for seed, name in enumerate("abc")}
    names = {id(model): name for name, model in models.items()}
    order: list[tuple[str, int]] = []

    def spy(start: Callable[[], Session], ids: torch.Tensor, decode: int) -> tuple[float, float]:
        order.append((names[id(start().model)], decode))
        return 1.0, 1.0

    monkeypatch.setattr(speed_module, "_run", spy)
    found = compare_speed(models, prompt=4, decode=9, repeats=2, warmup=1)
    assert "".join(name for name, _ in order) == "abc" + "bca" + "cab"
    assert [steps for _, steps in order] == [8] * 3 + [9] * 6  # warm-up is short
    assert list(found.speeds) == ["a", "b", "c"]
    assert found.machine.threads == torch.get_num_threads()


def test_a_run_generates_greedily_from_the_given_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    tokens = torch.arange(3, 13)
    fed: list[list[int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: fed.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    found = measure_speed(model, tokens=tokens, decode=4, repeats=1, warmup=0)
    assert found.prompt == 10
    expected = model.generate(
        input_ids=tokens[None],
        attention_mask=torch.ones(1, 10),
        max_new_tokens=5,
        do_sample=False,
        eos_token_id=-1,
    )
    assert fed[0] == tokens.tolist()
    assert [step[0] for step in fed[1:5]] == expected[0, 10:14].tolist()


def test_decode_bytes_count_the_experts_of_a_token() -> None:
    model = tiny_model("mixtral")
    experts = sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)
    every = tiny_model("mixtral", num_experts_per_tok=4)
    assert decode_bytes(every) - decode_bytes(model) == experts // 2  # two of four
    apart = tiny_model("mixtral")
    take_apart(apart)
    assert decode_bytes(apart) == decode_bytes(model)


def test_decode_bytes_leave_out_embeddings_but_not_a_tied_head() -> None:
    model = tiny_model("llama")
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert decode_bytes(model) == 4 * (LINEAR + EDGE + NORMS) + buffers
    assert decode_bytes(tiny_model("llama_untied")) == 4 * (LINEAR + EDGE + NORMS) + buffers
    for name, layer in linear_layers(model).items():
        packed = Packed.pack(layer.weight.detach(), "int4", "dense")
        replace_module(model, name, StructuredLinear(packed, layer.bias))
    head = Packed.pack(model.lm_head.weight.detach(), "int8", "dense")
    replace_module(model, "lm_head", StructuredLinear(head))
    replace_module(
        model, "model.embed_tokens", StructuredEmbedding.from_embedding(model.model.embed_tokens, head)
    )
    assert decode_bytes(model) == LINEAR * 4.25 / 8 + EDGE * 8.25 / 8 + 4 * NORMS + buffers


def test_bad_input() -> None:
    model = tiny_model("llama", max_position_embeddings=20)
    with pytest.raises(EvaluationError, match="no model"):
        compare_speed({})
    for name in ("prompt", "decode", "repeats", "threads"):
        with pytest.raises(EvaluationError, match=f"{name} must be at least 1"):
            measure_speed(model, **{"prompt": 4, "decode": 4, name: 0})
    with pytest.raises(EvaluationError, match="warmup"):
        measure_speed(model, prompt=4, decode=4, warmup=-1)
    with pytest.raises(EvaluationError, match="20 positions"):
        measure_speed(model, prompt=17, decode=4)
    with pytest.raises(EvaluationError, match="int64"):
        measure_speed(model, tokens=torch.zeros(2, 2, dtype=torch.int64))


def test_ratio_of_equal_models_is_finite() -> None:
    model = tiny_model("llama")
    found = compare_speed({"one": model, "same": model}, prompt=4, decode=2, repeats=1, warmup=0)
    assert math.isfinite(found.ratio("same"))
    assert found.ratio("one") == 1.0


def test_experts_are_a_working_set_though_a_token_reads_few() -> None:
    found = measure_speed(tiny_model("mixtral"), prompt=2, decode=1, repeats=1, warmup=0)
    assert found.resident_bytes is not None
    assert found.resident_bytes > found.decode_bytes
    compared = compare_speed({"mixture": tiny_model("mixtral")}, prompt=2, decode=1, repeats=1, warmup=0)
    assert compared.working_set("mixture") == found.resident_bytes
