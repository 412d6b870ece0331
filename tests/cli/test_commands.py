"""Each command on a tiny model: what it prints, and its one JSON document."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_run import SMALL, run

from gossamer import kernels
from gossamer.bench.memory import Memory
from gossamer.calibrate import fast_dtype
from gossamer.cli.compress import compress as command
from gossamer.cli.tune import tune as tune_command
from gossamer.dynamic.activations import METHODS as ACTIVATIONS
from gossamer.dynamic.attention import POLICIES
from gossamer.dynamic.cache import CACHES
from gossamer.evaluate.size import size_of_folder
from gossamer.prune import FORMATS, METHODS
from gossamer.recipes.compress_settings import CompressSettings
from gossamer.recipes.finetune_settings import FinetuneSettings
from gossamer.recipes.modules import MODULES
from gossamer.shrink import DEPTH
from gossamer.sparse.allocate import ALLOCATIONS
from gossamer.tune import TUNERS, WEIGHTS
from gossamer.tune.losses import LOSSES
from gossamer.tune.self_data import PROMPTS
from gossamer.version import VERSION
from tiny import tiny_folder, tiny_model, tiny_tokens


def test_compress_says_what_it_made(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run(
        "compress", model, "-o", out, "--calibration", text, *SMALL, "--pattern", "2:4", "--values", "bf16",
        "--head-values", "bf16", "--option", "damping=0.05", "--option", "order=natural", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    told = done.document
    size = size_of_folder(out)
    assert told["out"] == str(out)
    assert told["linear_bits"] == pytest.approx(size.linear_bits)
    assert told["all_bits"] == pytest.approx(size.all_bits)
    assert told["parameters"] == size.parameters
    assert told["weight_file_bytes"] == size.weight_file_bytes
    assert told["file_bytes"] == size.file_bytes
    assert told["weight_file_bytes_before"] == (model / "model.safetensors").stat().st_size
    assert told["sparsity"] == pytest.approx(0.5) == told["sparsity_requested"]
    errors = {layer["name"]: layer["output_error"] for layer in told["made"]["layers"]}
    assert told["layer_error"]["worst"] == max(errors.values())
    assert errors[told["layer_error"]["worst_layer"]] == max(errors.values())
    assert told["layer_error"]["mean"] == pytest.approx(sum(errors.values()) / len(errors))
    assert told["made"]["settings"]["options"] == {"damping": 0.05, "order": "natural"}
    assert told["made"]["pattern"] == "2:4"
    assert told["peak_memory_bytes"] > 50e6
    assert told["seconds"] > 0
    assert told["resumed"] is False


def test_compress_takes_several_texts(model: Path, text: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("Of another kind altogether. " * 40)
    both = ("--calibration", text, "--calibration", other)
    done = run("compress", model, "-o", tmp_path / "out", *both, *SMALL, "--json")
    assert done.code == 0, done.err
    assert done.document["made"]["calibration"]["text"] == f"{text.name} + other.txt"


def test_compress_prints_a_table_and_the_next_command(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run("compress", model, "-o", out, *SMALL, "--method", "magnitude", "--sparsity", "0.25")
    assert done.code == 0, done.err
    for word in ("bits a weight", "25 % requested, 25 % achieved", "worst", "took", "peak memory", "smaller"):
        assert word in done.out
    assert f"next: gossamer eval {out} --against {model}" in done.out
    assert "smoke test" not in done.out  # magnitude reads no text
    more = ("--calibration", "text", "--method", "magnitude", "--sparsity", "0.25")
    done = run("compress", model, "-o", tmp_path / "other", *SMALL, *more)
    assert "magnitude reads no text: --calibration had no effect" in done.out


def test_compress_says_where_gradients_are_not_read(model: Path, tmp_path: Path) -> None:
    kept = tmp_path / "gradients"
    for method in ("taylor", "wanda"):
        more = ("--method", method, "--sparsity", "0.25", "--gradients", kept)
        done = run("compress", model, "-o", tmp_path / method, *SMALL, *more)
        assert done.code == 0, done.err
        assert kept.is_dir()
        assert ("nothing here reads gradients" in done.out) == (method == "wanda")


def test_compress_sets_options_of_the_allocation(model: Path, text: Path, tmp_path: Path) -> None:
    """Blocks lie as far apart as owl's λ lets them."""
    more = ("--calibration", text, "--method", "wanda", "--sparsity", "0.5", "--allocation", "owl")
    for spread in (0.05, 0.3):
        out = tmp_path / str(spread)
        done = run(
            "compress", model, "-o", out, *SMALL, *more, "--allocation-option", f"spread={spread}", "--json"
        )
        assert done.code == 0, done.err
        found = [layer["sparsity_requested"] for layer in done.document["made"]["layers"]]
        assert max(found) - min(found) == pytest.approx(2 * spread)
    done = run("compress", model, "-o", tmp_path / "x", *SMALL, *more, "--allocation-option", "lambda=0.1")
    assert (done.code, done.err.count("there are: outlier, spread")) == (2, 1)
    assert not (tmp_path / "x.work").exists()


