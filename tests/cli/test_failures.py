"""Whatever a person can do wrong: one sentence on stderr, exit code 2, nothing overwritten."""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from cli_run import SMALL, Outcome, run

from gossamer import kernels
from tiny import tiny_folder, tiny_model, tiny_tokenizer


def refused(done: Outcome, *words: str) -> None:
    """One line that begins with "error:", holds all words, and is a sentence for people."""
    assert done.code == 2, done
    assert done.out == ""
    line = done.err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    assert "Traceback" not in done.err
    for word in words:
        assert word in line, line


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--sparsity", "1.0"), ("sparsity", "1.0")),
        (("--sparsity", "-0.2"), ("sparsity", "-0.2")),
        (("--sparsity", "nan"), ("sparsity", "nan")),
        (("--pattern", "5:4"), ("5:4",)),
        (("--pattern", "half"), ("half", "2:4")),
        (("--pattern", "2:4", "--sparsity", "0.3"), ("2:4", "0.3")),
        (("--pattern", "512x512", "--sparsity", "0.5"), ("512x512", "do not fit")),
        (("--pattern", "2:4", "--allocation", "global"), ("global",)),
        (("--allocation", "fair"), ("fair", "uniform")),
        (("--budget", "60MB"), ("60MB", "sensitivity", "uniform")),
        (("--budget", "1B", "--allocation", "sensitivity"), ("1B", "out of reach", "all dense")),
        (("--method", "wandar"), ("wandar", "did you mean 'wanda'")),
        (("--values", "int5"), ("int5", "int4")),
        (("--head-values", "int5"), ("int5",)),
        (("--group", "48"), ("48", "64")),
        (("--option", "damping"), ("KEY=VALUE", "damping")),
        (("--tune-option", "epochs"), ("--tune-option is written KEY=VALUE", "epochs")),
        (("--option", "speed=3"), ("speed",)),
        (("--option", "order=random"), ("random", "natural")),
    ],
)
def test_settings_that_cannot_be(
    arguments: tuple[str, ...], words: tuple[str, ...], model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    refused(run("compress", model, "-o", out, "--calibration", text, *SMALL, *arguments), *words)
    assert not out.exists()


def test_calibration_that_cannot_be(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty.txt").write_text("  \n")
    (tmp_path / "short.txt").write_text("A few words only.")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "none").mkdir()
    for name, words in {
        "empty.txt": ("empty",),
        "short.txt": ("short.txt", "13 tokens", "49"),
        "bytes.txt": ("bytes.txt", "UTF-8"),
        "none": ("none", "no text"),
        "missing.txt": ("missing.txt", "no text file"),
    }.items():
        refused(run("compress", model, "-o", out, "--calibration", tmp_path / name, *SMALL), *words)
        assert not out.exists()
        assert not out.with_name("out.work").exists()
    both = ("--calibration", text, "--calibration", tmp_path / "short.txt")
    refused(run("compress", model, "-o", out, *both, *SMALL), "short.txt", "13 tokens", "49")
    refused(run("compress", model, "-o", out, *both, *SMALL, "--windows", "1"), "1 windows", "2 texts")
    assert "an empty name is no text" in run("compress", model, "-o", out, "--calibration", "").err
    refused(run("eval", model, "--text", tmp_path / "short.txt", "--seqlen", "256"), "short.txt", "256")


def test_windows_longer_than_the_context(model: Path, text: Path, tmp_path: Path) -> None:
    refused(run("eval", model, "--text", text, "--seqlen", "1024"), "1024", "512")
    refused(run("bench", model, "--prompt", "500", "--decode", "50"), "512 positions")
    long = run("compress", model, "-o", tmp_path / "out", "--calibration", text, "--seqlen", "1024")
    refused(long, "1024", "512", "--seqlen", "--set compress.seqlen=512")


def test_models_that_cannot_be(text: Path, tmp_path: Path) -> None:
    options = ("-o", tmp_path / "out", "--calibration", text, *SMALL)
    refused(run("compress", tmp_path / "nowhere", *options), "nowhere", "org/name")
    (tmp_path / "hollow").mkdir()
    refused(run("compress", tmp_path / "hollow", *options), "hollow", "no model")
    odd = tiny_folder(tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "abacus"}))
    for command in (("compress", odd, *options), ("info", odd), ("eval", odd), ("run", odd, "hello")):
        refused(run(*command), "odd", "abacus")
    assert not (tmp_path / "out").exists()


