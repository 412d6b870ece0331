"""What a profile of the native decoder counts: bytes and operations by hand, and seconds that add up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gossamer as gs
from gossamer import kernels
from gossamer.bench import Machine, Part, Profile, profile, profiling
from gossamer.engine import Decoder
from gossamer.errors import EvaluationError
from gossamer.matrices import Packed, Sparse
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module
from gossamer.recipes.measure import profile as profile_of
from tiny import tiny_folder, tiny_model

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

FACTS = Machine("cpu", 2, 1, "portable", 1000, 1 << 30, 0.0, "2", "3", 10.0)
PARTS = ["attention_products", "attention", "mlp", "head", "rest"]


@pytest.fixture(autouse=True)
def _facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "machine_facts", lambda: FACTS)  # reading memory takes half a second


def sparse(model: Any) -> Any:
    """``model`` with all weights packed: linears 32:64 int4, the tied embedding dense int8."""
    rows = Packed.pack(model.model.embed_tokens.weight.detach(), "int8", "dense")
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear):
            matrix = rows
            if name != "lm_head":
                matrix = Packed.pack(Sparse.fit(layer.weight.detach(), pattern="32:64"), "int4")
            replace_module(model, name, StructuredLinear(matrix, layer.bias))
    embedding = StructuredEmbedding.from_embedding(model.model.embed_tokens, rows)
    replace_module(model, "model.embed_tokens", embedding)
    return model


def stored(model: Any, *names: str) -> int:
    """Bytes of the packed tensors of all layers of these names."""
    found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in names]
    return sum(tensor.nbytes for module in found for tensor in module.matrix.tensors().values())


def test_bytes_are_those_of_the_packed_tensors_and_of_the_cache() -> None:
    model = sparse(tiny_model("llama"))
    found = profile(Decoder(model), prompt=300, decode=5, repeats=1)
    assert list(found.parts) == PARTS
    read = {name: part.nbytes for name, part in found.parts.items()}
    assert read["attention_products"] == stored(model, "q_proj", "k_proj", "v_proj", "o_proj") > 0
    assert read["mlp"] == stored(model, "gate_proj", "up_proj", "down_proj") > 0
    assert read["head"] == stored(model, "lm_head") > 0
    # tokens 301 to 305 see 303 on average: 3 layers, 2 heads of 16 keys and values in bfloat16
    assert read["attention"] == 303 * 3 * 2 * 16 * 2 * 2
    assert read["rest"] == 0
    assert found.whole.nbytes == sum(read.values())


def test_plain_weights_count_as_the_decoder_holds_them() -> None:
    found = profile(Decoder(tiny_model("llama_untied")), prompt=4, decode=1, repeats=1)
    assert found.parts["head"].nbytes == 4 * 384 * 64
    assert found.parts["mlp"].nbytes == 4 * 3 * 3 * 64 * 128


def test_operations_are_those_of_the_prompt() -> None:
    found = profile(Decoder(tiny_model("llama")), prompt=10, decode=2, repeats=1)
    done = {name: part.operations for name, part in found.parts.items()}
    assert done["attention_products"] == 2 * 3 * (2 * 64 * 64 + 2 * 32 * 64)
    assert done["mlp"] == 2 * 3 * 3 * 64 * 128
    assert done["head"] == 2 * 384 * 64 / 10  # of the last token alone
    # a token sees 5.5 positions on average; 4 heads of 16, once for scores and once for values
    assert done["attention"] == pytest.approx(5.5 * 3 * 4 * 16 * 2 * 2)
    assert done["rest"] == 0


def test_layers_with_a_window_see_no_further() -> None:
    found = profile(Decoder(tiny_model("mistral")), prompt=20, decode=3, repeats=1)  # windows of 8
    assert found.parts["attention"].nbytes == 8 * 3 * 2 * 16 * 2 * 2
    assert found.parts["attention"].operations == pytest.approx((36 + 12 * 8) / 20 * 3 * 4 * 16 * 4)


def test_parts_add_up_to_the_whole_and_all_runs_are_kept() -> None:
    before = torch.get_num_threads()
    seen: list[tuple[str, int, int]] = []
    found = profile(
        Decoder(tiny_model("llama")),
        prompt=30,
        decode=4,
        repeats=2,
        threads=1,
        progress=lambda *args: seen.append(args),
    )
    assert seen == [("bench", i, 3) for i in (1, 2, 3)]
    assert torch.get_num_threads() == before
    for runs, count in (("token_seconds", 8), ("prompt_seconds", 2)):
        for turn, whole in enumerate(getattr(found.whole, runs)):
            parts = [getattr(part, runs)[turn] for part in found.parts.values()]
            assert all(seconds > 0 for seconds in parts)  # rest too: the decoder's own parts leave some
            assert sum(parts) == pytest.approx(whole)
        assert len(getattr(found.whole, runs)) == count


def test_a_prompt_of_many_tokens_is_told_by_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(clock))
    decoder = Decoder(tiny_model("llama"))
    logits = torch.zeros(384)
    monkeypatch.setattr(decoder, "append", lambda *_, timed: (logits, dict.fromkeys(PARTS, 0.125)))
    found = profile(decoder, prompt=10, decode=2, repeats=2)
    assert found.whole.token_seconds == (1.0,) * 4
    assert found.whole.prompt_seconds == pytest.approx((0.1,) * 2)
    assert found.parts["mlp"].token_seconds == (0.125,) * 4
    assert found.parts["rest"].token_seconds == (0.5,) * 4  # what the others leave, more than it says itself


def test_rates_are_those_of_medians() -> None:
    part = Part((2.0, 1.0, 50.0), 3e9, (0.5, 0.25, 4.0), 1e9)
    assert part.gb_per_second == pytest.approx(1.5)
    assert part.gop_per_second == pytest.approx(2.0)
    found = Profile(8, 3, {"mlp": part}, part, FACTS, 0.0)
    assert found.share_of_reading(part) == pytest.approx(0.15)
    unknown = replace(found, machine=replace(FACTS, read_gb_per_second=None))
    assert unknown.share_of_reading(part) is None
    told = json.loads(json.dumps(found.to_dict()))
    assert told["parts"]["mlp"] == told["whole"]
    assert told["whole"]["token_seconds"] == 2.0
    assert told["past_cache"] is True


def test_bad_input() -> None:
    decoder = Decoder(tiny_model("llama"))
    for name in ("prompt", "decode", "repeats", "threads"):
        with pytest.raises(EvaluationError, match=f"{name} must be at least 1"):
            profile(decoder, **{"prompt": 4, "decode": 4, name: 0})
    with pytest.raises(EvaluationError, match="512 positions"):
        profile(decoder, prompt=510, decode=4)


def test_a_model_that_looks_at_less_is_refused(tmp_path: Path) -> None:
    loaded = gs.load(tiny_folder(tmp_path / "m"), engine="native", attention="sink_window")
    with pytest.raises(EvaluationError, match="attention to everything"):
        profile_of(loaded, prompt=4, decode=2)