def test_compress_has_the_defaults_of_the_recipe() -> None:
    given = {name: p.default for name, p in inspect.signature(command).parameters.items()}
    expected = CompressSettings().model_dump()
    for name in ("options", "allocation_options", "tune_options"):
        assert expected.pop(name) == {}
    assert {name: given[name] for name in expected} == expected


def test_tune_has_the_defaults_of_finetune() -> None:
    given = {name: p.default for name, p in inspect.signature(tune_command).parameters.items()}
    expected = FinetuneSettings().model_dump()
    assert expected.pop("losses") == {"kl": 1}
    assert expected.pop("loss_options") == expected.pop("options") == {}
    assert given["bf16"] is expected.pop("bfloat16") is None
    assert {name: given[name] for name in expected} == expected


def test_eval_against_dense(checkpoint: Path, model: Path, text: Path) -> None:
    arguments = ("eval", checkpoint, "--against", model, "--text", text, "--windows", "3", "--seqlen", "64")
    told = run(*arguments, "--json").document
    assert told["tokens"] == 3 * 63
    assert told["perplexity"] > 1
    assert told["kl"] > 0
    assert 0 < told["agreement"] < 1
    assert told["smoke_test"] is False
    assert told["text"] == "prose.txt"
    assert {"perplexity", "perplexity_ratio", "kl", "agreement"} == set(told["intervals"])
    low, high = told["intervals"]["kl"]["low"], told["intervals"]["kl"]["high"]
    assert low <= told["kl"] <= high
    printed = run(*arguments)
    assert f"{told['perplexity']:.3f} [" in printed.out
    assert f"{told['kl']:.4f} [{low:.4f} to {high:.4f}] nats" in printed.out
    assert "SMOKE" not in printed.out


def test_eval_under_a_policy_of_attention(model: Path, checkpoint: Path, text: Path, tmp_path: Path) -> None:
    policy = tmp_path / "two.json"
    policy.write_text('{"policy": "sink_window", "sink": 0, "window": 64}')
    arguments = ("--against", model, "--text", text, "--windows", "2", "--seqlen", "256", "--first", "128")
    for one in (model, checkpoint):
        dense = run("eval", one, *arguments, "--json").document
        found = run("eval", one, *arguments, "--attention", policy, "--json").document
        assert (found["first"], found["tokens"]) == (128, 2 * 127)
        assert found["reference_perplexity"] == dense["reference_perplexity"]
        assert found["perplexity"] != dense["perplexity"]
        assert found["kl"] > dense["kl"]
    done = run("eval", model, *arguments)
    assert "2 windows of 256, from position 128 on" in " ".join(done.out.split())
    assert run("eval", model, *arguments[:-1], "255").err.endswith("nothing to measure from 255 on\n")
    refused = run("eval", model, "--attention", "hip", "--seqlen", "64", "--tasks", "piqa")
    assert "--seqlen and --attention are of measuring a text" in refused.err
    assert "--items is of --tasks and --probes" in run("eval", model, "--items", "9").err
    assert "there are:" in run("eval", model, *arguments, "--attention", "nothing").err