NATIVE = {
    "run": ("run", "hello", "--engine", "native"),
    "bench": ("bench", "--prompt", "8", "--decode", "2", "--repeats", "1", "--engine", "native"),
    "profile": ("bench", "--prompt", "8", "--decode", "2", "--profile"),
}


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
@pytest.mark.parametrize("command", NATIVE)
def test_damaged_models_in_the_native_decoder(
    command: str, checkpoint: Path, model: Path, tmp_path: Path
) -> None:
    """Every file of a model empty or cut in half, a family that nobody knows and numbers that cannot be."""
    name, *options = NATIVE[command]

    def copy(of: Path) -> Path:
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        return shutil.copytree(of, tmp_path / "copy")

    for of in (model, checkpoint):
        for file in sorted(path.name for path in of.iterdir() if path.suffix != ".jinja"):
            data = (of / file).read_bytes()
            for kept in (0, len(data) // 2, len(data) - 2):
                folder = copy(of)
                (folder / file).write_bytes(data[:kept])
                refused(run(name, folder, *options))
    for changes, words in (
        ({"model_type": "abacus"}, ("copy", "abacus")),
        ({"num_attention_heads": 5}, ("copy", "multiple of the number of attention heads")),
        ({"rms_norm_eps": float("nan")}, ("copy", "rms_norm_eps", "NaN")),
        ({"rms_norm_eps": -1.0}, ("native decoder", "-1.0")),
    ):
        folder = copy(model)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))
        refused(run(name, folder, *options), *words)
    (tmp_path / "empty.gguf").write_bytes(b"")
    refused(run(name, tmp_path / "empty.gguf", *options), "empty.gguf", "no GGUF file")


def test_nan_weights(text: Path, tmp_path: Path) -> None:
    broken = tiny_model("llama")
    broken.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    tiny_tokenizer().save_pretrained(tmp_path / "nan")
    done = run("compress", tmp_path / "nan", "-o", tmp_path / "out", "--calibration", text, *SMALL)
    refused(done, "layers.2.mlp.down_proj", "NaN")
    assert not (tmp_path / "out").exists()
    # two blocks were done; where none was, nothing is left that would stand in the mended model's way
    assert (tmp_path / "out.work").exists()
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    for method in ("wanda", "magnitude"):
        again = ("-o", tmp_path / "again", "--method", method, "--calibration", text, *SMALL)
        refused(run("compress", tmp_path / "nan", *again), "layers.0.mlp.down_proj", "NaN")
        assert not (tmp_path / "again.work").exists()


def test_a_model_without_prunable_layers(text: Path, tmp_path: Path) -> None:
    """An architecture of this test's own, whose blocks only scale."""
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutput

    class Config(PreTrainedConfig):
        model_type = "only-norms"

        def __init__(self, hidden_size: int = 32, **rest: object) -> None:
            self.vocab_size, self.hidden_size = 384, hidden_size
            super().__init__(**rest)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(32)

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.norm(hidden)

    class Model(PreTrainedModel):
        config_class = Config

        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
            self.layers = nn.ModuleList([Scale(), Scale()])
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
            self.post_init()

        def forward(self, input_ids: torch.Tensor, **rest: object) -> CausalLMOutput:
            hidden = self.embed(input_ids)
            for layer in self.layers:
                hidden = layer(hidden)
            return CausalLMOutput(logits=self.lm_head(hidden))

    AutoConfig.register("only-norms", Config)
    AutoModelForCausalLM.register(Config, Model)
    Model(Config()).save_pretrained(tmp_path / "norms")
    tiny_tokenizer().save_pretrained(tmp_path / "norms")
    done = run("compress", tmp_path / "norms", "-o", tmp_path / "out", "--calibration", text, *SMALL)
    refused(done, "walked block by block")
    assert not (tmp_path / "out").exists()


def test_an_output_that_exists_is_kept(checkpoint: Path, model: Path, text: Path, tmp_path: Path) -> None:
    before = digests(checkpoint)
    refused(run("compress", model, "-o", checkpoint, "--calibration", text, *SMALL), "exists already")
    assert digests(checkpoint) == before
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("years of work")
    refused(run("compress", model, "-o", tmp_path / "notes", *SMALL), "exists already")
    refused(run("export", checkpoint, "-o", tmp_path / "notes"), "exists already")
    (tmp_path / "other.work").mkdir()
    (tmp_path / "other.work" / "thesis.txt").write_text("years of work")
    refused(run("compress", model, "-o", tmp_path / "other", "--calibration", text, *SMALL), "other.work")
    assert (tmp_path / "other.work" / "thesis.txt").read_text() == "years of work"
    assert (tmp_path / "notes" / "thesis.txt").read_text() == "years of work"


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Inside, no file of this process may grow past ``size`` bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [1_000, 12_000, 60_000])
def test_a_full_disk(size: int, checkpoint: Path, model: Path, text: Path, tmp_path: Path) -> None:
    """Inputs of the next block (24 kB), a block's weights, or at the end the whole model do not fit."""
    out = tmp_path / "out"
    command = ("compress", model, "-o", out, "--calibration", text, *SMALL)
    with largest_file(size):
        done = run(*command)
    refused(done, "cannot write", "File too large")
    assert not out.exists()
    again = run(*command)
    assert again.code == 0, again.err
    assert digests(out) == digests(checkpoint)


