"""The main job on tiny random models: what it makes and refuses, and that nothing interrupts it for good."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from torch import nn

from gossamer.calibrate import Gradient
from gossamer.calibrate.stream import Visit
from gossamer.errors import (
    CalibrationError,
    GossamerError,
    MethodError,
    ModelError,
    OutputError,
    PatternError,
    ResumeError,
    SparsityError,
    TextError,
)
from gossamer.matrices import Packed
from gossamer.models import find_parts, load_checkpoint, load_model, prunable, weight_of
from gossamer.models.text import calibration_windows, read_text
from gossamer.models.tokenizer import load_tokenizer
from gossamer.nn import StructuredLinear
from gossamer.recipes.compress import compress
from gossamer.sparse import check_mask, count_pruned, parse_pattern
from tiny import tiny_folder, tiny_model, tiny_tokenizer, tiny_tokens

TEXT = "".join(topics.values())[:20_000]
SMALL: dict[str, Any] = {"windows": 4, "seqlen": 48, "calibration": [TEXT]}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("models") / "tiny")


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens()).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("obs", {}),
        ("obs", {"sparsity": 0.0, "values": "int4", "group": 32}),
        ("obs", {"sparsity": 0.6, "values": "float32", "head_values": "bfloat16"}),
        ("obs", {"pattern": "2:4", "values": "int3", "options": {"damping": 0.05}}),
        ("obs", {"pattern": "unstructured:row", "sparsity": 0.5, "values": "bfloat16"}),
        ("wanda", {"pattern": "4:8", "values": "int8", "head_values": "int4"}),
        ("wanda", {"sparsity": 0.5, "allocation": "global", "values": "bfloat16"}),
        ("magnitude", {"pattern": "16x4", "sparsity": 0.3, "values": "int4"}),
        ("magnitude", {"sparsity": 0.5, "allocation": "global", "values": "float32"}),
        ("random", {"pattern": "channel:in", "sparsity": 0.25, "values": "bfloat16"}),
        ("fisher", {"sparsity": 0.5, "allocation": "global", "values": "float32"}),
        ("magnitude", {"sparsity": 0.5, "allocation": "owl", "values": "float32"}),
        ("wanda", {"sparsity": 0.5, "allocation": "sensitivity", "values": "float32"}),
        ("random", {"pattern": "4x4", "sparsity": 0.5, "allocation": "erk"}),
        ("admm", {"sparsity": 0.6, "values": "int4"}),
        ("dsnot", {"pattern": "4:8", "options": {"start": "magnitude"}}),
    ],
)
def test_makes_what_was_asked_for(
    method: str, settings: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    done = compress(source, tmp_path / "out", method=method, **SMALL, **settings)
    model = load_checkpoint(done.path)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, StructuredLinear)}
    records = {record["name"]: record for record in done.made["layers"]}
    assert set(records) == set(layers) - {"lm_head"}
    pattern = parse_pattern(settings["pattern"]) if "pattern" in settings else None
    for name, record in records.items():
        matrix = layers[name].matrix
        assert isinstance(matrix, Packed)
        assert matrix.value_type.name == settings.get("values", "int4")
        assert record["bits_per_weight"] == matrix.bits_per_weight
        if pattern is not None and matrix.layout != "dense":
            check_mask(matrix.mask(), pattern)
        if matrix.layout != "dense":
            assert record["sparsity"] == pytest.approx(1 - float(matrix.mask().float().mean()))
    assert model.get_submodule("lm_head").matrix.value_type.name == settings.get("head_values", "int8")
    if settings.get("allocation", "uniform") != "uniform":
        asked = {r["sparsity_requested"] for r in records.values()}
        assert len(asked) > 1
        assert done.made["sparsity"] == pytest.approx(0.5, abs=0.01)

    plain, _ = load_model(source, torch.float32)
    for name, layer in layers.items():
        plain.get_submodule(name).weight.data = layer.matrix.to_dense().float()
    reference, packed = logits(plain), logits(model)
    # int8 activations and bfloat16 products lie between the two
    assert (reference - packed).norm() / reference.norm() < 0.05


@pytest.mark.parametrize("arch", ["gpt2", "opt", "qwen2", "mistral", "gemma2", "phi", "gpt_neox", "qwen3"])
def test_walks_architectures_without_drivers(arch: str, tmp_path: Path) -> None:
    source = tiny_folder(tmp_path / arch, arch)
    done = compress(
        source, tmp_path / "out", pattern="2:4", values="bfloat16", head_values="bfloat16", **SMALL
    )
    model, (plain, _) = load_checkpoint(done.path), load_model(source, torch.float32)
    found = [n for b in find_parts(plain).blocks for n in (f"{b.name}.{i}" for i in prunable(b))]
    assert [record["name"] for record in done.made["layers"]] == found
    for name in found:
        dense = model.get_submodule(name).matrix.to_dense().float()
        check_mask(dense != 0, parse_pattern("2:4"))
        weight_of(plain.get_submodule(name)).copy_(dense)
    reference = logits(plain)
    assert (reference - logits(model)).norm() / reference.norm() < 0.05


@pytest.mark.parametrize(
    ("arch", "tied"), [("llama", False), ("qwen2", True), ("opt", True), ("gpt_neox", False)]
)
def test_a_head_of_few_bits_is_rounded_by_what_it_reads(
    arch: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tiny_folder(tmp_path / arch, arch, tie_word_embeddings=tied)
    whole = compress(source, tmp_path / "whole", sparsity=0.0, head_values="int4", **SMALL)
    monkeypatch.setattr("gossamer.recipes.prune_layer.EDGE_ROWS", 100)
    parts = compress(source, tmp_path / "parts", sparsity=0.0, head_values="int4", **SMALL)
    assert digests(whole.path) == digests(parts.path)  # rows do not depend on each other
    assert whole.made["head_rounded"] == "by what it reads"
    model, (plain, _) = load_checkpoint(whole.path), load_model(source, torch.float32)
    for record in whole.made["layers"]:
        packed = model.get_submodule(record["name"]).matrix.to_dense().float()
        weight_of(plain.get_submodule(record["name"])).copy_(packed)
    head, dense = model.get_output_embeddings().matrix, plain.get_output_embeddings().weight.detach()
    nearest = Packed.pack(dense, "int4", "dense", 64)

    windows = calibration_windows(read_text(SMALL["calibration"]), load_tokenizer(source), 48, 4)
    seen: list[torch.Tensor] = []
    handle = plain.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        plain(windows)
    handle.remove()
    gram = (rows := seen[0].flatten(0, 1)).T @ rows

    def error(matrix: Packed) -> float:
        off = matrix.to_dense().float() - dense
        return float(((off @ gram) * off).sum())

    assert error(head) < 0.9 * error(nearest)
    table = model.get_input_embeddings().matrix
    if tied:
        assert torch.equal(table.to_dense(), head.to_dense())
    else:
        embedding = Packed.pack(plain.get_input_embeddings().weight, "int4", "dense", 64)
        assert torch.equal(table.to_dense(), embedding.to_dense())


@pytest.mark.parametrize(
    "settings", [{"head_values": "int8"}, {"method": "magnitude", "head_values": "int4"}]
)
def test_heads_of_many_bits_or_without_text_are_rounded_to_the_nearest(
    settings: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    done = compress(source, tmp_path / "out", sparsity=0.5, **SMALL, **settings)
    assert done.made["head_rounded"] == "to the nearest"
    plain, _ = load_model(source, torch.float32)
    nearest = Packed.pack(plain.lm_head.weight, settings["head_values"], "dense", 64)
    head = load_checkpoint(done.path).lm_head.matrix
    assert torch.equal(head.to_dense(), nearest.to_dense())


def test_the_sweep_beats_magnitude_on_its_own_statistics(source: Path, tmp_path: Path) -> None:
    def mean_error(method: str) -> float:
        made = compress(
            source, tmp_path / method, method=method, sparsity=0.5, values="float32", **SMALL
        ).made
        dense, sparse = load_model(source, torch.float32)[0], load_checkpoint(tmp_path / method)
        reference = logits(dense)
        assert made["sparsity"] == pytest.approx(0.5, abs=0.01)
        return float((reference - logits(sparse)).norm() / reference.norm())

    assert mean_error("obs") < 0.9 * mean_error("random")


def test_counts_are_exact_in_every_layer(source: Path, tmp_path: Path) -> None:
    done = compress(source, tmp_path / "out", method="wanda", sparsity=0.37, values="float32", **SMALL)
    for record in done.made["layers"]:
        rows, cols = record["shape"]
        assert round(record["sparsity"] * rows * cols) == rows * count_pruned(cols, 0.37)


def test_a_model_in_memory_takes_the_same_road(source: Path, tmp_path: Path) -> None:
    from_disk = compress(source, tmp_path / "a", **SMALL)
    in_memory = compress(tiny_model("llama"), tmp_path / "b", tokenizer=tiny_tokenizer(), **SMALL)
    assert torch.equal(logits(load_checkpoint(from_disk.path)), logits(load_checkpoint(in_memory.path)))
    assert not list(tmp_path.glob("*.source-*"))
    with pytest.raises(ModelError, match="a tokenizer goes with a model in memory"):
        compress(source, tmp_path / "c", tokenizer=tiny_tokenizer(), **SMALL)


def test_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "a", **SMALL)
    compress(source, tmp_path / "b", **SMALL)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    text = (tmp_path / "a" / "gossamer.json").read_text()
    assert str(tmp_path) not in text
    assert not (tmp_path / "a.work").exists()


class StopError(Exception):
    pass


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "wanda", "sparsity": 0.5, "allocation": "global"},
        {"head_values": "nl4", "tune": "blockwise"},
    ],
)
def test_resumes_from_every_stage_to_the_same_bytes(
    settings: dict[str, Any], source: Path, tmp_path: Path
) -> None:
    seen: list[tuple[str, int]] = []
    compress(source, tmp_path / "whole", progress=lambda s, d, t: seen.append((s, d)), **SMALL, **settings)
    assert len(seen) > 5
    for index, stop in enumerate(dict.fromkeys(seen)):
        out = tmp_path / f"out{index}"

        def interrupt(stage: str, done: int, total: int, stop: tuple[str, int] = stop) -> None:
            if (stage, done) == stop:
                raise StopError

        with pytest.raises(StopError):
            compress(source, out, progress=interrupt, **SMALL, **settings)
        if out.exists():  # stopped after the last step
            assert digests(out) == digests(tmp_path / "whole")
            continue
        again = compress(source, out, **SMALL, **settings)
        assert digests(out) == digests(tmp_path / "whole"), stop
        assert again.resumed


def test_gradients_and_curves_resume_too(source: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {**SMALL, "method": "fisher", "sparsity": 0.5, "allocation": "sensitivity"}
    compress(source, tmp_path / "whole", **settings)
    stops = [("gradients", 2), ("gradients", 6), ("scoring", 2), ("pruning", 1)]

    def interrupt(stage: str, done: int, total: int) -> None:
        if (stage, done) == stops[0]:
            raise StopError

    while stops:  # one run, interrupted at each in turn
        with pytest.raises(StopError):
            compress(source, tmp_path / "out", progress=interrupt, **settings)
        del stops[0]
    assert compress(source, tmp_path / "out", **settings).resumed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_kept_gradients_serve_other_runs_on_the_same_text(source: Path, tmp_path: Path) -> None:
    alike: list[dict[str, Any]] = [
        {"method": "fisher", "sparsity": 0.5},
        {"method": "taylor", "pattern": "2:4"},
        {"method": "wanda", "sparsity": 0.6, "allocation": "sensitivity"},
    ]
    kept = tmp_path / "gradients"
    passes: list[str] = []

    def count(stage: str, done: int, total: int) -> None:
        if stage == "gradients" and done == 0:
            passes.append(stage)

    for index, settings in enumerate(alike):
        alone, read = tmp_path / f"alone{index}", tmp_path / f"read{index}"
        compress(source, alone, **SMALL, **settings)
        compress(source, read, gradients=kept, progress=count, **SMALL, **settings)
        assert digests(alone) == digests(read)
    assert len(passes) == 1
    other = {**SMALL, "windows": SMALL["windows"] + 1}
    with pytest.raises(ResumeError, match="gradients holds work of another run: it differs in calibration"):
        compress(source, tmp_path / "c", gradients=kept, method="fisher", **other)
    assert (kept / "state.json").exists()
    assert not (tmp_path / "c.work").exists()
    same = {**SMALL, "method": "fisher", "sparsity": 0.5, "calibration": ["cat " * 5000]}
    compress(source, tmp_path / "e", gradients=tmp_path / "cats", **same)
    with pytest.raises(ResumeError, match="it differs in calibration"):  # the same tokens in other windows
        compress(source, tmp_path / "f", gradients=tmp_path / "cats", **{**same, "windows": 8, "seqlen": 24})
    apart = [("c", "c"), ("c/sub", "c"), ("c.work", "c"), ("c.work/gradients", "c"), ("c", "c/out")]
    for where, out in apart:
        with pytest.raises(OutputError, match="keep the gradients elsewhere"):
            compress(source, tmp_path / out, gradients=tmp_path / where, method="fisher", **SMALL)
    assert not (tmp_path / "c").exists()
    compress(source, tmp_path / "d", gradients=tmp_path / "none", sparsity=0.5, **SMALL)
    assert not (tmp_path / "none").exists()  # nobody asked for gradients


def test_kept_gradients_are_those_of_the_mean_that_is_asked_for(source: Path, tmp_path: Path) -> None:
    kept = tmp_path / "gradients"
    settings: dict[str, Any] = {**SMALL, "method": "taylor", "sparsity": 0.5, "gradients": kept}
    compress(source, tmp_path / "absolute", **settings)
    signed = {**settings, "options": {"mean": "signed"}}
    with pytest.raises(ResumeError, match=r"gradients averaged was 'absolute', now 'signed'"):
        compress(source, tmp_path / "signed", **signed)
    compress(source, tmp_path / "signed", **{**signed, "gradients": tmp_path / "apart"})
    weights = [(tmp_path / out / "gossamer.safetensors").read_bytes() for out in ("absolute", "signed")]
    assert weights[0] != weights[1]
    state = kept / "state.json"
    told = json.loads(state.read_text())
    del told["fingerprint"]["gradients averaged"]  # of the time when all were signed
    state.write_text(json.dumps(told))
    with pytest.raises(
        ResumeError, match=r"gradients averaged was None, now 'absolute'.*or delete gradients"
    ):
        compress(source, tmp_path / "again", **settings)


def test_gradients_are_read_once_and_only_where_somebody_asks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {"gradients": 0, "weights": 0}
    gradient, weight = Gradient.read, Visit.weight

    def count_gradient(path: Path, shape: tuple[int, int]) -> Gradient:
        read["gradients"] += 1
        return gradient(path, shape)

    def count_weight(visit: Visit, name: str) -> torch.Tensor:
        read["weights"] += 1
        return weight(visit, name)

    monkeypatch.setattr(Gradient, "read", count_gradient)
    monkeypatch.setattr(Visit, "weight", count_weight)
    settings = {**SMALL, "sparsity": 0.5}
    done = compress(source, tmp_path / "a", method="wanda", allocation="sensitivity", **settings)
    layers = len(done.made["layers"])
    assert read == {"gradients": layers, "weights": 2 * layers}  # one walk tries, the other prunes
    compress(source, tmp_path / "b", method="taylor", **settings)
    assert read == {"gradients": 2 * layers, "weights": 3 * layers}
    compress(source, tmp_path / "c", tune="blockwise", **settings)
    assert read == {"gradients": 2 * layers, "weights": 4 * layers}


def test_an_output_that_was_made_meanwhile_leaves_no_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*arguments: Any) -> torch.Tensor:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "gossamer.json").touch()
        return calibration_windows(*arguments)

    monkeypatch.setattr("gossamer.recipes.compress.calibration_windows", other)
    with pytest.raises(OutputError, match="exists already"):
        compress(source, tmp_path / "out", **SMALL)
    assert not (tmp_path / "out.work").exists()


def test_another_run_is_not_mixed_in(source: Path, tmp_path: Path) -> None:
    def interrupt(stage: str, done: int, total: int) -> None:
        if done == 2:
            raise StopError

    with pytest.raises(StopError):
        compress(source, tmp_path / "out", progress=interrupt, **SMALL)
    before = digests(tmp_path / "out.work")
    with pytest.raises(ResumeError, match="settings"):
        compress(source, tmp_path / "out", sparsity=0.7, **SMALL)
    with pytest.raises(ResumeError, match="calibration tokens"):
        compress(source, tmp_path / "out", **{**SMALL, "calibration": ["some other text " * 300]})
    shutil.copytree(source, tmp_path / "edited")
    config = json.loads((source / "config.json").read_text())
    (tmp_path / "edited" / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    with pytest.raises(ResumeError, match=r"it differs in model \(model.config.json was"):
        compress(tmp_path / "edited", tmp_path / "out", **SMALL)
    assert digests(tmp_path / "out.work") == before
    (tmp_path / "out.work" / "inputs-002.bin").write_bytes(b"short")
    with pytest.raises(ResumeError, match="damaged"):
        compress(source, tmp_path / "out", **SMALL)
    (tmp_path / "out.work" / "state.json").write_text("{")
    with pytest.raises(ResumeError, match="damaged"):
        compress(source, tmp_path / "out", **SMALL)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"sparsity": 1.0}, SparsityError, "fraction"),
        ({"sparsity": -0.1}, SparsityError, "fraction"),
        ({"pattern": "3:2"}, PatternError, "N:M"),
        ({"pattern": "128x1", "sparsity": 0.5}, PatternError, "do not fit"),
        ({"pattern": "2:4", "allocation": "global"}, MethodError, "cannot be allocated"),
        ({"sparsity": 0.5, "allocation": "sensitivity", "seqlen": 1}, MethodError, "2 tokens"),
        ({"method": "sorcery"}, MethodError, "there are"),
        ({"method": "taylor", "sparsity": 0.5, "seqlen": 1}, MethodError, "2 tokens"),
        ({"values": "int5"}, GossamerError, "int5"),
        ({"head_values": "int5"}, GossamerError, "int5"),
        ({"windows": 0}, GossamerError, "windows"),
        ({"speed": 11}, GossamerError, "speed"),
        ({"calibration": []}, TextError, "text"),
        ({"calibration": [""]}, TextError, "text"),
        ({"calibration": ["too short"]}, TextError, "token"),
        ({"calibration": "no/such/file.txt"}, TextError, "no"),
    ],
)
def test_bad_settings_end_before_any_work(
    settings: dict[str, Any], error: type[Exception], says: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=says):
        compress(source, tmp_path / "out", **{**SMALL, **settings})
    assert not (tmp_path / "out").exists()


def test_a_finished_output_is_never_overwritten(source: Path, tmp_path: Path) -> None:
    compress(source, tmp_path / "out", **SMALL)
    before = digests(tmp_path / "out")
    with pytest.raises(OutputError, match="exist"):
        compress(source, tmp_path / "out", **SMALL)
    assert digests(tmp_path / "out") == before


def test_damaged_and_foreign_models(tmp_path: Path) -> None:
    broken = tiny_model("llama")
    broken.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    with pytest.raises((ModelError, CalibrationError), match=r"layers\.1.*(NaN|finite)"):
        compress(tmp_path / "nan", tmp_path / "a", **SMALL)
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj.*NaN"):
        compress(tmp_path / "nan", tmp_path / "b", method="magnitude", sparsity=0.5)  # needs no text
    assert not (tmp_path / "a").exists()
    with pytest.raises(ModelError):
        compress(tmp_path / "nothing", tmp_path / "c", **SMALL)
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text(json.dumps({"model_type": "abacus"}))
    (tmp_path / "odd" / "model.safetensors").write_bytes(
        (tmp_path / "nan" / "model.safetensors").read_bytes()
    )
    with pytest.raises(ModelError, match=r"abacus|odd"):
        compress(tmp_path / "odd", tmp_path / "d", **SMALL)


def test_a_block_without_linears_is_named() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

    with pytest.raises(ModelError, match="no linear layer"):
        prunable(Plain())


def test_a_full_disk_keeps_finished_blocks(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Writing fails from the second block on; once there is room, the same call ends with the same bytes."""
    compress(source, tmp_path / "whole", **SMALL)
    real, calls = os.replace, 0

    def full(src: Any, dst: Any) -> None:
        nonlocal calls
        calls += "block-001" in str(dst) or calls > 0
        if calls:
            raise OSError(28, "No space left on device")
        real(src, dst)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        compress(source, tmp_path / "out", **SMALL)
    monkeypatch.undo()
    assert not (tmp_path / "out").exists()
    assert compress(source, tmp_path / "out", **SMALL).resumed
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


