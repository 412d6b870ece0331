"""Damaged checkpoints, by accident or on purpose: always a CheckpointError that names the tensor or file."""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_maker import (
    MADE,
    base_folder,
    filled_writer,
    patch_data,
    read_header,
    tampered,
    tiny_checkpoint,
    write_header,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gossamer.errors import CheckpointError
from gossamer.matrices.checksums import CHUNK
from gossamer.models import is_checkpoint, load_checkpoint, open_checkpoint
from gossamer.models.manifest import read_manifest
from gossamer.models.verify import verify_checkpoint
from tiny import tiny_model

Q = "model.layers.0.self_attn.q_proj.weight"  # int4, bitmap
K = "model.layers.0.self_attn.k_proj.weight"  # int4, 32:64
O = "model.layers.0.self_attn.o_proj.weight"  # float32, bitmap  # noqa: E741
NORM = "model.norm.weight"


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("good"), num_hidden_layers=1)[0]


@pytest.fixture(scope="module")
def bad(good: Path, tmp_path_factory) -> Path:
    """A copy to damage; every case puts back the file that it changed."""
    return Path(shutil.copytree(good, tmp_path_factory.mktemp("bad") / "out"))


def refuse(folder: Path, *names: str) -> str:
    """Asserts that ``folder`` does not load, that the error names ``names``; returns its text."""
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder)
    text = str(caught.value)
    for name in names:
        assert name in text, text
    return text


def refuse_bytes(bad: Path, file: str, data: bytes, *names: str) -> str:
    """The same with other bytes in one file, which are put back."""
    before = (bad / file).read_bytes()
    try:
        (bad / file).write_bytes(data)
        return refuse(bad, *names)
    finally:
        (bad / file).write_bytes(before)


def borders(folder: Path) -> dict[int, str]:
    """Where tensors begin in the weights file, by position."""
    header, _ = read_header(folder / "gossamer.safetensors")
    start = 8 + int.from_bytes((folder / "gossamer.safetensors").read_bytes()[:8], "little")
    return {
        start + entry["data_offsets"][0]: name
        for name, entry in header.items()
        if name != "__metadata__" and entry["data_offsets"][0] < entry["data_offsets"][1]
    }


# --- accidents --------------------------------------------------------------------------------------------


def test_truncation_at_every_border_and_around_the_header(bad):
    raw = (bad / "gossamer.safetensors").read_bytes()
    starts = borders(bad)
    data = min(starts)
    for length in [*range(20), *range(data - 10, data)]:
        refuse_bytes(bad, "gossamer.safetensors", raw[:length], "gossamer.safetensors")
    for position, name in starts.items():
        refuse_bytes(bad, "gossamer.safetensors", raw[:position], repr(name))
        refuse_bytes(bad, "gossamer.safetensors", raw[: position + 1], repr(name))
    refuse_bytes(bad, "gossamer.safetensors", raw[:-1], "truncated")
    refuse_bytes(bad, "gossamer.safetensors", raw + b"\0", "1 bytes follow")


FLIPS = settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FLIPS
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_data_names_its_tensor(bad, where, bit):
    raw = bytearray((bad / "gossamer.safetensors").read_bytes())
    starts = borders(bad)
    first = min(starts)
    position = first + int(where * (len(raw) - first))
    raw[position] ^= 1 << bit
    name = starts[max(start for start in starts if start <= position)]
    text = refuse_bytes(bad, "gossamer.safetensors", bytes(raw), f"the tensor {name!r}")
    assert "tensors" not in text.replace("gossamer.safetensors", "")


@FLIPS
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_the_header(bad, where, bit):
    raw = bytearray((bad / "gossamer.safetensors").read_bytes())
    raw[int(where * min(borders(bad)))] ^= 1 << bit
    refuse_bytes(bad, "gossamer.safetensors", bytes(raw), "gossamer.safetensors")