def test_damaged_checkpoints(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    manifest = (copy / "gossamer.json").read_bytes()
    (copy / "gossamer.json").write_bytes(manifest[: len(manifest) // 2])
    for command in (
        ("info", copy),
        ("verify", copy),
        ("run", copy, "hi"),
        ("export", copy, "-o", tmp_path / "x"),
    ):
        refused(run(*command), "gossamer.json")
    (copy / "gossamer.json").write_bytes(manifest)
    whole = (copy / "gossamer.safetensors").read_bytes()
    (copy / "gossamer.safetensors").write_bytes(whole[:-100])
    told = run("info", copy, "--json").document
    size = f"{len(whole) - 100:,} bytes and was written with {len(whole):,}"
    assert told["problems"] == [f"gossamer.safetensors: has {size}"]
    assert "damaged" in run("info", copy).out
    (copy / "gossamer.safetensors").unlink()
    assert "cannot be read" in run("info", copy, "--json").document["problems"][0]
    (copy / "gossamer.safetensors").write_bytes(whole)
    assert run("info", copy, "--json").document["problems"] == []
    data = bytearray((copy / "gossamer.safetensors").read_bytes())
    data[-50] ^= 1
    (copy / "gossamer.safetensors").write_bytes(data)
    refused(run("eval", copy, "--windows", "1", "--seqlen", "32"), "checksum", "copy")
    refused(run("verify", model), "not a Gossamer checkpoint")


def test_usage_errors(model: Path) -> None:
    for arguments in (
        ("compres", model),
        ("compress", model),  # no output named
        ("eval", model, "--windows", "many"),
        ("eval", model, "--frobnicate"),
        ("bench",),
        ("run", model, "hi", "--max-new-tokens", "0"),
    ):
        done = run(*arguments)
        assert done.code == 2, arguments
        assert "Usage" in done.err
        assert done.out == ""
    refused(run("run", model, "hi", "--top-p", "1.5"), "top_p", "1.5")
    refused(run("run", model, "", "--raw"), "empty")
    refused(run("run", model, "hi", "--stop", ""), "stop string", "empty")
    refused(run("chat", model, "--temperature", "-1", stdin="hi\n"), "temperature", "-1")


def test_debug_shows_the_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOSSAMER_DEBUG", "1")
    done = run("verify", tmp_path)
    assert done.code == 2
    assert "Traceback" in done.err
    assert "CheckpointError" in done.err


@pytest.mark.parametrize("command", ["compress", "shrink", "tune", "sample"])
def test_an_output_without_a_name(
    command: str, model: Path, checkpoint: Path, text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    done = run(command, checkpoint if command == "tune" else model, "-o", ".")
    assert done.code == 2
    assert "exists already" in done.err
    assert not (model.parent / f"{model.name}.work").exists()


def test_more_threads_than_a_machine_could_have(model: Path, tmp_path: Path) -> None:
    done = run("compress", model, "-o", tmp_path / "out", "--method", "magnitude", "--threads", 100_000)
    assert done.code == 2
    assert "this machine has" in done.err


def test_a_checkpoint_is_no_dense_model(checkpoint: Path, tmp_path: Path) -> None:
    done = run("compress", checkpoint, "-o", tmp_path / "out", *SMALL)
    assert done.code == 2
    assert "is a Gossamer checkpoint" in done.err


def test_what_is_refused_leaves_nothing_that_blocks_the_right_command(
    checkpoint: Path, model: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    options = (
        "--teacher",
        model,
        "--text",
        text,
        "--tokens",
        128,
        "--seqlen",
        32,
        "--batch",
        2,
        "--held-out",
        1,
    )
    refused = run("tune", checkpoint, "-o", out, *options, "--method", "jackpot")
    assert refused.code == 2
    broken = tiny_model()
    broken.model.norm.weight.data[0] = float("nan")
    broken.save_pretrained(tmp_path / "broken")
    for file in model.glob("token*"):
        shutil.copy(file, tmp_path / "broken")
    refused = run("tune", checkpoint, "-o", out, "--teacher", tmp_path / "broken", *options[2:])
    assert refused.code == 2
    assert "not finite" in refused.err
    assert run("tune", checkpoint, "-o", out, *options).code == 0
    assert "full, kl, 128 tokens" in run("info", out).out
    written = tmp_path / "own.jsonl"
    sampled = ("sample", model, "-o", written, "--text", text, "--tokens", 8)
    assert run(*sampled, "--prompt-tokens", 5000).code == 2
    assert run(*sampled, "--prompt-tokens", 4, "--max-new-tokens", 4).code == 0


def test_options_of_losses_name_theirs(checkpoint: Path, tmp_path: Path) -> None:
    for given in ("temperature", "kl.temperature"):
        done = run("tune", checkpoint, "-o", tmp_path / "out", "--tokens", "64", "--loss-option", given)
        refused(done, "--loss-option is written LOSS.KEY=VALUE")


def test_options_that_are_not_there_are_followed_by_those_that_are(model: Path, tmp_path: Path) -> None:
    done = run("compress", model, "-o", tmp_path / "out", "--option", "dampin=3", *SMALL)
    assert done.code == 2
    assert "there is no 'dampin' (there are: damping, order)" in " ".join(done.err.split())
    done = run("compress", model, "-o", tmp_path / "out", "--option", "damping=abc", *SMALL)
    assert done.code == 2
    assert "takes as damping a finite number, got 'abc'" in " ".join(done.err.split())
