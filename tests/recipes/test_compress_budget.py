"""Budgets of bytes and time: what layers cost, by what is packed and by times that the tests make up."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch

from gossamer.bench.token_times import TokenTimes
from gossamer.errors import GossamerError, MethodError, ResumeError
from gossamer.matrices import Packed
from gossamer.models import load_checkpoint
from gossamer.prune import check_combination
from gossamer.recipes import compress_budget
from gossamer.recipes.compress import compress
from gossamer.recipes.compress_budget import TIMED, find_prices
from gossamer.recipes.describe import describe_checkpoint
from gossamer.sparse import mask_from_scores
from gossamer.sparse.allocate import LayerInfo, least_error_formats
from gossamer.sparse.budget import parse_budget
from tiny import tiny_folder

TEXT = "".join(topics.values())[:20_000]
SMALL: dict[str, Any] = {
    "windows": 4, "seqlen": 48, "calibration": [TEXT], "method": "wanda", "allocation": "sensitivity",
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("values", ["int4", "int3", "int8", "bfloat16"])
@pytest.mark.parametrize(
    ("pattern", "sparsity"),
    [
        ("unstructured:row", 0.3),
        ("unstructured:columns:128", 0.6),
        ("2:4", 0.5),
        ("3:5", 0.4),
        ("16x4", 0.7),
        ("4x4", 0.5),
    ],
)
@pytest.mark.parametrize("shape", [(96, 192), (50, 100), (50, 64), (16, 40)])
def test_layers_take_no_more_bytes_than_their_price(
    values: str, pattern: str, sparsity: float, shape: tuple[int, int]
) -> None:
    own = None if ":" in pattern and pattern[0].isdigit() else sparsity
    c = check_combination("wanda", pattern=pattern, sparsity=own, values=values)
    price = compress_budget._bytes_of(shape, c)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    mask = mask_from_scores(weight.abs(), c.pattern, c.sparsity)
    packed = Packed.pack(weight, c.values.name, mask=mask).nbytes
    padded = -(-shape[0] // 16) * 16 / shape[0]
    assert packed <= price(sparsity) <= 1.1 * padded * packed + 300
    assert price(0.0) == Packed.pack(weight, c.values.name).nbytes
    prices = [price(share / 50) for share in range(50)]
    assert prices == sorted(prices, reverse=True)


@pytest.mark.parametrize(
    ("budget", "settings"),
    [
        ("80kB", {}),
        ("64.5 kB", {"method": "obs", "group": 32}),
        ("90KB", {"pattern": "2:4"}),
        ("70kB", {"pattern": "16x4", "method": "magnitude"}),
        ("200kB", {"values": "bfloat16"}),
    ],
)
def test_the_weight_file_keeps_its_budget(
    budget: str, settings: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    done = compress(source, tmp_path / "out", budget=budget, **{**SMALL, **settings})
    found, told = describe_checkpoint(done.path), done.made["budget"]
    amount = parse_budget(budget).amount
    assert found.weight_file_bytes <= told["expected"] <= amount
    assert found.weight_file_bytes > 0.9 * amount  # headers and panels of so small a model
    assert (told["asked"], told["measure"]) == (budget, "bytes")
    assert told["least"] <= amount <= told["most"]
    assert found.sparsity_requested is None
    shares = {layer["sparsity_requested"] for layer in done.made["layers"]}
    assert shares == {0.0, 0.5} if settings.get("pattern") == "2:4" else len(shares) > 2
    load_checkpoint(done.path)


def test_the_split_costs_less_error_than_its_uniform_rival(source: Path, tmp_path: Path) -> None:
    """By the curves themselves: at the bytes of a uniform run, no more of the loss is given up."""
    from gossamer.recipes import compress_shares

    seen: dict[str, LayerInfo] = {}
    real = compress_shares.least_error

    def spy(layers: Sequence[LayerInfo], budget: float) -> dict[str, float | None]:
        seen.update({layer.name: layer for layer in layers})
        return real(layers, budget)

    uniform = compress(source, tmp_path / "a", sparsity=0.6, **{**SMALL, "allocation": "uniform"})
    size = describe_checkpoint(uniform.path).weight_file_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_shares, "least_error", spy)
        done = compress(source, tmp_path / "b", budget=f"{size}B", **SMALL)

    def error(shares: Mapping[str, float]) -> float:
        curves = {name: [(0.0, 0.0), *layer.curve] for name, layer in seen.items()}
        return sum(_between(curves[name], shares[name]) for name in curves)

    split = {layer["name"]: layer["sparsity_requested"] for layer in done.made["layers"]}
    assert error(split) < error(dict.fromkeys(split, 0.6))


MIXED = {"method": "obs", "values": "nl4,nl3", "head_values": "nl4"}


def test_a_budget_gives_each_layer_a_format(source: Path, tmp_path: Path) -> None:
    done = compress(source, tmp_path / "out", budget="72kB", **{**SMALL, **MIXED})
    found, told = describe_checkpoint(done.path), done.made["budget"]
    assert 0.9 * 72_000 < found.weight_file_bytes <= told["expected"] <= 72_000
    assert told["least"] <= 72_000 <= told["most"]
    assert {layer["values"] for layer in done.made["layers"]} == {"nl4", "nl3"}
    assert {layer["layout"] for layer in done.made["layers"]} == {"dense"}
    assert (found.sparsity_requested, done.made["sparsity"]) == (None, 0.0)
    assert torch.isfinite(load_checkpoint(done.path)(torch.tensor([[1, 2, 3]])).logits).all()

    def bytes_of(values: str) -> int:
        whole = {**SMALL, **MIXED, "values": values, "sparsity": 0.0, "allocation": "uniform"}
        return describe_checkpoint(compress(source, tmp_path / values, **whole).path).weight_file_bytes

    assert bytes_of("nl3") == pytest.approx(told["least"], abs=200)  # of the header
    assert bytes_of("nl4") == pytest.approx(told["most"], abs=200)
    top = compress(source, tmp_path / "top", budget=f"{told['most']:.0f}B", **{**SMALL, **MIXED})
    assert {layer["values"] for layer in top.made["layers"]} == {"nl4"}


@pytest.mark.parametrize("settings", [MIXED, {"values": "int4", "method": "obs"}, {"pattern": "2:4"}])
def test_bits_are_those_of_the_linears(settings: dict[str, Any], source: Path, tmp_path: Path) -> None:
    done = compress(source, tmp_path / "out", budget="3.8 bits", **{**SMALL, **settings})
    found, told = describe_checkpoint(done.path), done.made["budget"]
    assert told["measure"] == "bits"
    assert 3.4 < found.linear_bits <= told["expected"] + 1e-9 <= 3.8 + 2e-9
    assert told["least"] < 3.8 < told["most"] == pytest.approx(4.25)
    whole = compress(source, tmp_path / "whole", budget="4.25bits", **{**SMALL, **settings})
    assert describe_checkpoint(whole.path).linear_bits == pytest.approx(4.25)
    with pytest.raises(MethodError, match=r"9bits asks for no .*: a weight in the linears takes 4.25 bits"):
        compress(source, tmp_path / "more", budget="9bits", **{**SMALL, **settings})


@pytest.mark.parametrize(
    "shapes", [[(576, 576), (192, 576), (1536, 576)], [(960, 960), (320, 960), (64, 2560)]]
)
@pytest.mark.parametrize(("values", "group"), [("nl4,nl3", 32), ("int8,nl4", 64), ("nl4,nl3", 64)])
def test_budgets_at_the_very_ends(
    shapes: list[tuple[int, int]], values: str, group: int, tmp_path: Path
) -> None:
    layers = [LayerInfo(f"{i}", shape) for i, shape in enumerate(shapes * 30)]

    def prices(budget: str) -> compress_budget.Prices:
        c = check_combination("obs", allocation_name="sensitivity", values=values, group=group, budget=budget)
        assert c.budget is not None
        return find_prices(c.budget, c, layers, {}, tmp_path, lambda *told: None)

    more = 16 / group  # of a scale
    for name in values.split(","):
        bits = {"nl3": 3, "nl4": 4, "int8": 8}[name] + more
        found = prices(f"{bits}bits")
        split = least_error_formats([_with(found, layer, values) for layer in layers], found.left)
        assert set(split.values()) == {name}


def _with(prices: compress_budget.Prices, layer: LayerInfo, values: str) -> LayerInfo:
    formats = tuple((name, float(index)) for index, name in enumerate(values.split(",")))
    return replace(layer, formats=formats, costs=partial(prices.cost, layer))


def test_formats_are_tuned_and_resumed(source: Path, tmp_path: Path) -> None:
    settings = {**SMALL, **MIXED, "budget": "72kB", "tune": "blockwise", "tune_options": {"epochs": 1}}
    compress(source, tmp_path / "whole", **settings)

    def stop(stage: str, done: int, total: int) -> None:
        if stage == "pruning and tuning" and done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compress(source, tmp_path / "out", progress=stop, **settings)
    decided = tmp_path / "out.work" / "allocation.json"
    kept = decided.read_text()
    for damaged in ('{"shares"', '{"model.layers.0.mlp.up_proj": 0.5}'):
        decided.write_text(damaged)
        with pytest.raises(ResumeError, match=r"allocation\.json in the work folder is damaged; delete it"):
            compress(source, tmp_path / "out", **settings)
    decided.write_text(kept)
    again = compress(source, tmp_path / "out", **settings)
    assert again.resumed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert {layer["values"] for layer in again.made["layers"]} == {"nl4", "nl3"}
    assert all(layer["block_loss_tuned"] <= layer["block_loss"] for layer in again.made["layers"])


def test_layers_that_lose_most_get_the_finer_format(source: Path, tmp_path: Path) -> None:
    from gossamer.recipes import compress_shares

    seen: dict[str, LayerInfo] = {}
    real = compress_shares.least_error_formats

    def spy(layers: Sequence[LayerInfo], budget: float) -> dict[str, str]:
        seen.update({layer.name: layer for layer in layers})
        return real(layers, budget)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress_shares, "least_error_formats", spy)
        done = compress(source, tmp_path / "out", budget="72kB", **{**SMALL, **MIXED})
    saved: dict[str, list[float]] = {"nl4": [], "nl3": []}  # the loss for each byte that nl3 saves
    for layer in done.made["layers"]:
        info = seen[layer["name"]]
        (_, low), (_, high) = info.formats
        fine, coarse = info.cost("nl4"), info.cost("nl3")
        assert fine > coarse
        saved[layer["values"]].append((high - low) / (fine - coarse))
    ordered = sorted(saved["nl3"] + saved["nl4"])
    assert sum(saved["nl3"]) <= 1.1 * sum(ordered[: len(saved["nl3"])])  # but for the last step


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"values": "nl4,nl3"}, "takes a budget of bytes"),
        ({"values": "nl4,nl3", "allocation": "sensitivity"}, "takes a budget of bytes"),
        ({"values": "nl4,nl3", "sparsity": 0.5}, "takes a budget of bytes"),
        ({"values": "nl4,nl3", "budget": "2ms"}, "takes a budget of bytes"),
        ({"values": "nl4,nl4", "budget": "60kB"}, "twice"),
        ({"values": "nl4,int9", "budget": "60kB"}, "unknown values 'int9'"),
        ({"values": "nl4,nl3", "budget": "60kB", "pattern": "2:4"}, "leave the pattern 2:4 out"),
        (
            {"values": "nl4,nl3", "budget": "10kB"},
            r"out of reach: .*\(all in nl3\) to .* \(all in nl4\); all but linears takes .* kB",
        ),
        (
            {"values": "nl3,nl4", "budget": "1MB"},
            "no fewer bits than nl4: .*; --values nl4 --sparsity 0 is that",
        ),
    ],
)
def test_formats_that_cannot_be_chosen_from(
    settings: dict[str, Any], says: str, source: Path, tmp_path: Path
) -> None:
    plain = {} if "budget" in settings else {"allocation": "uniform"}
    with pytest.raises(GossamerError, match=says):
        compress(source, tmp_path / "out", **{**SMALL, **plain, **settings})
    assert not (tmp_path / "out.work").exists()


def _between(curve: list[tuple[float, float]], at: float) -> float:
    for (x0, y0), (x1, y1) in pairwise(curve):
        if x0 <= at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    raise AssertionError(at)


class Stopwatch:
    """Stands in for the timing of products: 10 us dense; layers of 128 inputs 10 us less a tenth of that for
    each tenth pruned, all others no faster sparse."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def __call__(
        self, counts: Mapping[Any, int], values: str, pattern: str, sparsities: Any, group: int, **_: Any
    ) -> TokenTimes:
        self.asked.append((dict(counts), values, pattern, tuple(sparsities), group))
        slopes = {shape: 1e-5 if shape[1] == 128 else -1e-6 for shape in counts}
        times = {shape: [1e-5, *(1e-5 - slopes[shape] * s for s in sparsities)] for shape in counts}
        return TokenTimes(times, 0.25)


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    watch = Stopwatch()
    monkeypatch.setattr(compress_budget, "token_times", watch)
    return watch