KILLED = """
import sys
from gossamer.recipes.compress import compress
text = open(sys.argv[3]).read()
print("imported", flush=True)
compress(sys.argv[1], sys.argv[2], windows=16, seqlen=96, calibration=[text])
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """SIGKILL twenty times; whatever is left must resume, and no half-written checkpoint may ever load."""
    source = tiny_folder(tmp_path / "model", hidden_size=128, intermediate_size=384, num_hidden_layers=8)
    (tmp_path / "text.txt").write_text(TEXT)

    def start(out: Path) -> subprocess.Popen[bytes]:
        arguments = [sys.executable, "-c", KILLED, str(source), str(out), str(tmp_path / "text.txt")]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE)
        assert process.stdout is not None  # its first line says that the imports are over
        with process.stdout:
            assert process.stdout.readline() == b"imported\n"
        return process

    began = time.monotonic()
    process = start(tmp_path / "whole")
    assert process.wait(timeout=300) == 0
    whole_time = time.monotonic() - began
    expected = digests(tmp_path / "whole")
    moments = random.Random(0)
    kills = finished = 0
    out = tmp_path / "out0"
    for _ in range(60):
        process = start(out)
        try:
            process.wait(timeout=whole_time * moments.uniform(0.0, 0.8) if kills < 20 else 300)
            assert process.returncode == 0
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
        if out.exists():
            assert digests(out) == expected
            load_checkpoint(out)
            finished += 1
            out = tmp_path / f"out{finished}"
            if kills >= 20:
                break
    assert kills == 20
    assert finished > 1
