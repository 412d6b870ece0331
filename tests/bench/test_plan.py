"""Plans: what is grouped, offered, chosen, kept and applied, by times that the tests make up."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gossamer as gs
from gossamer import kernels
from gossamer.bench import Plan, plan
from gossamer.bench import planning as room
from gossamer.bench.kinds import leaves_of
from gossamer.bench.plan_cache import PlanCache
from gossamer.bench.speed import decode_bytes
from gossamer.bench.timing import TORCH, Times
from gossamer.engine import NativeSession
from gossamer.errors import EvaluationError, ModelError, PatternError
from gossamer.matrices import BlockDiagonal, Dense, LowRank, Packed, Product, Sparse, Sum, pack_tree
from gossamer.models.place import place_matrix
from gossamer.models.walk import find_parts, prunable
from gossamer.nn import StructuredLinear
from tiny import tiny_folder, tiny_model, tiny_tokens

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")

DENSE = {"dense": (20.0, 300.0)}
SECONDS = {"32:64": (10.0, 400.0), "bitmap": (15.0, 500.0), TORCH: (40.0, 200.0), **DENSE}


class Stopwatch:
    """Stands in for the timing of forms: seconds of a token and of a prompt's rows by layout; ``asked``:
    layouts, rows and copies of each call; ``zeros``: shares of activations."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = dict(SECONDS)
        self.asked: list[tuple[tuple[str, ...], int, int]] = []
        self.zeros: list[float] = []

    def __call__(self, forms: Sequence[Packed], rows: int, copies: int, zeros: float) -> list[Times]:
        names = [*(form.layout for form in forms), TORCH]
        sizes = [*(form.nbytes for form in forms), 2 * forms[0].shape[0] * forms[0].shape[1]]
        self.zeros.append(zeros)
        self.asked.append((tuple(names[:-1]), rows, copies))
        return [
            Times(name, size, size * copies, *self.seconds.get(name, (30.0, 600.0)))
            for name, size in zip(names, sizes, strict=True)
        ]


@pytest.fixture(autouse=True)
def stopwatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "cache"))
    watch = Stopwatch()
    monkeypatch.setattr(room, "time_forms", watch)
    monkeypatch.setattr(room.OtherWork, "cores", lambda self: 0.25)
    monkeypatch.setattr(room, "call_seconds", lambda: 1.0)
    monkeypatch.setattr(room, "read_bandwidth", lambda working_set: 1e9)
    return watch


def packed_model(values: str = "int4", pattern: str = "32:64", sparsity: float | None = None) -> Any:
    """A tiny llama, its linears packed sparse and its tied embeddings dense int8; a copy of its own."""
    return deepcopy(_packed_model(values, pattern, sparsity))


@cache
def _packed_model(values: str, pattern: str, sparsity: float | None) -> Any:
    model = tiny_model("llama")
    with torch.no_grad():
        for block in find_parts(model).blocks:
            for name, layer in prunable(block).items():
                sparse = Sparse.fit(layer.weight, pattern=pattern, sparsity=sparsity)
                place_matrix(model, f"{block.name}.{name}.weight", Packed.pack(sparse, values), torch.float32)
        edge = Packed.pack(model.lm_head.weight, "int8")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        place_matrix(model, name, edge, torch.float32)
    return model.requires_grad_(False)