@pytest.mark.parametrize("file", ["gossamer.json", "config.json", "tokenizer.json"])
@settings(FLIPS, max_examples=60)
@given(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_text_file_names_it(bad, file, where, bit):
    raw = bytearray((bad / file).read_bytes())
    raw[int(where * len(raw))] ^= 1 << bit
    refuse_bytes(bad, file, bytes(raw), file)


@pytest.mark.parametrize("file", ["gossamer.json", "config.json", "tokenizer.json", "gossamer.safetensors"])
def test_missing_empty_and_short_files(bad, file):
    raw = (bad / file).read_bytes()
    for data in (b"", raw[:1], raw[: len(raw) // 2], raw[:-1], raw + b" "):
        refuse_bytes(bad, file, data, file)
    (bad / file).unlink()
    refuse(bad, file)
    (bad / file).mkdir()
    refuse(bad, file)
    (bad / file).rmdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(bad / file)
        refuse(bad, file, "not a regular file")
        (bad / file).unlink()
    (bad / file).write_bytes(raw)
    open_checkpoint(bad)


def test_swapped_tensors(bad):
    """Equal shapes, so that only checksums can tell."""
    path = bad / "gossamer.safetensors"
    raw = path.read_bytes()
    header, data = read_header(path)
    gate, up = (f"model.layers.0.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm"))
    header[gate], header[up] = header[up], header[gate]
    write_header(path, header, data)
    refuse(bad, repr(gate), repr(up))
    path.write_bytes(raw)
    swap_data(bad, gate, up)
    refuse(bad, repr(gate), repr(up))
    path.write_bytes(raw)
    # other shapes: named before any byte is read
    header, data = read_header(path)
    header[f"{Q}.values"], header[NORM] = header[NORM], header[f"{Q}.values"]
    write_header(path, header, data)
    refuse(bad, NORM)
    path.write_bytes(raw)


def swap_data(folder: Path, first: str, second: str) -> None:
    header, data = read_header(folder / "gossamer.safetensors")
    parts = [data[slice(*header[name]["data_offsets"])] for name in (first, second)]
    patch_data(folder, first, lambda part: part.__setitem__(slice(None), parts[1]))
    patch_data(folder, second, lambda part: part.__setitem__(slice(None), parts[0]))


def test_damage_past_the_first_chunk_and_in_several_tensors(tmp_path):
    model = tiny_model(num_hidden_layers=1, vocab_size=40_000)
    base = base_folder(tmp_path / "base", num_hidden_layers=1, vocab_size=40_000)
    folder = filled_writer(tmp_path / "out", base, model, {}).finish(MADE)
    path = folder / "gossamer.safetensors"
    raw = bytearray(path.read_bytes())
    assert len(raw) > 2 * CHUNK
    embedding = "model.embed_tokens.weight"
    begin = next(start for start, name in borders(folder).items() if name == embedding)
    raw[begin + CHUNK + 5] ^= 1
    path.write_bytes(raw)
    refuse(folder, f"the tensor {embedding!r}")
    for name in list(read_manifest(folder).tensors):
        patch_data(folder, name, lambda part: part.__setitem__(0, part[0] ^ 255))
    text = refuse(folder, "the tensors", "and 6 more")
    assert text.count("weight'") == 5
    with torch.no_grad():  # what was not asked for is not checked
        load_checkpoint(folder, verify="none")
    report = verify_checkpoint(folder)
    assert not report.ok
    assert "and 6 more" in report.problems[0]
    assert [file.name for file in report.files if file.problem] == ["gossamer.safetensors"]


def test_verify_reports_what_loading_refuses(bad):
    for file in ("config.json", "gossamer.safetensors"):
        raw = (bad / file).read_bytes()
        for data in (raw[:-1], b"", raw[:-1] + bytes([raw[-1] ^ 1])):
            (bad / file).write_bytes(data)
            report = verify_checkpoint(bad)
            assert not report.ok
            assert report.problems[0].startswith(file)
        (bad / file).unlink()
        assert "cannot be read" in verify_checkpoint(bad).problems[0]
        (bad / file).write_bytes(raw)
    assert verify_checkpoint(bad).ok


def test_what_is_no_checkpoint(tmp_path, good):
    refuse(tmp_path / "nowhere", "there is no folder")
    refuse(tmp_path, "not a Gossamer checkpoint")
    refuse(good.parent / "base", "not a Gossamer checkpoint")
    refuse(good / "config.json")
    assert not is_checkpoint(tmp_path)
    with pytest.raises(CheckpointError):
        verify_checkpoint(tmp_path)


# --- files that agree with their own checksums, and lie ---------------------------------------------------


def lie(good: Path, tmp_path: Path, change: Any, *names: str) -> str:
    return refuse(tampered(good, tmp_path / "lie", change), *names)


def test_an_honest_copy_loads(good, tmp_path):
    load_checkpoint(tampered(good, tmp_path / "same", lambda folder, manifest: None))


def keep_one_more(part: bytearray) -> None:
    """Sets the first bit that is not set: 513 kept weights where 512 have values."""
    byte = next(at for at, value in enumerate(part) if value != 255)
    part[byte] |= part[byte] + 1


def test_popcounts_and_offsets_that_disagree(good, tmp_path):
    for layer in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"):
        name = f"model.layers.0.{layer}.weight"
        lie(
            good,
            tmp_path,
            lambda folder, _, name=name: patch_data(folder, f"{name}.masks", keep_one_more),
            repr(name),
        )

    def fill(part):
        part[:] = b"\xff" * len(part)

    lie(good, tmp_path, lambda folder, _: patch_data(folder, f"{K}.masks", fill), repr(K))
    for index in range(3):

        def move(part, index=index):
            part[8 * index] ^= 64

        lie(good, tmp_path, lambda folder, _, move=move: patch_data(folder, f"{Q}.offsets", move), repr(Q))


def test_offsets_that_would_leave_memory(good, tmp_path):
    for value in (-1, -(2**63), 2**62, 2**63 - 1):

        def jump(part, value=value):
            part[8:16] = value.to_bytes(8, "little", signed=True)

        lie(good, tmp_path, lambda folder, _, jump=jump: patch_data(folder, f"{O}.offsets", jump), repr(O))


def test_scales_that_are_not_finite(good, tmp_path):
    def infinite(part):
        part[0:2] = b"\x00\x7c"

    lie(good, tmp_path, lambda folder, _: patch_data(folder, f"{Q}.scales", infinite), repr(Q))


def test_swapped_matrices_with_right_checksums(good, tmp_path):
    """o_proj and q_proj have one shape, but other values and masks."""

    def swap_names(folder, manifest):
        header, data = read_header(folder / "gossamer.safetensors")
        for section in ("values", "masks", "offsets"):
            a, b = f"{Q}.{section}", f"{O}.{section}"
            header[a], header[b] = header[b], header[a]
            manifest["tensors"][a], manifest["tensors"][b] = manifest["tensors"][b], manifest["tensors"][a]
        write_header(folder / "gossamer.safetensors", header, data)

    lie(good, tmp_path, swap_names, Q)

    def swap_descriptions(folder, manifest):
        table = manifest["matrices"]
        table[Q], table[K] = table[K], table[Q]

    lie(good, tmp_path, swap_descriptions, "proj")


def test_missing_and_extra_tensors(good, tmp_path):
    def drop(name, listed):
        def change(folder, manifest):
            header, data = read_header(folder / "gossamer.safetensors")
            begin, end = header.pop(name)["data_offsets"]
            for entry in header.values():
                if "data_offsets" in entry and entry["data_offsets"][0] >= end:
                    entry["data_offsets"] = [at - (end - begin) for at in entry["data_offsets"]]
            write_header(folder / "gossamer.safetensors", header, data[:begin] + data[end:])
            if listed:
                del manifest["tensors"][name]

        return change

    for name in (f"{Q}.masks", f"{Q}.values", f"{K}.scales", NORM):
        owner = name.rpartition(".")[0] if name != NORM else name
        lie(good, tmp_path, drop(name, listed=False), repr(name), "missing")
        lie(good, tmp_path, drop(name, listed=True), owner)

    def add(name, listed):
        def change(folder, manifest):
            header, data = read_header(folder / "gossamer.safetensors")
            header[name] = {"dtype": "U8", "shape": [64], "data_offsets": [len(data), len(data) + 64]}
            write_header(folder / "gossamer.safetensors", header, data + bytes(64))
            if listed:
                manifest["tensors"][name] = {"dtype": "U8", "shape": [64], "crc32": 0}

        return change

    lie(good, tmp_path, add("model.extra", listed=False), "'model.extra'")
    lie(good, tmp_path, add("model.extra", listed=True), "'model.extra'")
    lie(good, tmp_path, add(f"{Q}.extra", listed=True), repr(Q))

    def forget(folder, manifest):
        del manifest["matrices"][Q]

    lie(good, tmp_path, forget, Q)


def test_wrong_shapes_and_dtypes(good, tmp_path):
    def reshape(name, shape, kind=None):
        def change(folder, manifest):
            header, data = read_header(folder / "gossamer.safetensors")
            header[name]["shape"] = shape
            manifest["tensors"][name]["shape"] = shape
            if kind:
                header[name]["dtype"] = manifest["tensors"][name]["dtype"] = kind
            write_header(folder / "gossamer.safetensors", header, data)

        return change

    lie(good, tmp_path, reshape(NORM, [2, 32]), repr(NORM))
    lie(good, tmp_path, reshape(NORM, [32], "I64"), repr(NORM))
    lie(good, tmp_path, reshape(NORM, [64], "I32"), repr(NORM))
    lie(good, tmp_path, reshape(f"{Q}.masks", [1, 64], None), repr(Q), "masks")
    lie(good, tmp_path, reshape(f"{K}.masks", [64, 1], None), K)
    lie(good, tmp_path, reshape(f"{K}.masks", [64], "F64"), K)

    def grow(shape):
        def change(folder, manifest):
            manifest["matrices"][Q]["shape"] = shape

        return change

    for shape in ([64, 128], [128, 64], [2**62, 64], [64, 2**62], [2**62, 2**62], [0, 64], [-64, 64]):
        lie(good, tmp_path, grow(shape), repr(Q))
    for shape in ([64.0, 64], ["64", 64], [True, 64], [64], [], None, {"a": 1}, 10**30):
        lie(good, tmp_path, grow(shape), repr(Q))

    def only_header(folder, manifest):
        header, data = read_header(folder / "gossamer.safetensors")
        header[f"{O}.values"]["shape"] = [2**62]
        header[f"{O}.values"]["data_offsets"][1] += 2**62
        write_header(folder / "gossamer.safetensors", header, data)

    lie(good, tmp_path, only_header, f"{O}.values")


def config_change(**settings: Any) -> Any:
    def change(folder, manifest):
        config = json.loads((folder / "config.json").read_text())
        config.update(settings)
        (folder / "config.json").write_text(json.dumps(config))

    return change


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"hidden_size": 128}, []),
        ({"vocab_size": 385}, ["embed_tokens"]),
        ({"intermediate_size": 64}, ["mlp"]),
        ({"num_hidden_layers": 2}, ["model.layers.1"]),
        ({"num_hidden_layers": 0}, ["model.layers.0"]),
        ({"num_key_value_heads": 4}, ["k_proj"]),
        ({"attention_bias": True}, ["bias"]),
        ({"tie_word_embeddings": False, "model_type": "gpt2"}, []),
        # huge: refused before memory or time is spent
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers"]),
        ({"num_hidden_layers": -1}, []),
        ({"num_hidden_layers": "three"}, []),
        ({"vocab_size": 2**62}, []),
        ({"hidden_size": 2**40}, []),
        ({"head_dim": 2**40}, []),
        ({"head_dim": 2**34, "num_attention_heads": 1, "num_key_value_heads": 1}, []),
        ({"intermediate_size": 2**62}, []),
        ({"num_attention_heads": 0}, []),
        ({"hidden_size": None}, []),
        ({"rope_parameters": {"rope_type": "unheard of"}}, []),
        ({"model_type": "unheard_of"}, []),
        ({"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}, []),
        ({"architectures": 3, "model_type": ["llama"]}, []),
    ],
)
def test_configurations_that_disagree(good, tmp_path, settings, names):
    lie(good, tmp_path, config_change(**settings), *names)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "null", "3", '{"a":', "{" * 100_000, "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1"],
)
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_broken_configuration_files(good, tmp_path, file, text):
    lie(good, tmp_path, lambda folder, _: (folder / file).write_text(text), file)


