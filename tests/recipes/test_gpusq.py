"""GPUSQ-ViT: sparse and rounded at the end, nearer to the dense model than by rounding alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer.errors import CalibrationError, ModelError
from gossamer.nn.views import weight_views
from gossamer.recipes.gpusq import Mixed, gpusq, logits_of
from gossamer.sparse import parse_pattern
from gossamer.sparse.masks import check_mask
from gossamer.tune.modules import ModuleTuning


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers import ViTConfig, ViTForImageClassification

        torch.manual_seed(0)
        self.body = ViTForImageClassification(
            ViTConfig(
                image_size=8, patch_size=4, num_channels=1, hidden_size=32, num_hidden_layers=2,
                num_attention_heads=2, intermediate_size=64, num_labels=4, initializer_range=0.2,
            )
        ).eval()  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x).logits  # type: ignore[no-any-return]


def features(model: nn.Module) -> list[str]:
    """Its blocks, wherever this version of transformers keeps them."""
    kinds = [name for name, module in model.named_modules() if type(module).__name__ == "ViTLayer"]
    assert len(kinds) == 2
    return kinds


def batches(model: nn.Module, count: int = 6) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(count):
        x = torch.randn(16, 1, 8, 8, generator=generator)
        with torch.no_grad():
            found.append((x, model(x).argmax(1)))
    return found


def distance(model: nn.Module, dense: nn.Module) -> float:
    x = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((model(x) - dense(x)).norm() / dense(x).norm())


@pytest.mark.parametrize("labelled", [True, False])
def test_it_ends_sparse_and_rounded_and_nearer_than_by_rounding_alone(labelled: bool) -> None:
    model, dense, plain = Tiny(), Tiny(), Tiny()
    data = batches(dense)
    data = data if labelled else [(x, None) for x, _ in data]
    found = gpusq(
        model, data, features=features(model), values="int4", epochs=6, skip="projection|classifier"
    )
    sparse = gs.sparsify(plain, method="magnitude", pattern="2:4", skip="projection|classifier")
    ModuleTuning(plain, sparse.masks, values="int4").merge()
    assert distance(model, dense) < 0.8 * distance(plain, dense)
    for view in weight_views(model)[0]:
        if view.name in found.masks:
            check_mask(found.masks[view.name], parse_pattern("2:4"))
            assert torch.equal(found.masks[view.name], sparse.masks[view.name])
            assert not view.matrix()[~found.masks[view.name]].any()
            assert all(len(row.unique()) <= 16 for row in view.matrix())
    assert len(found.masks) == 12
    assert found.losses["sparse"][-1] < found.losses["sparse"][0]
    assert len(found.losses["quantized"]) == 6
    assert sum(found.shares.values()) == pytest.approx(2)
    assert len(set(found.shares.values())) == 2


def bert(kind: str = "BertModel", **settings: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        num_labels=6, initializer_range=0.2, **settings,
    )  # fmt: skip
    return getattr(transformers, kind)(config).eval()


def padded(count: int = 4, padding: int = 0) -> list[dict[str, Tensor]]:
    """Windows of six tokens of which the last one hides two, as a MiniLM takes them."""
    ids = torch.randint(1, 64, (count, 4, 6), generator=torch.Generator().manual_seed(1))
    mask = torch.ones(4, 6, dtype=torch.int64)
    mask[-1, 4:] = 0
    return [{"input_ids": x.where(mask == 1, padding), "attention_mask": mask} for x in ids]


@pytest.mark.parametrize("return_dict", [True, False])
@pytest.mark.parametrize(
    ("kind", "labels", "skip"),
    [
        ("BertModel", None, "pooler"),
        ("BertForSequenceClassification", (4,), "pooler|classifier"),
        ("BertForTokenClassification", (4, 6), "classifier"),
    ],
)
def test_batches_reach_encoders_as_they_do_in_sparsify(
    kind: str, labels: tuple[int, ...] | None, skip: str, return_dict: bool
) -> None:
    model = bert(kind, return_dict=return_dict)
    blocks = [name for name, module in model.named_modules() if type(module).__name__ == "BertLayer"]
    data: list[Any] = padded()
    if labels is not None:
        some = torch.randint(6, labels, generator=torch.Generator().manual_seed(2))
        data = [(batch, some) for batch in data]
    found = gpusq(model, data, features=blocks, values="int4", epochs=4, skip=skip)
    assert len(found.masks) == 12
    assert found.losses["sparse"][-1] < found.losses["sparse"][0]
    for view in weight_views(model)[0]:
        if view.name in found.masks:
            check_mask(found.masks[view.name], parse_pattern("2:4"))
            assert not view.matrix()[~found.masks[view.name]].any()


def test_features_of_several_tensors_are_their_first() -> None:
    runs = []
    for encoder in (True, False):  # what the encoder gives is what its last block does
        model = bert()
        blocks = [name for name, module in model.named_modules() if type(module).__name__ == "BertLayer"]
        names = ["encoder" if encoder else blocks[-1]]
        runs.append(gpusq(model, padded(2), features=names, epochs=1, skip="pooler").losses)
    assert runs[0] == runs[1]


def test_a_batch_by_itself_is_one_batch() -> None:
    x = batches(Tiny(), 1)[0][0]
    runs = [gpusq(Tiny(), given, epochs=1, skip="projection|classifier").losses for given in (x, [(x, None)])]
    assert runs[0] == runs[1]


def test_padding_counts_nowhere() -> None:
    runs = []
    for padding in (0, 33):
        model = bert("BertForTokenClassification")
        blocks = [name for name, module in model.named_modules() if type(module).__name__ == "BertLayer"]
        labels = torch.arange(24).remainder(6).reshape(4, 6)
        labels[-1, 4:] = padding % 6
        data = [(batch, labels) for batch in padded(2, padding)]
        runs.append(gpusq(model, data, features=blocks, epochs=1, skip="classifier"))
    assert runs[0].losses == runs[1].losses
    assert runs[0].shares == runs[1].shares


def test_six_classes_of_windows_of_six_tokens_are_no_tokens() -> None:
    model, data = bert("BertForSequenceClassification"), padded(1)
    found = gpusq(model, data, epochs=1, skip="pooler|classifier", loss=Mixed(features=0))
    sparse = gs.sparsify(
        other := bert("BertForSequenceClassification"), method="magnitude", pattern="2:4",
        skip="pooler|classifier",
    )  # fmt: skip
    assert sparse.masks.keys() == found.masks.keys()
    with torch.no_grad():
        taught, got = (m(**data[0]).logits for m in (bert("BertForSequenceClassification"), other))
    q, p = taught.softmax(-1), got.softmax(-1)
    want = 10 * (q * (q.log() - p.log())).sum(-1).mean()
    assert found.losses["sparse"][0] == pytest.approx(float(want), rel=1e-4)


def test_a_method_that_draws_has_its_seed() -> None:
    data = batches(Tiny(), 1)
    masks = [
        gpusq(Tiny(), data, method="random", epochs=1, skip="projection|classifier", seed=seed).masks
        for seed in (0, 1)
    ]
    assert any(not torch.equal(masks[0][name], masks[1][name]) for name in masks[0])


def test_the_loss_is_the_sum_of_its_three_parts() -> None:
    torch.manual_seed(0)
    logits, teacher, labels = torch.randn(3, 4), torch.randn(3, 4), torch.tensor([0, 1, 2])
    state, want = torch.randn(3, 5), torch.randn(3, 5)
    q, p = (teacher / 2).softmax(-1), (logits / 2).softmax(-1)
    kl = (q * (q.log() - p.log())).sum(-1).mean() * 4
    hard = -logits.log_softmax(-1)[torch.arange(3), labels].mean()
    feature = ((state - want) ** 2).mean() / (want**2).mean()
    mixed = Mixed(0.5, 2.0, 3.0, temperature=2.0)
    got = mixed.of(logits, labels, teacher, {"a": state}, {"a": want}, {"a": 1.0})
    torch.testing.assert_close(got, 0.5 * hard + 2 * kl + 3 * feature)
    torch.testing.assert_close(mixed.of(logits, None, teacher, {}, {}, {}), 2 * kl)


def test_bad_input_is_refused() -> None:
    model = Tiny()
    before = copy.deepcopy(model.state_dict())
    model.unused = nn.Identity()
    with pytest.raises(ModelError, match="unused gives no features: it is not called"):
        gpusq(model, batches(model, 1), features=["unused"], skip="projection|classifier")
    with pytest.raises(CalibrationError, match="name it by `logits`"):
        gpusq(model, batches(model, 1), logits=lambda out: logits_of({}), skip="projection|classifier")
    with pytest.raises(ModelError, match="no module 'nothing'"):
        gpusq(model, batches(model, 1), features=["nothing"])
    with pytest.raises(CalibrationError, match="there are none"):
        gpusq(model, [])
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    with pytest.raises(CalibrationError, match="not finite at step 0 of the stage sparse"):
        gpusq(model, [(torch.full((2, 1, 8, 8), torch.nan), None)], skip="projection|classifier")
    for batch in ([torch.ones(2, 1, 8, 8)], (torch.ones(2, 1, 8, 8), 1), "text"):
        with pytest.raises(CalibrationError, match="a pair of inputs and labels"):
            gpusq(model, [batch])
    with pytest.raises(CalibrationError, match="called with all that is in a batch"):
        gpusq(model, [{"pixels": torch.ones(2, 1, 8, 8)}], skip="projection|classifier")


@pytest.mark.parametrize("out", [None, {}, (), {"logits": 1}])
def test_a_model_that_gives_no_tensor_is_told(out: Any) -> None:
    with pytest.raises(CalibrationError, match="name it by `logits`"):
        logits_of(out)