def test_time_is_saved_where_pruning_saves_it(source: Path, tmp_path: Path, stopwatch: Stopwatch) -> None:
    done = compress(source, tmp_path / "out", budget="195us", **SMALL)  # 21 layers, 210 us dense
    assert stopwatch.asked == [
        ({(64, 64): 6, (32, 64): 6, (128, 64): 6, (64, 128): 3}, "int4", "unstructured:row", TIMED, 64)
    ]
    shares = {layer["name"]: layer["sparsity_requested"] for layer in done.made["layers"]}
    pruned = {name for name, share in shares.items() if share > 0}
    assert pruned
    assert all(name.endswith("down_proj") for name in pruned)
    assert sum(shares[name] for name in pruned) == pytest.approx(1.5, abs=1e-3)  # 10 us times each
    told = done.made["budget"]
    assert told["expected"] == pytest.approx(195e-6, rel=1e-3)
    assert told["expected"] <= 195e-6 * (1 + 1e-9)
    assert (told["timings"]["sparsities"], told["timings"]["other_work"]) == (list(TIMED), 0.25)
    times = {tuple(one["shape"]): one["seconds"] for one in told["timings"]["products"]}
    assert times[64, 128] == pytest.approx([1e-5, 7.5e-6, 5e-6, 2.5e-6, 5e-7])