def test_eval_labels_the_built_in_text(model: Path) -> None:
    done = run("eval", model, "--windows", "2", "--seqlen", "32")
    assert done.code == 0, done.err
    assert "SMOKE TEST" in done.out
    assert run("eval", model, "--windows", "2", "--seqlen", "32", "--json").document["smoke_test"] is True


def test_eval_reads_windows_as_long_as_the_context(checkpoint: Path, model: Path, text: Path) -> None:
    done = run("eval", checkpoint, "--against", model, "--text", text, "--windows", "1", "--json")
    assert done.document["seqlen"] == 512


def test_eval_of_all_windows(model: Path, text: Path) -> None:
    few = run("eval", model, "--text", text, "--seqlen", "256", "--windows", "1", "--json").document
    assert few["windows"] == 1
    assert few["intervals"] == {}  # one window has no spread
    every = run("eval", model, "--text", text, "--seqlen", "256", "--windows", "0", "--json").document
    assert every["windows"] > 20


def test_bench_side_by_side(checkpoint: Path, model: Path) -> None:
    arguments = (
        "bench",
        model,
        checkpoint,
        "--prompt",
        "12",
        "--decode",
        "3",
        "--repeats",
        "2",
        "--threads",
        "1",
    )
    told = run(*arguments, "--json").document
    dense = "tiny bfloat16" + (" in float32" if fast_dtype() == torch.float32 else "")
    assert told["baseline"] == dense
    assert list(told["contenders"]) == [dense, "sparse"]
    sparse = told["contenders"]["sparse"]
    assert told["contenders"][dense]["decode_ratio"] == 1.0
    assert sparse["prompt"] == 12
    assert sparse["decode"] == 3
    assert len(sparse["runs"]["decode_seconds"]) == 2
    assert sparse["decode_tokens_per_second"] > 0
    assert told["machine"]["threads"] == 1
    assert "the native decoder" in sparse["engine"]
    printed = run(*arguments).out
    told = " ".join(run(*arguments, "--cache", "int8", "--huge-pages").out.split())
    assert "keys and values as it keeps them, not in int8; no huge pages" in told
    for word in (
        "prompt 12 tok/s",
        "decode 3 tok/s",
        "1.00x",
        "load average",
        "other processes kept",
        "last-level cache",
        "sparse",
    ):
        assert word in printed


def test_run_attends_by_a_policy(checkpoint: Path) -> None:
    arguments = ("run", checkpoint, "word " * 150, "--max-new-tokens", "4", "--raw", "--json")
    dense, same = run(*arguments).document, run(*arguments, "--attention", "sink_window").document
    assert dense["engine"] == same["engine"] == "the native decoder"
    assert dense["completion"] == same["completion"]  # all of it lies in the window
    failed = run(*arguments, "--attention", "nothing")
    assert failed.code == 2
    assert "unknown attention policy" in failed.err
    assert run("bench", checkpoint, "--plan", "--attention", "hip").code == 2


def test_run_streams_what_greedy_decoding_gives(model: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    done = run("run", model, "the assert statement", "--max-new-tokens", "6", "--raw")
    assert done.code == 0, done.err
    tokenizer = AutoTokenizer.from_pretrained(model)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ids = tokenizer("the assert statement", return_tensors="pt")["input_ids"]
    expected = plain.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=2)[0, ids.shape[1] :]
    assert done.out == tokenizer.decode(expected, skip_special_tokens=True) + "\n"
    assert "tokens/s" in done.err


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
def test_run_answers_natively_from_a_plain_model_too(model: Path, tmp_path: Path) -> None:
    def engine(folder: Path, *more: str) -> str:
        return str(run("run", folder, "hello", "--max-new-tokens", "2", "--json", *more).document["engine"])

    assert engine(model) == "the native decoder"
    assert engine(model, "--engine", "transformers") == "transformers: asked for"
    half = tiny_folder(tmp_path / "half")
    tiny_model().half().save_pretrained(half)
    assert engine(half) == "transformers: the native decoder would hold float16 in float32"
    assert engine(half, "--engine", "native") == "the native decoder"
    assert engine(half, "--dtype", "bfloat16") == "the native decoder"


@pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")
@pytest.mark.parametrize(("weight", "said"), [
    ("model.layers.1.mlp.up_proj", "up_proj of layer 1"), ("model.embed_tokens", "the embedding"),
])  # fmt: skip
def test_run_names_a_damaged_weight(weight: str, said: str, tmp_path: Path) -> None:
    folder, broken = tiny_folder(tmp_path / "broken"), tiny_model()
    broken.get_submodule(weight).weight.data[3, 5] = float("nan")
    broken.save_pretrained(folder)
    failed = run("run", folder, "hello", "--max-new-tokens", "2")
    assert failed.code == 2
    assert f"the model's weights are damaged: {said}" in failed.err


def test_run_takes_the_prompt_from_stdin(checkpoint: Path) -> None:
    options = ("--max-new-tokens", "4", "--temperature", "0.8", "--top-p", "0.9", "--seed", "3", "--json")
    told = run("run", checkpoint, *options, stdin="hello").document
    assert told["prompt"] == "hello"
    assert told == told | {"model": "sparse"}
    assert told["prompt_tokens"] > len("hello") // 5
    assert isinstance(told["completion"], str)
    again = run("run", checkpoint, "hello", *options).document
    assert again["completion"] == told["completion"]


def test_run_says_tokens_and_why_it_ended(model: Path) -> None:
    arguments = ("run", model, "hello", "--max-new-tokens", "6", "--raw")
    told = run(*arguments, "--logprobs", "2", "--json").document
    assert told["finish"] == "length"
    assert len(told["tokens"]) == 6
    for token in told["tokens"]:
        assert token["logprob"] < 0
        assert token["top"][0]["id"] == token["id"]  # greedy
        assert len(token["top"]) == 2
    assert "".join(token["text"] for token in told["tokens"]) == told["completion"]
    stop = told["completion"][2:4]
    stopped = run(*arguments, "--stop", "\1", "--stop", stop, "--json").document
    assert stopped["finish"] == "stop"
    assert stopped["tokens"] is None
    assert stopped["completion"] == told["completion"].partition(stop)[0]
    penalized = run(*arguments, "--repetition-penalty", "50", "--json").document
    assert penalized["completion"] != told["completion"]
    drawn = ("--temperature", "5", "--seed", "1", "--json")
    for narrow in (("--top-k", "1"), ("--min-p", "1"), ("--top-p", "1e-9")):
        assert run(*arguments, *drawn, *narrow).document["completion"] == told["completion"]
    assert run(*arguments, *drawn).document["completion"] != told["completion"]
    refused = run(*arguments, "--logprobs", "2")
    assert refused.code == 2
    assert "--json" in refused.err


def test_info_of_a_checkpoint(checkpoint: Path) -> None:
    told = run("info", checkpoint, "--json").document
    size = size_of_folder(checkpoint)
    assert told["kind"] == "checkpoint"
    assert told["linear_parameters"] == size.linear_parameters
    assert told["linear_bytes"] == size.linear_bytes
    assert told["sparsity"] == pytest.approx(size.sparsity)
    assert told["layouts"] == {"dense int8": 1, "32:64 int4": 21}
    assert told["made"]["method"] == "obs"
    printed = run("info", checkpoint).out
    assert "21 x 32:64 int4" in printed
    assert "prose.txt" in printed


def test_what_is_not_compressed_is_named(tmp_path: Path) -> None:
    own = {"model_type": "llama4_text", "num_local_experts": 4, "head_dim": 16, "intermediate_size_mlp": 128}
    experts, out = tiny_folder(tmp_path / "experts", **own), tmp_path / "out"  # in a form of their own
    done = run("compress", experts, "-o", out, *SMALL, "--method", "magnitude", "--sparsity", "0.5")
    told = run("info", out, "--json").document
    assert told["uncompressed"]["model.layers.0.feed_forward.experts.gate_up_proj"] == 4 * 2 * 128 * 64
    assert told["parameters"] > sum(told["uncompressed"].values()) > 0.5 * told["parameters"]
    for text in (done.out, run("info", out).out):
        assert "% of all parameters, such as model.layers.0.feed_forward.experts.gate_up_proj" in text


