"""DSnoT against a plain loop over rows, and what swaps may never do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.calibrate import Gram, InputMoments, InputNorm
from gossamer.errors import MethodError
from gossamer.prune import Layer, check_combination
from gossamer.prune.dsnot import DSnoT
from gossamer.prune.random import Random
from gossamer.sparse import Unstructured, check_mask, mask_from_scores, parse_pattern


def make_layer(out: int = 12, cols: int = 40, seed: int = 0) -> Layer:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(300, cols, generator=generator) * (torch.rand(cols, generator=generator) + 0.1)
    inputs += torch.randn(cols, generator=generator)
    statistics = {kind: kind(cols) for kind in (InputNorm, InputMoments, Gram)}
    for statistic in statistics.values():
        statistic.update(inputs)
        statistic.finish()
    return Layer("layer", torch.randn(out, cols, generator=generator), statistics)  # type: ignore[arg-type]


def plain_loop(layer: Layer, start: torch.Tensor, width: int, cycles: int) -> torch.Tensor:
    """One row, one swap at a time, in float64 and lists."""
    mean, var = layer[InputMoments].mean.double(), layer[InputMoments].variance.double()
    norm = layer[InputNorm].norm.double()
    mask = start.clone()
    for r, weight in enumerate(layer.weight.double()):
        pruned = [j for j in range(len(weight)) if not start[r, j]]
        kept = [j for j in range(len(weight)) if start[r, j]]
        share = weight * mean
        error = float(sum(share[j] for j in pruned))
        was_positive = error > 0
        for _ in range(cycles):
            sign = 1.0 if error > 0 else -1.0
            grow = [j for j in pruned if share[j] * sign > 0]
            if abs(error) <= 0.1 / 2048 or not grow:
                break
            g = max(grow, key=lambda j: float(share[j] * sign / var[j]))
            if width >= len(weight):
                lose = [j for j in kept if share[j] * sign < 0]
            else:
                lose = [j for j in kept if j // width == g // width]
            if not lose:
                break
            p = min(lose, key=lambda j: float(weight[j].abs() * norm[j]))
            after = error + float(share[p] - share[g])
            if width < len(weight) and (after > 0) != was_positive:
                break
            error = after
            pruned.remove(g)
            kept.remove(p)
            mask[r, g], mask[r, p] = True, False
    return mask


@pytest.mark.parametrize("pattern", ["unstructured:row", "unstructured:columns:8", "2:4", "4:8"])
@pytest.mark.parametrize(("start", "cycles"), [("wanda", 50), ("magnitude", 3), ("obs", None)])
def test_swaps_are_those_of_a_plain_loop(pattern: str, start: str, cycles: int | None) -> None:
    layer, parsed = make_layer(), parse_pattern(pattern)
    options = {"start": start, "cycles": cycles}
    c = check_combination(
        "dsnot", pattern=pattern, sparsity=0.5 if "un" in pattern else None, options=options
    )
    pruned = c.method.prune(layer, c.pattern, c.sparsity, c.values, 64)
    assert pruned.mask is not None
    first = mask_from_scores(c.method.scores(layer), parsed, c.sparsity)
    width = {"unstructured:row": 40, "unstructured:columns:8": 8, "2:4": 4, "4:8": 8}[pattern]
    assert torch.equal(pruned.mask, plain_loop(layer, first, width, cycles or 1))
    check_mask(pruned.mask, parsed)
    assert torch.equal(pruned.mask.sum(dim=1), first.sum(dim=1))
    assert torch.equal(pruned.weight, layer.weight * pruned.mask)
    assert pruned.record["swapped"] == int((first & ~pruned.mask).sum()) > 0


@pytest.mark.parametrize("pattern", ["unstructured:row", "2:4"])
@pytest.mark.parametrize("start", ["admm", "random_search"])
def test_a_start_without_scores_gives_the_mask_that_it_finds(start: str, pattern: str) -> None:
    layer, sparsity = make_layer(), 0.5 if "un" in pattern else None
    own = check_combination(start, pattern=pattern, sparsity=sparsity)
    found = own.method.prune(layer, own.pattern, own.sparsity, own.values, 64).mask
    c = check_combination("dsnot", pattern=pattern, sparsity=sparsity, options={"start": start, "cycles": 0})
    pruned = c.method.prune(layer, c.pattern, c.sparsity, c.values, 64)
    assert found is not None
    assert torch.equal(pruned.mask, found)  # type: ignore[arg-type]
    assert torch.equal(pruned.weight, layer.weight * found)
    with pytest.raises(MethodError, match="the masks of dsnot do not come from scores"):
        check_combination("dsnot", sparsity=0.5, allocation_name="global", options={"start": start})


def test_the_means_of_outputs_come_back() -> None:
    layer = make_layer(64, 256)
    c = check_combination("dsnot", sparsity=0.6, options={"cycles": 50})
    mask = c.method.prune(layer, c.pattern, c.sparsity, c.values, 64).mask
    start = mask_from_scores(c.method.scores(layer), c.pattern, c.sparsity)

    def error(kept: torch.Tensor | None) -> torch.Tensor:
        assert kept is not None
        return ((layer.weight * ~kept) @ layer[InputMoments].mean).abs()

    assert error(mask).mean() < 0.5 * error(start).mean()
    unswapped = DSnoT(cycles=0).prune(layer, c.pattern, c.sparsity, c.values, 64)
    assert torch.equal(unswapped.mask, start)  # type: ignore[arg-type]


@pytest.mark.parametrize(("width", "swaps"), [(40, 1), (576, 7), (4096, 50)])
def test_a_row_is_swapped_in_proportion_to_its_inputs(width: int, swaps: int) -> None:
    layer = make_layer(4, width)
    masks = [
        DSnoT(cycles=cycles).swap(layer, mask_from_scores(layer.weight.abs(), Unstructured(), 0.5), width)
        for cycles in (None, swaps)
    ]
    assert torch.equal(*masks)


def test_layers_of_a_skipped_module_keep_their_first_mask() -> None:
    layer = make_layer()

    def swapped(name: str, **options: Any) -> int:
        c = check_combination("dsnot", sparsity=0.5, options=options)
        named = Layer(name, layer.weight, layer.statistics)
        return int(c.method.prune(named, c.pattern, c.sparsity, c.values, 64).record["swapped"])

    assert swapped("model.layers.0.mlp.up_proj") == 0
    assert swapped("model.layers.0.self_attn.q_proj") > 0
    assert swapped("model.layers.0.self_attn.q_proj", skip="self_attn") == 0
    assert swapped("model.layers.0.mlp.up_proj", skip="") > 0


def test_moments_are_those_of_all_tokens() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(3)) * 2 + 5
    moments = InputMoments(6)
    moments.update(x[:13])
    moments.update(x[13:])
    moments.finish()
    torch.testing.assert_close(moments.mean, x.mean(dim=0))
    torch.testing.assert_close(moments.variance, x.var(dim=0, unbiased=False), atol=1e-5, rtol=1e-5)


def test_it_asks_for_what_its_start_needs() -> None:
    assert DSnoT(start="obs").needs == (InputNorm, InputMoments, Gram)
    assert DSnoT().needs == (InputNorm, InputMoments)


def test_a_start_that_draws_has_the_seed_of_the_whole() -> None:
    found = check_combination("dsnot", sparsity=0.5, options={"start": "random"}, seed=7).method
    assert isinstance(found, DSnoT)
    assert found.first == Random(seed=7)
    assert check_combination(
        "dsnot", sparsity=0.5, options={"start": "random", "seed": 3}, seed=7
    ).method == DSnoT(start="random", seed=3)


@pytest.mark.parametrize(
    "options", [{"start": "dsnot"}, {"start": "wnda"}, {"cycles": -1}, {"threshold": -1.0}, {"speed": 1}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(MethodError):
        check_combination("dsnot", sparsity=0.5, options=options)


def test_blocks_are_refused() -> None:
    with pytest.raises(MethodError, match="does not accept"):
        check_combination("dsnot", pattern="16x4", sparsity=0.5)
