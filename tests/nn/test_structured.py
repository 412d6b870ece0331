"""Structured modules inside PyTorch models: a tiny Llama whose weights are packed, tied head included."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gossamer import kernels
from gossamer.errors import MatrixError, ModelError
from gossamer.matrices import Dense, LowRank, Packed, Sparse, Sum, inference, pack
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module
from tiny import tiny_model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_model(model: Any, values: str, head_values: str, pattern: str | None = None) -> Any:
    """A copy of ``model`` with every linear, the embedding and the tied head packed."""
    model = copy.deepcopy(model)
    embedding = model.get_input_embeddings()
    tied = model.lm_head.weight is embedding.weight
    table = pack(embedding.weight, head_values)
    for name, module in list(model.named_modules()):
        if module is embedding:
            replace_module(model, name, StructuredEmbedding.from_embedding(embedding, table))
        elif module is model.lm_head:
            head = table if tied else pack(module.weight, head_values)
            replace_module(model, name, StructuredLinear(head, module.bias))
        elif isinstance(module, nn.Linear):
            leaf = Dense(module.weight) if pattern is None else Sparse.fit(module.weight, pattern=pattern)
            replace_module(model, name, StructuredLinear(pack(leaf, values), module.bias))
    return model


TOKENS = torch.tensor([[5, 17, 200, 3, 8, 250, 1, 33], [9, 9, 1, 77, 100, 0, 42, 6]])


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_float_packing_changes_no_logit(tied: bool) -> None:
    model = tiny_model("llama" if tied else "llama_untied")
    packed = packed_model(model, "float32", "float32")
    assert not any(isinstance(m, (nn.Linear, nn.Embedding)) for m in packed.modules())
    torch.testing.assert_close(packed(TOKENS).logits, model(TOKENS).logits, rtol=1e-4, atol=1e-4)
    shared = packed.get_input_embeddings().matrix is packed.lm_head.matrix
    assert shared == tied


@torch.no_grad()
def test_integer_packing_is_close_and_generates() -> None:
    model = tiny_model()
    packed = packed_model(model, "int8", "int8")
    wanted = model(TOKENS).logits
    relative = (packed(TOKENS).logits - wanted).norm() / wanted.norm()
    assert relative < 0.03
    coarse = (packed_model(model, "int4", "int8")(TOKENS).logits - wanted).norm() / wanted.norm()
    assert relative < coarse < 0.5
    made = packed.generate(TOKENS, max_new_tokens=4, do_sample=False)
    assert made.shape == (2, 12)


@torch.no_grad()
def test_sparse_packing_is_the_pruned_model() -> None:
    model = tiny_model()
    pruned = copy.deepcopy(model)
    for module in pruned.modules():
        if isinstance(module, nn.Linear) and module is not pruned.lm_head:
            module.weight.mul_(Sparse.fit(module.weight, pattern="32:64").mask)
    packed = packed_model(model, "float32", "float32", pattern="32:64")
    layouts = {m.matrix.layout for m in packed.modules() if isinstance(m, StructuredLinear)}
    assert layouts == {"32:64", "dense"}
    torch.testing.assert_close(packed(TOKENS).logits, pruned(TOKENS).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_state_dict_and_deepcopy_of_a_model() -> None:
    first, second = (packed_model(tiny_model(seed=seed), "int4", "int8") for seed in (0, 1))
    wanted = second(TOKENS).logits
    copied = copy.deepcopy(first)
    assert copied.get_input_embeddings().matrix is copied.lm_head.matrix
    assert torch.equal(copied(TOKENS).logits, first(TOKENS).logits)
    copied.load_state_dict(second.state_dict())
    assert torch.equal(copied(TOKENS).logits, wanted)
    assert not torch.equal(first(TOKENS).logits, wanted)


def sparse_layer(values: str, sparsity: float = 0.5) -> StructuredLinear:
    return StructuredLinear(pack(Sparse.fit(random(50, 70), sparsity=sparsity), values, "bitmap"))


@pytest.mark.parametrize(
    ("layer", "other"),
    [
        (sparse_layer("int8"), sparse_layer("float32")),
        (sparse_layer("float32"), sparse_layer("int8")),
        (sparse_layer("int4"), sparse_layer("int8")),
        (sparse_layer("int8"), sparse_layer("int8", 0.75)),
        (sparse_layer("int8"), StructuredLinear(pack(random(50, 70), "int8"))),
        (
            StructuredEmbedding(pack(random(50, 70), "int8")),
            StructuredEmbedding(pack(random(50, 70), "int4")),
        ),
    ],
)
def test_a_state_of_another_format_is_refused_as_such(layer: nn.Module, other: nn.Module) -> None:
    model, before = nn.Sequential(layer), copy.deepcopy(layer.state_dict())
    with pytest.raises(MatrixError, match=r"^0\.matrix is .* another format"):
        model.load_state_dict(nn.Sequential(other).state_dict())
    after = layer.state_dict()
    assert all(torch.equal(after[name], section) for name, section in before.items())  # nothing was loaded
    model.load_state_dict({}, strict=False)
    model.load_state_dict(nn.Sequential(copy.deepcopy(layer)).state_dict())


@torch.no_grad()
def test_bfloat16_model_keeps_its_dtype() -> None:
    model = tiny_model().bfloat16()
    packed = packed_model(model, "int8", "int8")
    assert packed(TOKENS).logits.dtype == torch.bfloat16
    cast = packed_model(tiny_model(), "int8", "int8").to(torch.bfloat16)
    scales = [m.scales for m in cast.modules() if isinstance(m, Packed)]
    assert all(s is not None and s.dtype == torch.float16 for s in scales)


@pytest.mark.parametrize("bias", [True, False])
def test_linear_with_any_matrix(bias: bool) -> None:
    linear = nn.Linear(20, 12, bias=bias)
    x = random(3, 5, 20)
    for matrix in (
        Dense(linear.weight),
        Sparse.fit(linear.weight.detach(), sparsity=0.0),
        LowRank.fit(linear.weight.detach(), rank=12),
        pack(linear.weight, "float32"),
    ):
        module = StructuredLinear(matrix, linear.bias)
        assert (module.in_features, module.out_features) == (20, 12)
        torch.testing.assert_close(module(x), linear(x), rtol=1e-4, atol=1e-5)
    assert module.bias is linear.bias
    assert f"in_features=20, out_features=12, bias={bias}" in repr(module)
    assert "dense, float32" in repr(module)


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
@torch.no_grad()
def test_a_packed_composite_is_one_product(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    run = inference.kernels.matmul
    monkeypatch.setattr(inference.kernels, "matmul", lambda w, x: made.append(w) or run(w, x))
    weight, bias = random(48, 64), random(48)
    tree = Sum(LowRank.fit(weight, rank=4), Sparse.fit(weight, sparsity=0.5))
    module = StructuredLinear(pack(tree, "float32"), bias)
    x = random(2, 3, 64)
    torch.testing.assert_close(module(x), tree(x) + bias)
    assert len(made) == 1


def test_linear_trains() -> None:
    module = StructuredLinear(Sparse.fit(random(6, 8), sparsity=0.5), torch.zeros(6))
    module(random(4, 8)).square().sum().backward()
    assert {name for name, p in module.named_parameters() if p.grad is not None} == {"matrix.values", "bias"}


def test_embedding_looks_up_rows() -> None:
    embedding = nn.Embedding(40, 24, padding_idx=3)
    for matrix in (Dense(embedding.weight), pack(embedding.weight, "float32")):
        module = StructuredEmbedding.from_embedding(embedding, matrix)
        assert torch.equal(module(TOKENS % 40), embedding(TOKENS % 40))
        assert (module.num_embeddings, module.embedding_dim, module.padding_idx) == (40, 24, 3)
    rounded = StructuredEmbedding(pack(embedding.weight, "int8"), dtype=torch.bfloat16)
    rows = rounded(TOKENS % 40)
    assert rows.dtype == torch.bfloat16
    torch.testing.assert_close(rows.float(), embedding(TOKENS % 40).detach(), rtol=0.05, atol=0.05)


def test_scaled_embeddings_keep_their_scale() -> None:
    model = tiny_model("gemma3")
    embedding = model.get_input_embeddings()
    module = StructuredEmbedding.from_embedding(embedding, pack(embedding.weight, "float32"))
    assert module.scale == 8.0  # the root of the width
    torch.testing.assert_close(module(TOKENS), embedding(TOKENS))
    scaled = StructuredEmbedding(Dense(random(256, 40).bfloat16()), dtype=torch.bfloat16, scale=40**0.5)
    rows = scaled.matrix.rows(TOKENS)
    assert torch.equal(scaled(TOKENS), rows * torch.tensor(40**0.5).bfloat16())  # as in transformers


def test_replace_module() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ModuleDict({"inner": nn.Linear(3, 4)}))
    new = nn.Linear(3, 4)
    old = replace_module(model, "1.inner", new)
    assert isinstance(old, nn.Linear)
    assert model[1]["inner"] is new
    replace_module(model, "0", new)
    assert model[0] is new
    for bad in ("", "2", "1.outer", "1.inner.weight", "x.y"):
        with pytest.raises(ModelError, match="has no module"):
            replace_module(model, bad, new)


def test_bad_input() -> None:
    with pytest.raises(MatrixError, match="bias of 5 outputs"):
        StructuredLinear(Dense(random(5, 4)), torch.zeros(4))
    with pytest.raises(MatrixError, match="cannot stand in for an embedding"):
        StructuredEmbedding.from_embedding(nn.Embedding(4, 5), Dense(random(5, 4)))
    with pytest.raises(MatrixError, match="max_norm"):
        StructuredEmbedding.from_embedding(nn.Embedding(4, 5, max_norm=1.0), Dense(random(4, 5)))