def manifest_text(bad: Path, text: str, *names: str) -> str:
    return refuse_bytes(bad, "gossamer.json", text.encode(), "gossamer.json", *names)


def test_broken_manifests(bad):
    manifest_text(bad, "[" * 100_000 + "]" * 100_000)
    manifest_text(bad, '{"a":' * 100_000 + "1" + "}" * 100_000, "nested too deeply")
    manifest_text(bad, '{"format":"gossamer","format":"gossamer"}', "'format' appears twice")
    manifest_text(bad, '{"a":NaN}', "NaN")
    manifest_text(bad, '{"a":1e999}')
    manifest_text(bad, '{"a":' + "9" * 10_000 + "}")
    text = (bad / "gossamer.json").read_text()
    manifest_text(bad, text.replace("\n", "\r\n"), "bytes are not those")
    manifest_text(bad, json.dumps(json.loads(text), sort_keys=True), "bytes are not those")


def sealed(change: Any) -> Any:
    return lambda folder, manifest: change(manifest)


def test_schemas(good, tmp_path):
    lie(good, tmp_path, sealed(lambda m: m.update(schema=2)), "schema 2", "newer", "upgrade")
    for schema in (0, -1, "1", 1.0, None, True, [1]):
        lie(good, tmp_path, sealed(lambda m, schema=schema: m.update(schema=schema)), "gossamer.json")
    for key in ("format", "schema", "files", "made", "matrices", "tensors", "ties"):
        lie(good, tmp_path, sealed(lambda m, key=key: m.pop(key)), key)
        lie(good, tmp_path, sealed(lambda m, key=key: m.update({key: 3.5})), key)
    lie(good, tmp_path, sealed(lambda m: m.update(surprise=1)), "surprise")
    lie(good, tmp_path, sealed(lambda m: m["tensors"][NORM].update(surprise=1)), "surprise")
    lie(good, tmp_path, sealed(lambda m: m["files"].pop("config.json")), "config.json")
    for name in ("/etc/passwd", "../x", "a/../../x", "a\\b", "./config.json", "", ".", "gossamer.json"):
        record = {"size": 0, "sha256": "0" * 64, "crc32": []}
        lie(good, tmp_path, sealed(lambda m, name=name, r=record: m["files"].update({name: r})), "files")