def test_layers_are_timed_dense_or_in_the_pattern(source: Path, tmp_path: Path, stopwatch: Stopwatch) -> None:
    done = compress(source, tmp_path / "out", budget="200us", pattern="2:4", **SMALL)
    assert stopwatch.asked[0][2:4] == ("2:4", (0.5,))
    layouts = {layer["name"]: layer["layout"] for layer in done.made["layers"]}
    assert sorted(layouts.values()) == ["32:64"] * 2 + ["dense"] * 19
    assert all(name.endswith("down_proj") for name, layout in layouts.items() if layout == "32:64")


class StopError(Exception):
    pass


def test_a_resumed_run_has_the_times_of_the_first(
    source: Path, tmp_path: Path, stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SMALL, "budget": "195us"}
    compress(source, tmp_path / "whole", **settings)

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == ("scoring", 2):
            raise StopError

    with pytest.raises(StopError):
        compress(source, tmp_path / "out", progress=interrupt, **settings)
    monkeypatch.setattr(compress_budget, "token_times", lambda *_, **__: pytest.fail("timed again"))
    assert compress(source, tmp_path / "out", **settings).resumed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")

    monkeypatch.setattr(compress_budget, "token_times", stopwatch)
    with pytest.raises(StopError):
        compress(source, tmp_path / "bad", progress=interrupt, **settings)
    with pytest.raises(ResumeError, match="of another run: it differs in model"):
        compress(tiny_folder(tmp_path / "wider", hidden_size=96), tmp_path / "bad", **settings)
    (tmp_path / "bad.work" / "timings.json").write_text("{")
    with pytest.raises(ResumeError, match="damaged"):
        compress(source, tmp_path / "bad", **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"budget": "10kB"},
            r"10kB is out of reach: the weight file takes from .* kB \(all pruned to 95 %\) to",
        ),
        ({"budget": "90MB"}, r"no pruning: the weight file takes 95\.6\d kB with all layers dense"),
        ({"budget": "60kB", "pattern": "2:4"}, r"all in the pattern"),
        ({"budget": "1us"}, r"linears take on this machine from .* us .* to 210 us \(all dense\)"),
        ({"budget": "much"}, "cannot read the budget"),
        ({"budget": "80kB", "sparsity": 0.5}, "leave the sparsity out"),
        ({"budget": "80kB", "allocation": "uniform"}, "needs the allocation sensitivity"),
        ({"budget": "80kB", "seqlen": 1}, "2 tokens"),
    ],
)
def test_budgets_out_of_reach_end_before_any_work(
    settings: dict[str, Any], says: str, source: Path, tmp_path: Path, stopwatch: Stopwatch
) -> None:
    with pytest.raises(GossamerError, match=says):
        compress(source, tmp_path / "out", **{**SMALL, **settings})
    assert not list(tmp_path.iterdir())