def test_experts_that_no_token_reached_are_counted(tmp_path: Path) -> None:
    experts = tiny_folder(tmp_path / "experts", "mixtral", num_local_experts=32, num_experts_per_tok=1)
    few = ("--windows", "1", "--seqlen", "12", "--threads", "1")
    done = run("compress", experts, "-o", tmp_path / "out", *few, "--method", "wanda", "--sparsity", "0.5")
    told = run("info", tmp_path / "out", "--json").document
    assert 0 < told["unreached"] < 3 * 32 * 2
    assert f"{told['unreached']} layers of experts that no calibration token came by" in done.out
    assert told["uncompressed"] == {f"model.layers.{i}.mlp.gate.weight": 32 * 64 for i in range(3)}


def test_models_that_cut_text_otherwise_are_no_versions_of_one(
    model: Path, text: Path, tmp_path: Path
) -> None:
    other = tiny_folder(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    a, b = (vocabulary[letter] for letter in "et")
    vocabulary["e"], vocabulary["t"] = b, a
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    done = run("eval", model, "--against", other, "--text", text, "--windows", "2", "--seqlen", "32")
    assert done.code == 2
    assert "other tokens" in done.err


def test_info_of_a_plain_model(model: Path) -> None:
    told = run("info", model, "--json").document
    assert told["kind"] == "model"
    # 3 blocks of hidden 64, 4 heads of 16 (2 of keys and values), intermediate 128; vocabulary 384, tied
    block = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128
    assert told["prunable_parameters"] == 3 * block
    assert told["prunable_layers"] == 21
    assert told["embedding_parameters"] == 384 * 64
    assert told["parameters"] == 3 * (block + 2 * 64) + 384 * 64 + 64
    assert told["tied"] is True
    assert told["head_parameters"] == 0
    assert told["dtypes"] == {"float32": told["parameters"]}
    assert "tied to the embeddings" in run("info", model).out


def test_verify_finds_one_flipped_bit(checkpoint: Path, tmp_path: Path) -> None:
    import shutil

    assert "undamaged" in run("verify", checkpoint).out
    assert run("verify", checkpoint, "--json").document["ok"] is True
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    data = bytearray((copy / "gossamer.safetensors").read_bytes())
    data[-100] ^= 4
    (copy / "gossamer.safetensors").write_bytes(data)
    done = run("verify", copy)
    assert done.code == 2
    assert "gossamer.safetensors" in done.out
    damaged = run("verify", copy, "--json")
    assert damaged.code == 2
    assert damaged.document["ok"] is False
    assert damaged.document["problems"]


def test_export_loads_in_transformers(checkpoint: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from gossamer.models import load_checkpoint

    told = run("export", checkpoint, "-o", tmp_path / "dense", "--dtype", "float32", "--json").document
    assert told["out"] == str(tmp_path / "dense")
    assert told["dtype"] == "float32"
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    packed = load_checkpoint(checkpoint)
    layer = "model.layers.1.mlp.up_proj"
    assert torch.equal(dense.get_submodule(layer).weight, packed.get_submodule(layer).matrix.to_dense())
    assert dense(tiny_tokens()).logits.isfinite().all()
    again = run("export", checkpoint, "-o", tmp_path / "dense")
    assert again.code == 2
    assert "exists already" in again.err


def test_methods_lists_the_registry() -> None:
    told = run("methods", "--json").document
    families = {
        "prune": METHODS,
        "allocation": ALLOCATIONS,
        "format": FORMATS,
        "shrink": DEPTH,
        "tune": TUNERS,
        "finetune": WEIGHTS,
        "loss": LOSSES,
        "text": PROMPTS,
        "module": MODULES,
        "activations": ACTIVATIONS,
        "attention": POLICIES,
        "cache": CACHES,
    }
    expected = [(family, name) for family, names in families.items() for name in names]
    assert [(method["family"], method["name"]) for method in told] == expected
    sweep = next(method for method in told if method["name"] == "obs")
    assert sweep["aliases"] == ["gptq", "sparsegpt"]
    assert sweep["needs"] == ["Gram"]
    assert sweep["comparison_group"] == "columns:128"
    assert "Frantar" in sweep["cite"]
    assert sweep["claim"]["says"]
    assert sweep["options"] == {"damping": 0.01, "order": "auto"}
    printed = run("methods").out
    assert all(name in printed for _, name in expected)
    assert "inputs of all linear layers" in " ".join(printed.split())
    assert "2:4 keeps 2" in printed


def test_isa() -> None:
    assert run("isa", "--json").document == {"isa": kernels.isa(), "available": list(kernels.available())}
    assert run("isa").out.startswith(kernels.isa())


def test_version_and_help() -> None:
    assert run("--version").out == f"gossamer {VERSION}\n"
    assert run("--help").code == 0
    assert "keeps N" in run("compress", "--help").out


def test_json_holds_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    from gossamer.cli.show import document

    value: Any = {"a": float("nan"), "b": [float("inf"), 1.5], 3: ("x",)}
    document(value)
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [None, 1.5], "3": ["x"]}


def test_gate_writes_a_checkpoint_that_runs_gated(checkpoint: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "gated"
    done = run("gate", checkpoint, "-o", out, "--sparsity", 0.6, "--text", text, *SMALL, "--json")
    assert done.code == 0, done.err
    assert done.document["weights_in_columns"] == done.document["weights"] == 21
    answer = run("run", out, "hello", "--max-new-tokens", 2)
    assert "gated by teal" in answer.err
    measured = run("eval", out, "--text", text, "--windows", 2, "--seqlen", 32, "--attention", "sink_window")
    assert "gated by teal, attention sink_window" in " ".join(measured.out.split())
    assert "activations by teal" in run("info", out).out
    assert "gates are left out" in run("export", out, "-o", tmp_path / "plain").out
    again = run("gate", checkpoint, "-o", out, "--text", text, *SMALL)
    assert again.code == 2
    assert again.err.startswith("error: ")
    assert run("gate", checkpoint, "-o", tmp_path / "x", "--method", "none", *SMALL).code == 2
    assert not (tmp_path / "x").exists()


def test_essential_names_the_drop_point(model: Path, text: Path) -> None:
    arguments = ("essential", model, "--text", text, "--windows", "2", "--seqlen", "32", "--nm", "2:4, 1:4")
    told = run(*arguments, "--grid", "0,0.2,0.4,0.6,0.8,0.95", "--json").document
    assert [sparsity for sparsity, _ in told["curve"]] == [0, 0.2, 0.4, 0.6, 0.8, 0.95]
    assert list(told["nm"]) == ["2:4", "1:4"]
    assert (told["pattern"], told["smoke_test"]) == ("unstructured:model", False)
    done = run(*arguments)
    figure = f"{told['nm']['1:4']:.3f}"
    for word in ("by magnitude, unstructured:model", "prose.txt", "drop point", "at 2:4", figure):
        assert word in done.out
    assert run("essential", model, "--grid", "0,half").err.endswith("and 'half' is none\n")


def test_eval_of_tasks(checkpoint: Path, model: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    task = tmp_path / "own.jsonl"
    rows = [{"query": f"Is {i} even?", "choices": ["no", "yes"], "gold": (i + 1) % 2} for i in range(6)]
    task.write_text("\n".join(map(json.dumps, rows)))
    arguments = ("eval", checkpoint, "--against", model, "--tasks", task, "--items", "4")
    told = run(*arguments, "--json").document
    documented = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
    line = next(line for line in documented.splitlines() if line.startswith("- `eval --tasks`: "))
    assert all(f"`{key}`" in line for key in (*told, *told["tasks"]["own"]))
    assert set(told) == {"model", "against", "accuracy", "against_accuracy", "lm_eval", "engines", "tasks"}
    own = told["tasks"]["own"]
    assert (own["items"], own["of"], len(own["correct"])) == (4, 6, 4)
    assert own["accuracy"] == told["accuracy"] == sum(own["correct"]) / 4
    difference = own["flips"]["gained"] - own["flips"]["lost"]
    assert own["flips"]["difference"]["estimate"] == pytest.approx(difference / 4)
    done = run(*arguments)
    for word in ("4 of 6", "right -> wrong", "Wilson", f"{100 * own['accuracy']:.1f}", "mean"):
        assert word in done.out
    assert run("eval", model, "--tasks", "piqa", "--text", task).err.endswith("measured one at a time\n")


def test_eval_of_probes(checkpoint: Path, model: Path, text: Path) -> None:
    arguments = ("eval", checkpoint, "--against", model, "--probes", "retrieval", "--items", "9")
    told = run(*arguments, "--json").document
    documented = (Path(__file__).parents[2] / "docs/cli.md").read_text(encoding="utf-8")
    line = next(line for line in documented.splitlines() if line.startswith("- `eval --probes`: "))
    found = told["probes"]["retrieval"]
    assert all(f"`{key}`" in line for key in (*told, *found, *found["change"], *found["measures"]["exact"]))
    # contexts of 32 and 128 facts are longer than the 512 tokens that the model knows
    assert (found["items"], found["left_out"], len(found["measures"]["exact"]["right"])) == (3, 6, 3)
    assert found["against"]["groups"].keys() == {"facts", "depth"}
    done = run(*arguments)
    for word in ("choice, 8 facts", "right -> wrong", "same answers", "6 items were longer", "Wilson"):
        assert word in done.out
    named = run("eval", model, "--probes", "retrieval,nothing")
    assert (named.code, named.out) == (2, "")
    assert "unknown probe 'nothing'" in named.err
    both = run("eval", model, "--probes", "all", "--tasks", "piqa", "--text", text)
    assert both.err == "error: --text and --tasks and --probes are measured one at a time\n"


def test_shrink_says_what_went(model: Path, text: Path, tmp_path: Path) -> None:
    arguments = ("shrink", model, "--blocks", "1", "--calibration", text, "--windows", "2", "--seqlen", "32")
    told = run(*arguments, "-o", tmp_path / "one", "--json").document
    assert (told["blocks"], len(told["removed"]), len(told["measured"]["distances"])) == (3, 1, 3)
    assert told["weight_file_bytes"] == (tmp_path / "one/model.safetensors").stat().st_size
    done = run(*arguments, "-o", tmp_path / "two")
    assert f"next: gossamer eval {tmp_path / 'two'} --against {model}" in done.out
    assert "1 of 3 removed" in done.out
    assert "smoke test" not in done.out


def test_tune_takes_the_settings_of_its_optimizer(
    model: Path, checkpoint: Path, text: Path, tmp_path: Path
) -> None:
    arguments = (
        "tune", checkpoint, "--teacher", model, "--text", text, "--tokens", 64, "--seqlen", 32, "--batch", 2,
        "--held-out", 1, "--evaluations", 1, "--threads", 1,
    )  # fmt: skip
    wanted = {"bfloat16": True, "warmup": 0.25, "clip": 2.5, "scale_rate": 0.5, "weight_decay": 0.125}
    given = (
        "--bf16", "--warmup", 0.25, "--clip", 2.5, "--scale-rate", 0.5, "--weight-decay", 0.125
    )  # fmt: skip
    for name, more in (("all", given), ("none", ()), ("plain", ("--no-bf16",))):
        done = run(*arguments, "-o", tmp_path / name, *more)
        assert done.code == 0, done.err
        told = json.loads((tmp_path / name / "gossamer.json").read_text())["made"]["tuned"][0]["settings"]
        usual = FinetuneSettings().model_dump() | ({"bfloat16": False} if name == "plain" else {})
        assert {key: told[key] for key in wanted} == {
            key: wanted[key] if name == "all" else usual[key] for key in wanted
        }
    beside = run(
        *arguments, "-o", tmp_path / "beside", "--beside", "sums=16", "--beside", "begin=lost", "--json"
    )
    assert beside.code == 0, beside.err
    assert {layer["rank_beside"] for layer in beside.document["made"]["layers"]} == {4, 8}
    measured = run("eval", tmp_path / "beside", "--text", text, "--windows", "2", "--seqlen", "64", "--json")
    assert measured.document["perplexity"] > 1
    assert (
        "error: --beside is written KEY=VALUE" in run(*arguments, "-o", tmp_path / "no", "--beside", "16").err
    )
    for option, value in (("--warmup", 1), ("--clip", 0), ("--scale-rate", -1), ("--weight-decay", -0.1)):
        refused = run(*arguments, "-o", tmp_path / "no", option, value)
        assert refused.code == 2
        assert f"the setting {option[2:].replace('-', '_')}: " in refused.err


RECIPE = """
name: mine
compress: {pattern: 2:4, values: int8, seqlen: 48, windows: 4}
tune: {seqlen: 32, tokens: 128, batch: 2, held_out: 2, evaluations: 1}
"""


def test_apply_predicts_then_runs(model: Path, text: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    arguments = ("apply", recipe, model, "-o", out, "--text", text, "--threads", "1")
    dry = run(*arguments, "--set", "compress.values=int4", "--dry-run")
    assert dry.code == 0, dry.err
    assert [line.partition(":")[0] for line in dry.out.splitlines()] == [
        "recipe mine", "compress", "tune", "all",
    ]  # fmt: skip
    assert not out.exists()
    assert not (tmp_path / "out.work").exists()
    told = run(*arguments, "--dry-run", "--json").document
    assert set(told) == {"recipe", "predicted"}
    assert told["recipe"]["steps"]["compress"]["pattern"] == "2:4"
    done = run(*arguments)
    assert done.code == 0, done.err
    assert "recipe mine" in done.err
    for word in ("tune took", "(predicted", f"next: gossamer eval {out} --against {model}"):
        assert word in done.out
    assert "mine (" in run("info", out).out
    refused = run(*arguments)
    assert (refused.code, "exists already" in refused.err) == (2, True)


def test_apply_says_what_is_wrong_before_any_work(model: Path, text: Path, tmp_path: Path) -> None:
    assert "name a recipe and -o OUT" in run("apply").err
    done = run("apply", "fast", model, "-o", tmp_path / "out", "--set", "compress.value=int3")
    assert (done.code, "compress.value: there is no such setting" in done.err) == (2, True)
    listed = run("apply", "--list")
    for word in ("balanced", "best", "fast", "small", "sparse", "compress, tune"):
        assert word in listed.out
    assert [recipe["name"] for recipe in run("apply", "--list", "--json").document] == [
        "balanced", "best", "fast", "small", "sparse",
    ]  # fmt: skip


def test_apply_starts_with_too_little_memory_only_where_told(
    model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.recipes.room.usable_memory", lambda: Memory(1 << 20, 1 << 20))
    arguments = ("apply", "fast", model, "-o", tmp_path / "out", "--text", text, "--dry-run")
    small = ("--set", "compress.seqlen=48", "--set", "compress.windows=4")
    done = run(*arguments, *small)
    assert (done.code, "0.0 GB may be used here" in done.err) == (2, True)
    assert run(*arguments, *small, "--anyway").code == 0


def test_tune_starts_with_too_little_memory_only_where_told(
    model: Path, text: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gossamer.recipes.room.usable_memory", lambda: Memory(1 << 20, 1 << 20))
    few = ("--tokens", "64", "--seqlen", "32", "--batch", "1", "--held-out", "2", "--evaluations", "1")
    arguments = ("tune", checkpoint, "-o", tmp_path / "out", "--teacher", model, "--text", text, *few)
    done = run(*arguments)
    assert (done.code, "0.0 GB may be used here" in done.err) == (2, True)
    assert list(tmp_path.iterdir()) == []
    assert run(*arguments, "--anyway").code == 0


def test_sample_writes_a_text_and_says_what_it_took(model: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "own.jsonl"
    few = ("--tokens", "20", "--prompt-tokens", "4", "--max-new-tokens", "6", "--threads", "1")
    told = run("sample", model, "-o", out, "--text", text, *few, "--json").document
    assert told["path"] == str(out)
    assert told["records"] == len(out.read_text().splitlines())
    assert told["tokens"] >= 20
    assert told["seconds"] > 0
    done = run("sample", model, "-o", tmp_path / "more.jsonl", *few)
    assert done.code == 0, done.err
    for word in ("documents", "tokens drawn", "tokens a second", "smoke test"):
        assert word in done.out