def test_checksums_of_a_wrong_form(good, tmp_path):
    for key, value in [
        ("size", -1),
        ("size", 2**62),
        ("size", 2**70),
        ("size", 1.5),
        ("crc32", []),
        ("crc32", [0]),
        ("crc32", [-1]),
        ("crc32", [2**32]),
        ("crc32", [0, 0]),
        ("sha256", ""),
        ("sha256", "g" * 64),
    ]:
        target = tmp_path / "lie"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(good, target)
        manifest = json.loads((target / "gossamer.json").read_text())
        files = json.loads(json.dumps(manifest["files"]))
        files["config.json"][key] = value
        seal_with(target, manifest, files)
        refuse(target, "config.json")


def seal_with(folder: Path, manifest: dict[str, Any], files: dict[str, Any]) -> None:
    """gossamer.json with these file records, right or wrong, under a right CRC of its own."""
    manifest = {**manifest, "files": files}
    manifest.pop("crc32")
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    manifest["crc32"] = zlib.crc32(text.encode())
    (folder / "gossamer.json").write_text(json.dumps(manifest, sort_keys=True, indent=1) + "\n")


def test_ties_that_lead_nowhere(good, tmp_path):
    for ties in (
        {"lm_head.weight": "lm_head.weight"},
        {"lm_head.weight": "nothing"},
        {"lm_head.weight": Q},
        {NORM: "model.embed_tokens.weight"},
        {"model.extra": "model.embed_tokens.weight"},
        {"lm_head.weight": "model.embed_tokens.weight.values"},
    ):
        lie(good, tmp_path, sealed(lambda m, ties=ties: m.update(ties=ties)))


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(
        ["packed", "sum", "product", "dense", "sparse", "low_rank", "int4", "64:64", "0:64", "٣"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["kind", "shape", "layout", "values", "group", "clamped", "parts"]), inner
        )
    ),
    max_leaves=8,
)