def test_a_uniform_sparsity_is_found_to_search_around(tmp_path: Path) -> None:
    c = check_combination(
        "wanda", budget="80kB", allocation_name="sensitivity", pattern="unstructured:row", values="int4"
    )
    assert c.budget is not None
    layers = [LayerInfo(f"{i}", (256, 256)) for i in range(4)]
    prices = find_prices(c.budget, c, layers, {}, tmp_path, lambda *_: None)
    at = prices.sparsity()
    assert prices.uniform(at) <= 80e3 < prices.uniform(at - 1e-4)
    # 4 bits a kept weight, and 1.25 of mask and scale
    assert at == pytest.approx(1 - (80e3 * 8 / (4 * 256 * 256) - 1.25) / 4, abs=0.02)
    with pytest.raises(MethodError, match="asks for no pruning"):
        find_prices(parse_budget("1MB"), c, layers, {}, tmp_path, lambda *_: None)


def test_a_token_pays_for_the_experts_that_it_is_sent_to(tmp_path: Path, stopwatch: Stopwatch) -> None:
    source = tiny_folder(tmp_path / "tiny", "qwen3_moe", num_hidden_layers=1)  # two of four experts
    with pytest.raises(MethodError, match=r"from .* us \(.*\) to 80 us \(all dense\)"):
        compress(source, tmp_path / "out", budget="1us", **SMALL)  # four of attention, and half of eight