def logits(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        out: Tensor = model(tiny_tokens()).logits
    return out


def by_label(found: Plan) -> dict[str, Any]:
    return {row.label: row for row in found.rows}


def test_layers_of_one_kind_come_together() -> None:
    found = plan(packed_model())
    counts = {(row.label, row.kind.shape): len(row.names) for row in found.rows}
    assert counts == {
        ("q_proj, o_proj", (64, 64)): 6,
        ("k_proj, v_proj", (32, 64)): 6,
        ("gate_proj, up_proj", (128, 64)): 6,
        ("down_proj", (64, 128)): 3,
        ("lm_head", (384, 64)): 1,
    }
    row = by_label(found)["down_proj"]
    assert row.names[1] == "model.layers.1.mlp.down_proj.matrix"
    # a panel-group: 256 bytes of nibbles, 128 of masks, 32 of scales; dense 512 and 32
    assert row.nbytes == 3 * 8 * (256 + 128 + 32)
    assert [times.nbytes for times in row.candidates] == [8 * 416, 8 * 416 + 64, 8 * 544]
    assert (row.kind.layout, row.kind.keep, row.kind.values, row.kind.group) == ("32:64", 32, "int4", 64)


@pytest.mark.parametrize(
    ("pattern", "sparsity", "layouts"),
    [
        ("32:64", None, ("32:64", "bitmap", "dense")),
        ("2:4", None, ("32:64", "bitmap", "dense")),
        ("8:64", None, ("8:64", "bitmap", "dense")),
    ],
)
def test_layouts_that_could_hold_a_mask(
    pattern: str, sparsity: float | None, layouts: tuple[str, ...]
) -> None:
    rows = by_label(plan(packed_model(pattern=pattern, sparsity=sparsity)))
    assert tuple(times.form for times in rows["down_proj"].candidates) == layouts
    assert tuple(times.form for times in rows["lm_head"].candidates) == ("dense",)


def test_columns_are_offered_where_zeros_are_expected(stopwatch: Stopwatch) -> None:
    stopwatch.seconds["columns"] = (5.0, 500.0)
    rows = by_label(plan(packed_model(), zeros=0.7))
    assert stopwatch.zeros == [0.7] * 5
    assert tuple(times.form for times in rows["down_proj"].candidates) == (
        "32:64",
        "bitmap",
        "columns",
        "dense",
    )
    assert tuple(times.form for times in rows["lm_head"].candidates) == ("dense", "columns")
    assert {row.chosen.form for row in rows.values()} == {"columns"}
    assert rows["lm_head"].dense.form == "dense"
    told = plan(packed_model(), zeros=0.7)
    assert "70 % of the activations are zero" in told.explain()
    assert "x as fast as dense, in 2.00 of its bytes; its mask is forgotten" in told.explain()
    assert told.to_dict()["zeros"] == 0.7
    assert "as if every token were sent to it" not in told.explain()
    assert "as if every token were sent to it" in replace(told, mixture=True).explain()
    # times of other shares are not those of this one
    stopwatch.seconds["columns"] = (25.0, 500.0)
    assert by_label(plan(packed_model(), zeros=0.2))["down_proj"].chosen.form == "32:64"
    assert by_label(plan(packed_model(), zeros=0.7))["down_proj"].chosen.form == "columns"
    assert set(stopwatch.zeros) == {0.7, 0.2}
    # and nobody who did not ask gets them
    assert by_label(plan(packed_model()))["down_proj"].chosen.form == "32:64"
    assert stopwatch.zeros[-1] == 0.0


def test_columns_hold_no_int3_and_shares_are_shares() -> None:
    rows = by_label(plan(packed_model("int3"), zeros=0.7))
    assert "columns" not in {times.form for times in rows["down_proj"].candidates}
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(EvaluationError, match="from 0 to 1"):
            plan(packed_model(), zeros=wrong)


def test_what_is_columns_already_is_held_against_dense(stopwatch: Stopwatch) -> None:
    stopwatch.seconds["columns"] = (5.0, 100.0)
    model = packed_model()
    changed = plan(model, zeros=0.9).apply(model)
    assert set(changed.values()) == {"columns"}
    row = by_label(plan(model))["down_proj"]
    assert tuple(times.form for times in row.candidates) == ("columns", "dense")
    stopwatch.seconds["columns"] = (25.0, 500.0)
    assert by_label(plan(model, refresh=True))["down_proj"].chosen.form == "dense"


def test_a_bitmap_is_offered_the_least_n_that_holds_every_layer() -> None:
    model = packed_model(pattern="unstructured", sparsity=0.7)
    row = by_label(plan(model))["down_proj"]
    masks = [model.get_submodule(name).mask() for name in row.names]
    most = max(int(mask.reshape(64, 2, 64).sum(2).max()) for mask in masks)
    assert tuple(times.form for times in row.candidates) == ("bitmap", f"{most}:64", "dense")
    for name in row.names:
        assert model.get_submodule(name).repack(f"{most}:64").layout == f"{most}:64"


def test_sparse_layouts_no_smaller_than_dense_are_not_offered() -> None:
    # 1/8 byte of mask is more than a tenth of 4 bits: packed as a bitmap by force
    model = packed_model(pattern="unstructured", sparsity=0.1)
    name = "model.layers.0.mlp.down_proj"
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    sparse = Sparse.fit(weight, pattern="unstructured", sparsity=0.1)
    model.get_submodule(name).matrix = Packed.pack(sparse, "int4", "bitmap")
    forms = [times.form for times in by_label(plan(model))["down_proj"].candidates]
    assert forms == ["dense"]  # of the two that were packed dense at once
    kinds = leaves_of(model, None, None, None, 64)
    layouts = {members.names: members.layouts for members in kinds.values()}
    assert layouts[f"{name}.matrix",] == ("bitmap", "dense")


def test_the_weights_of_the_two_phases_decide(stopwatch: Stopwatch) -> None:
    model = packed_model()
    assert by_label(plan(model, prompt=512, decode=64))["down_proj"].chosen.form == "32:64"
    assert by_label(plan(model, prompt=512, decode=4))["down_proj"].chosen.form == "dense"
    assert by_label(plan(model, prompt=512, decode=0))["down_proj"].chosen.form == "dense"
    found = plan(model, prompt=0, decode=1)
    assert by_label(found)["down_proj"].chosen.form == "32:64"
    assert all(times.prompt_seconds == 0 for row in found.rows for times in row.candidates)


def test_costs_within_two_percent_go_to_the_fewest_bytes(stopwatch: Stopwatch) -> None:
    stopwatch.seconds |= {"32:64": (20.3, 0.0), "bitmap": (20.2, 0.0), "dense": (20.0, 0.0)}
    assert by_label(plan(packed_model(), prompt=0))["down_proj"].chosen.form == "32:64"
    stopwatch.seconds |= {"32:64": (20.5, 0.0), "bitmap": (20.5, 0.0)}
    assert by_label(plan(packed_model(), prompt=0, refresh=True))["down_proj"].chosen.form == "dense"


def test_long_prompts_are_scaled_and_the_head_sees_one_token(stopwatch: Stopwatch) -> None:
    rows = by_label(plan(packed_model(), prompt=1280, decode=1))
    assert {rows for _, rows, _ in stopwatch.asked} == {512, 1}
    assert stopwatch.asked[-1][1] == 1  # the head comes last
    assert rows["down_proj"].present.prompt_seconds == pytest.approx(400 * 1280 / 512)
    assert rows["lm_head"].present.prompt_seconds == 300
    stopwatch.asked.clear()
    assert by_label(plan(packed_model(), prompt=100))["down_proj"].present.prompt_seconds == 400
    assert {rows for _, rows, _ in stopwatch.asked} == {100}  # of the head one row is known already


def test_as_many_copies_as_would_make_up_the_model(stopwatch: Stopwatch) -> None:
    model = packed_model()
    found = plan(model)
    assert found.working_set == decode_bytes(model)
    sizes = [row.present.nbytes for row in found.rows]
    assert [copies for _, _, copies in stopwatch.asked] == [
        max(1, round(decode_bytes(model) / size)) for size in sizes
    ]


def test_totals_count_every_layer() -> None:
    found = plan(packed_model(), prompt=512, decode=4)  # dense is chosen
    totals = found.totals()
    assert list(totals) == ["present", "chosen", "dense", TORCH]
    assert totals["present"].decode_seconds == 21 * 10 + 20
    assert totals["present"].prompt_seconds == 21 * 400 + 300
    assert totals["chosen"] == totals["dense"]
    assert totals["dense"].decode_seconds == 22 * 20
    assert totals[TORCH].nbytes == 2 * sum(
        len(row.names) * row.kind.shape[0] * row.kind.shape[1] for row in found.rows
    )
    assert found.other_work == 0.25
    told = json.loads(json.dumps(found.to_dict()))
    assert told["totals"]["chosen"]["decode_seconds"] == 22 * 20
    assert told["rows"][0]["layers"] == 6 == len(told["rows"][0]["names"])
    assert [one["form"] for one in told["rows"][0]["measured"]] == ["32:64", "bitmap", "dense", TORCH]
    assert told["rows"][0]["measured"][0]["gb_per_second"] == told["rows"][0]["measured"][0]["nbytes"] / 1e10


# ---- applying


@pytest.mark.parametrize("values", ["float32", "bfloat16", "int8", "int4", "int3", "nl4"])
def test_applying_dense_keeps_values_and_products_and_forgets_masks(values: str) -> None:
    model = packed_model(values)
    before, expected = model.get_submodule("model.layers.1.mlp.down_proj").matrix.unpack(), logits(model)
    changed = plan(model, prompt=512, decode=1).apply(model)
    assert set(changed.values()) == {"dense"}
    assert len(changed) == 21
    after = model.get_submodule("model.layers.1.mlp.down_proj").matrix
    assert after.layout == "dense"
    assert after.masks is None
    assert torch.equal(after.unpack().weight, before.weight)
    if before.scales is not None:
        assert torch.equal(after.unpack().scales, before.scales)
        assert torch.equal(logits(model), expected)
    assert plan(model, prompt=512, decode=1).apply(model) == {}


def test_applying_changes_nothing_where_the_present_layout_wins() -> None:
    model = packed_model()
    leaves = [module for module in model.modules() if isinstance(module, Packed)]
    assert plan(model).apply(model) == {}
    assert [module for module in model.modules() if isinstance(module, Packed)] == leaves


def test_the_native_decoder_runs_what_was_planned(tmp_path: Path) -> None:
    out = tmp_path / "sparse"
    gs.compress(tiny_folder(tmp_path / "m"), out, method="magnitude", pattern="32:64", values="int8")
    loaded = gs.load(out, cache="int8")
    ids = tiny_tokens(1, 20)[0]
    before, expected = loaded.session(), loaded.session().prompt(ids)
    found = loaded.repacked(gs.plan(loaded, prompt=512, decode=1))
    after = found.session()
    assert isinstance(before, NativeSession)
    assert isinstance(after, NativeSession)
    linears = [module for name, module in found.model.named_modules() if ".layers." in name]
    assert {module.layout for module in linears if isinstance(module, Packed)} == {"dense"}
    assert after.decoder is not before.decoder
    assert after.cache == torch.int8
    assert torch.equal(after.prompt(ids), expected)


def test_applying_to_a_tied_head_changes_the_embeddings_too() -> None:
    model = packed_model()
    edge = Packed.pack(Sparse.fit(model.lm_head.matrix.to_dense(), pattern="32:64"), "int8")
    model.lm_head.matrix = model.model.embed_tokens.matrix = edge
    expected = logits(model)
    changed = plan(model, prompt=512, decode=1).apply(model)
    assert changed["lm_head.matrix"] == "dense"
    assert model.lm_head.matrix.layout == "dense"
    assert model.model.embed_tokens.matrix is model.lm_head.matrix
    assert torch.equal(logits(model), expected)


def test_composites_count_by_their_packed_leaves() -> None:
    model = packed_model()
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(1))
    low = LowRank(Dense(weight[:, :16].clone()), Dense(weight[:16].clone()))
    tree = pack_tree(Sum(low, Sparse.fit(weight, pattern="32:64")), "int4")
    model.get_submodule("model.layers.2.mlp").down_proj = StructuredLinear(tree)
    found = plan(model, prompt=512, decode=1)
    names = {name: row for row in found.rows for name in row.names}
    place = "model.layers.2.mlp.down_proj.matrix"
    assert {f"{place}.parts.0.parts.0", f"{place}.parts.0.parts.1", f"{place}.parts.1"} < set(names)
    assert len(names[f"{place}.parts.1"].names) == 3  # of one kind with the layers that are one leaf
    expected = logits(model)
    assert found.apply(model)[f"{place}.parts.1"] == "dense"
    assert tree.parts[1].layout == "dense"
    assert torch.equal(logits(model), expected)