@settings(FLIPS, max_examples=100)
@given(key=st.sampled_from(["kind", "shape", "layout", "values", "group", "parts"]), value=JSON)
def test_any_description(good, tmp_path_factory, key, value):
    """Checked through Contents.matrix, which loading uses: a whole load per case would be slow."""
    folder = tmp_path_factory.mktemp("description")

    def change(_, manifest):
        manifest["matrices"][Q][key] = value

    contents = open_checkpoint(tampered(good, folder / "lie", change))
    if value == open_checkpoint(good).manifest.matrices[Q].get(key) or key == "parts":
        contents.matrix(Q)
        return
    with pytest.raises(CheckpointError, match=Q):
        contents.matrix(Q)


def test_deep_descriptions(good, tmp_path):
    deep: Any = {"kind": "packed"}
    for _ in range(300):
        deep = {"kind": "sum", "shape": [64, 64], "parts": [deep]}

    def change(folder, manifest):
        manifest["matrices"][Q] = deep

    lie(good, tmp_path, change)


def test_no_code_of_the_folder_is_run_or_asked_about(good, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *question: asked.append(question) or "y")

    def change(folder, manifest):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        config_change(model_type="evil", auto_map={"AutoConfig": "evil.Config"})(folder, manifest)

    lie(good, tmp_path, change, "config.json")
    assert not asked
    assert not (tmp_path / "ran").exists()
