"""Blocks found, fed and run one by one give what the model's own forward gives, for many architectures."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.errors import ModelError
from gossamer.models.walk import (
    capture_block_inputs,
    find_parts,
    finish,
    head_inputs,
    prunable,
    run_block,
    set_weight,
    weight_of,
)
from tiny import ARCHITECTURES, tiny_model, tiny_tokens


def logits_by_blocks(model: Any, ids: torch.Tensor, batch: int) -> torch.Tensor:
    parts = find_parts(model)
    inputs = capture_block_inputs(model, ids, batch=batch)
    hidden = inputs.hidden
    with torch.no_grad():
        for block, kwargs in zip(parts.blocks, inputs.kwargs, strict=True):
            hidden = torch.cat([run_block(block, part, kwargs) for part in hidden.split(batch)])
    return finish(model, hidden)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_blocks_one_by_one_give_the_models_logits(arch: str) -> None:
    model, ids = tiny_model(arch), tiny_tokens(windows=2, seqlen=24)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    assert torch.equal(logits_by_blocks(model, ids, batch=2), expected)


@pytest.mark.parametrize("arch", sorted(set(ARCHITECTURES) - {"bloom"}))
def test_keyword_arguments_of_one_window_serve_a_batch(arch: str) -> None:
    model, ids = tiny_model(arch), tiny_tokens(windows=3, seqlen=24)
    kwargs = capture_block_inputs(model, ids[:1]).kwargs
    hidden = capture_block_inputs(model, ids, batch=3).hidden
    with torch.no_grad():
        for block, given in zip(find_parts(model).blocks, kwargs, strict=True):
            hidden = run_block(block, hidden, given)
        expected = model(input_ids=ids).logits
    torch.testing.assert_close(finish(model, hidden), expected)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_what_the_head_reads_is_what_the_model_gives_it(arch: str) -> None:
    model, ids = tiny_model(arch), tiny_tokens(windows=2, seqlen=24)
    parts, seen = find_parts(model), list[torch.Tensor]()
    assert parts.head is not None
    handle = model.get_submodule(parts.head).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        hidden = capture_block_inputs(model, ids, batch=2)
        states = hidden.hidden
        for block, kwargs in zip(parts.blocks, hidden.kwargs, strict=True):
            states = run_block(block, states, kwargs)
        model(input_ids=ids)
    handle.remove()
    assert torch.equal(head_inputs(model, states), seen[0])


def test_a_head_that_is_no_module_at_work_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    hidden = capture_block_inputs(model, tiny_tokens()).hidden

    def product(*args: Any, **kwargs: Any) -> Any:
        return SimpleNamespace(logits=model.model(*args, **kwargs).last_hidden_state @ model.lm_head.weight.T)

    monkeypatch.setattr(model, "forward", product)
    with pytest.raises(ModelError, match="its head does not run as a module"):
        head_inputs(model, hidden)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gpt_neox", "opt", "gemma2"])
def test_one_block_is_enough(arch: str) -> None:
    depth = {"n_layer": 1} if arch == "gpt2" else {"num_hidden_layers": 1}
    model, ids = tiny_model(arch, **depth), tiny_tokens()
    with torch.no_grad():
        assert torch.equal(logits_by_blocks(model, ids, batch=2), model(input_ids=ids).logits)


def test_each_block_gets_its_own_mask_where_windows_slide() -> None:
    """Gemma 3 alternates local and global attention: 8 positions back, or all of 24."""
    model = tiny_model("gemma3")
    kwargs = capture_block_inputs(model, tiny_tokens(seqlen=24)).kwargs
    masks = [given["attention_mask"] for given in kwargs]
    assert masks[1] is None or masks[1][0, 0, 23].sum() == 24
    for local in (masks[0], masks[2]):
        assert local[0, 0, 23].tolist() == [False] * 16 + [True] * 8
    angles = [given["position_embeddings"][0] for given in kwargs]
    assert not torch.equal(angles[0], angles[1])


PARTS = {
    "llama": ("model.layers", ("model.embed_tokens",), True, ("model.norm",), ("model.rotary_emb",)),
    "llama_untied": ("model.layers", ("model.embed_tokens",), False, ("model.norm",), ("model.rotary_emb",)),
    "gpt2": ("transformer.h", ("transformer.wte", "transformer.wpe"), True, ("transformer.ln_f",), ()),
    "opt": (
        "model.decoder.layers",
        ("model.decoder.embed_tokens", "model.decoder.embed_positions"),
        True,
        ("model.decoder.final_layer_norm",),
        ("model.decoder.project_out", "model.decoder.project_in"),
    ),
    "mixtral": ("model.layers", ("model.embed_tokens",), False, ("model.norm",), ("model.rotary_emb",)),
}


@pytest.mark.parametrize("arch", PARTS)
def test_parts_are_told_apart(arch: str) -> None:
    parts = find_parts(tiny_model(arch))
    blocks, embeddings, tied, norms, others = PARTS[arch]
    assert parts.blocks_name == blocks
    assert [block.name for block in parts.blocks] == [f"{blocks}.{i}" for i in range(3)]
    assert (parts.embeddings, parts.tied, parts.norms, parts.others) == (embeddings, tied, norms, others)
    assert parts.head == "lm_head"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_parameter_belongs_to_one_part(arch: str) -> None:
    model = tiny_model(arch)
    parts = find_parts(model)
    owners = [block.name for block in parts.blocks]
    owners += [*parts.embeddings, *parts.norms, *parts.others]
    owners += [parts.head] if parts.head and not parts.tied else []
    found = [id(p) for name in owners for p in model.get_submodule(name).parameters()]
    assert sorted(found) == sorted(id(p) for p in model.parameters())


PRUNABLE = {
    "llama": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"}
    | {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"},
    "gpt2": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    "mixtral": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"},
    "phi3": {"self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"},
}


@pytest.mark.parametrize("arch", PRUNABLE)
def test_prunable_layers(arch: str) -> None:
    assert set(prunable(find_parts(tiny_model(arch)).blocks[0])) == PRUNABLE[arch]


# by family: Mixtral's, Qwen's, Longcat's and Switch's, Gemma 4's, HunYuan's, JetMoE's and Zaya's
@pytest.mark.parametrize(
    "router",
    [
        "mlp.gate",
        "mlp.shared_expert_gate",
        "mlp.router.classifier",
        "router.proj",
        "mlp.gate.wg",
        "self_attention.experts.router.layer",
        "mlp.gate.router_mlp.fc1",
    ],
)
def test_routers_are_never_prunable(router: str) -> None:
    block = nn.Module()
    kept = ["mlp.gate_proj", "mlp.gate_up_proj", "self_attn.output_gate", "mlp.experts.0.up_proj"]
    for name in [router, *kept]:
        at = block
        *path, last = name.split(".")
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at.get_submodule(part)
        at.add_module(last, nn.Linear(8, 8))
    assert set(prunable(block)) == set(kept)


def test_conv1d_is_read_and_written_as_out_by_in() -> None:
    layer = prunable(find_parts(tiny_model("gpt2")).blocks[0])["attn.c_attn"]
    x = torch.randn(5, 64)
    assert weight_of(layer).shape == (192, 64)
    torch.testing.assert_close(nn.functional.linear(x, weight_of(layer), layer.bias), layer(x))
    new = torch.randn(192, 64)
    set_weight(layer, new)
    torch.testing.assert_close(layer(x), x @ new.T + layer.bias)
    with pytest.raises(ModelError, match=r"\(64, 192\)"):
        set_weight(layer, new.T)


def test_blocks_without_linear_layers_are_refused() -> None:
    with pytest.raises(ModelError, match="no linear layer"):
        prunable(nn.LayerNorm(4))


def test_unknown_architectures_are_refused() -> None:
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.raises(ModelError, match=r"Sequential cannot be walked.*no list"):
        find_parts(plain)
    mixed = nn.Module()
    mixed.layers = nn.ModuleList([nn.Linear(4, 4), nn.Identity()])
    with pytest.raises(ModelError, match="several classes"):
        find_parts(mixed)
    small = nn.Module()
    small.layers = nn.ModuleList([nn.Linear(4, 4)])
    small.rest = nn.Linear(100, 100)
    with pytest.raises(ModelError, match="less than half"):
        find_parts(small)


def test_blocks_are_back_in_place_after_an_error() -> None:
    model = tiny_model("llama")
    before = list(model.model.layers)
    model.model.embed_tokens.to("meta")
    with pytest.raises(ModelError, match="cannot be walked"):
        capture_block_inputs(model, tiny_tokens())
    assert all(a is b for a, b in zip(before, model.model.layers, strict=True))
    assert not any("Stub" in type(module).__name__ for module in model.modules())


class Toy(nn.Module):
    """A decoder by hand; ``between`` is what it does to hidden states after each block."""

    def __init__(self, between: Any, order: tuple[int, ...] = (0, 1)) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.between, self.order = between, order

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        hidden = self.embed(input_ids)
        for i in self.order:
            hidden = self.between(self.layers[i](hidden))
        return SimpleNamespace(logits=hidden)


def test_models_that_are_more_than_their_blocks_are_refused() -> None:
    ids = torch.tensor([[1, 2, 3]])
    assert len(capture_block_inputs(Toy(lambda x: x), ids).kwargs) == 2
    with pytest.raises(ModelError, match="between blocks"):
        capture_block_inputs(Toy(lambda x: x + 1), ids)
    with pytest.raises(ModelError, match="once each, in order"):
        capture_block_inputs(Toy(lambda x: x, order=(1, 0)), ids)
    with pytest.raises(ModelError, match="only 1 of its 2 blocks"):
        capture_block_inputs(Toy(lambda x: x, order=(0,)), ids)


def test_a_model_whose_blocks_see_the_text_itself_is_refused() -> None:
    model = tiny_model("llama")
    inner = model.model.rotary_emb.forward

    def angles(hidden: torch.Tensor, **kwargs: Any) -> Any:
        cos, sin = inner(hidden, **kwargs)
        return cos + hidden.mean(), sin

    model.model.rotary_emb.forward = angles
    with pytest.raises(ModelError, match="depends on the text"):
        capture_block_inputs(model, tiny_tokens(windows=2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotary_angles_are_right_at_lowered_precision(dtype: torch.dtype) -> None:
    """At position 4,095 an angle computed in bfloat16 would be off by whole radians."""
    model = tiny_model("llama", max_position_embeddings=4096).to(dtype)
    model.model.rotary_emb.float()
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.original_inv_freq = torch.tensor(
        [10000 ** (-2 * i / 16) for i in range(8)]
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        kwargs = capture_block_inputs(model, tiny_tokens(windows=1, seqlen=4096)).kwargs
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    cos = kwargs[0]["position_embeddings"][0].double()[0, 4095, :8]
    expected = [math.cos(4095 * 10000 ** (-2 * i / 16)) for i in range(8)]
    tolerance = 5e-4 if dtype == torch.float32 else 4e-3
    torch.testing.assert_close(cos, torch.tensor(expected, dtype=torch.float64), atol=tolerance, rtol=0)


def test_windows_must_be_a_table_of_tokens() -> None:
    with pytest.raises(ModelError, match="token ids"):
        capture_block_inputs(tiny_model("llama"), torch.zeros(5, dtype=torch.int64))


def test_a_sequence_may_be_finished_in_pieces() -> None:
    model = tiny_model("gemma2")
    hidden = torch.randn(1, 24, 64)
    whole = finish(model, hidden)
    pieces = torch.cat([finish(model, hidden[:, :10]), finish(model, hidden[:, 10:])], dim=1)
    torch.testing.assert_close(pieces, whole)