def test_blocks_beside_a_core_are_planned_by_leaf() -> None:
    model = packed_model()
    core = Sparse.fit(torch.randn(64, 128, generator=torch.Generator().manual_seed(1)), pattern="32:64")
    sides = [BlockDiagonal.from_blocks(torch.eye(32).repeat(n // 32, 1, 1)) for n in core.shape]
    tree = pack_tree(Product(sides[0], core, sides[1]), "int4")
    model.get_submodule("model.layers.2.mlp").down_proj = StructuredLinear(tree)
    found = plan(model, prompt=512, decode=1)
    rows = {name: row for row in found.rows for name in row.names}
    place = "model.layers.2.mlp.down_proj.matrix.parts"
    assert rows[f"{place}.0.parts.0"].kind.shape == (64, 32)  # blocks below each other
    assert rows[f"{place}.2.parts.0"].kind.shape == (128, 32)
    assert "down_proj" in found.explain()
    assert found.apply(model)[f"{place}.1"] == "dense"
    x = torch.randn(3, 128)
    assert torch.equal(tree(x), pack_tree(Product(sides[0], core, sides[1]), "int4")(x))


def test_a_plan_of_another_model_is_refused_before_anything_changes() -> None:
    found = plan(packed_model(), prompt=512, decode=1)
    with pytest.raises(ModelError, match=r"no packed weight model\.layers\.0\.self_attn\.q_proj\.matrix"):
        found.apply(tiny_model("llama"))
    other = packed_model()
    other.model.layers[2].mlp.down_proj = nn.Identity()
    with pytest.raises(ModelError, match=r"down_proj"):
        found.apply(other)
    assert other.get_submodule("model.layers.0.mlp.down_proj").matrix.layout == "32:64"


# ---- models that are not packed yet


def test_a_plain_model_is_planned_by_its_shapes(stopwatch: Stopwatch) -> None:
    with torch.device("meta"):
        model = tiny_model("llama")
    found = plan(model, values="int4", pattern="32:64")
    assert {row.kind for row in found.rows} == {row.kind for row in plan(packed_model()).rows[:-1]}
    assert found.working_set == sum(row.nbytes for row in found.rows)
    assert by_label(found)["down_proj"].names == by_label(plan(packed_model()))["down_proj"].names
    assert found.apply(packed_model()) == {}  # its names are those of the packed model


@pytest.mark.parametrize(
    ("settings", "layouts"),
    [
        ({"values": "int4"}, ("dense",)),
        ({"values": "int4", "sparsity": 0.0}, ("dense",)),
        ({"values": "bfloat16", "sparsity": 0.5}, ("n:64", "bitmap", "dense")),  # a row is one group
        ({"values": "int8", "pattern": "unstructured:tensor", "sparsity": 0.5}, ("bitmap", "n:64", "dense")),
    ],
)
def test_what_a_plain_model_would_become(settings: dict[str, Any], layouts: tuple[str, ...]) -> None:
    row = by_label(plan(tiny_model("gpt2"), **settings))["c_fc"]
    assert row.kind.shape == (128, 64)
    forms = ["n:64" if times.form.endswith(":64") else times.form for times in row.candidates]
    assert tuple(forms) == layouts


def test_nothing_to_plan_is_a_clear_error() -> None:
    with pytest.raises(EvaluationError, match="holds no packed weights: name the values"):
        plan(tiny_model("llama"))
    with pytest.raises(EvaluationError, match="name values too"):
        plan(tiny_model("llama"), pattern="2:4")
    with pytest.raises(EvaluationError, match="packed already"):
        plan(packed_model(), values="int4")
    with pytest.raises(EvaluationError, match="some tokens"):
        plan(packed_model(), prompt=0, decode=0)
    with pytest.raises(EvaluationError, match="threads"):
        plan(packed_model(), threads=0)
    with pytest.raises(PatternError):
        plan(tiny_model("llama"), values="int4", pattern="half")


# ---- the cache of this machine


def test_a_second_plan_measures_nothing(stopwatch: Stopwatch, tmp_path: Path) -> None:
    first = plan(packed_model())
    assert len(stopwatch.asked) == 5
    second = plan(packed_model())
    assert len(stopwatch.asked) == 5
    assert second.rows == first.rows
    plan(packed_model(), decode=1)  # other weights of the same measurements
    assert len(stopwatch.asked) == 5
    plan(packed_model(), prompt=64)  # the head sees one token, as before
    assert len(stopwatch.asked) == 9
    stopwatch.seconds["32:64"] = (99.0, 99.0)
    third = plan(packed_model(), refresh=True)
    assert len(stopwatch.asked) == 14
    assert by_label(third)["down_proj"].present.decode_seconds == 99
    assert by_label(plan(packed_model()))["down_proj"].present.decode_seconds == 99
    (file,) = (tmp_path / "cache" / "plans").iterdir()
    assert json.loads(file.read_text())["of"]["isa"] == kernels.isa()


def test_another_machine_is_another_file(
    stopwatch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    plan(packed_model(), threads=1)
    plan(packed_model(), threads=2)
    monkeypatch.setattr("gossamer.bench.plan_cache.cpu_name", lambda: "another")
    plan(packed_model(), threads=2)
    assert len(stopwatch.asked) == 15
    assert len(list((tmp_path / "cache" / "plans").iterdir())) == 3
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[" * 100_000,
        lambda text: "[1]",
        lambda text: "\0\xff",
        lambda text: json.dumps({**json.loads(text), "format": 99}),
        lambda text: json.dumps({**json.loads(text), "of": {}}),
        lambda text: json.dumps({**json.loads(text), "measured": [1]}),
        lambda text: text.replace("decode_seconds", "seconds"),
        lambda text: text.replace('"times"', '"time"'),
        lambda text: text.replace(": 10.0", ": -10.0").replace(": 20.0", ": NaN"),
        lambda text: text.replace(": 10.0", ': "fast"').replace(": 20.0", ": null"),
        lambda text: text.replace('"form": "dense"', '"form": "bitmap"'),
    ],
)
def test_a_damaged_or_foreign_file_is_measured_anew(
    damage: Any, stopwatch: Stopwatch, tmp_path: Path
) -> None:
    first = plan(packed_model())
    (file,) = (tmp_path / "cache" / "plans").iterdir()
    good = file.read_text()
    file.write_text(damage(good), encoding="latin-1")
    assert plan(packed_model()).rows == first.rows
    assert len(stopwatch.asked) == 10
    assert plan(packed_model()).rows == first.rows
    assert len(stopwatch.asked) == 10


def test_a_cache_that_cannot_be_written_is_not_missed(
    stopwatch: Stopwatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GOSSAMER_CACHE", str(tmp_path / "file"))
    assert len(plan(packed_model()).rows) == 5
    plan(packed_model())
    assert len(stopwatch.asked) == 10


def test_what_another_process_wrote_meanwhile_stays(tmp_path: Path) -> None:
    one, two = PlanCache(1, folder=tmp_path), PlanCache(1, folder=tmp_path)
    one.put("a", 1.0)
    two.put("b", 2.0)
    assert two.get("a") is None
    found = PlanCache(1, folder=tmp_path)
    assert (found.get("a"), found.get("b")) == (1.0, 2.0)
    assert len(list(tmp_path.iterdir())) == 1


# ---- in words


def test_explain_says_what_is_chosen_and_what_bounds_it(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    # a plain sum would read 3,328 bytes (32:64) in 8 us of 10; a call takes 1; the dense 4,352 in 10.5 of 20
    monkeypatch.setattr(room, "call_seconds", lambda: 1e-6)
    monkeypatch.setattr(room, "read_bandwidth", lambda working_set: 3328 / 8e-6)
    stopwatch.seconds = {form: (a * 1e-6, b * 1e-6) for form, (a, b) in SECONDS.items()}
    told = plan(packed_model()).explain()
    lines = told.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("3 x down_proj"))
    cost = 400 + 64 * 10, 300 + 64 * 20
    assert lines[at] == (
        "3 x down_proj (64 x 128 int4 in groups of 64, 32:64, 32 of 64 kept): stays 32:64: "
        f"{cost[1] / cost[0]:.2f}x as fast as dense, in {416 / 544:.2f} of its bytes"
    )
    assert lines[at + 1] == (
        "  a token: 32:64 10.0 us, 0.00333 MB at 0.3 GB/s, bound by bytes; bitmap 15.0 us (0.67x), "
        "dense 20.0 us (0.50x), torch bfloat16 40.0 us (0.25x)"
    )
    assert "a prompt: 32:64 400.0 us, 10 GMAC/s, bound by arithmetic; bitmap 500.0 us (0.8" in lines[at + 2]
    assert "lm_head (384 x 64 int8 in groups of 64, dense): dense as it is" in told
    assert "the head sees its last token" in told
    assert "all planned weights, present: " in told

    told = plan(packed_model(), decode=4).explain()
    assert (
        "dense in place of 32:64: 1.16x as fast as 32:64, the best sparse layout; its mask is forgotten"
        in told
    )
    assert "torch bfloat16 is faster still, 1.06x, but no packed weight" in told
    monkeypatch.setattr(room, "call_seconds", lambda: 9e-6)
    assert "bound by the call" in plan(packed_model(), refresh=True).explain()
