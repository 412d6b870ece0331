"""Makes the files that the decode benchmark's contenders load: our checkpoints, GGUF files, plain folders.

Of the model of ``--model``: packed by rounding to nearest, pruned by magnitude; speed does not depend on how
well. Of the others random weights, one layer at a time, so that no dense model is ever in memory.
Everything is kept under the working folder and made once.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.decode_protocol import Job
from benchmarks.kernel_layers import Packed as RandomLayers
from benchmarks.kernel_protocol import STRUCTURES, Layer, Structure
from gossamer.matrices import Packed
from gossamer.models.checkpoint_writer import CheckpointWriter
from gossamer.models.manifest import MANIFEST
from gossamer.models.skeleton import SINGLE_FILE, WeightFiles
from gossamer.sparse import mask_from_scores, parse_pattern

KINDS = {**STRUCTURES, "32x32 50%": Structure("16x4", "32x32", 0.5)}
# a block's weights, in transformers' and in GGUF's words
LINEARS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
EMBEDDING, HEAD, LAST = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SPREAD = 0.02  # of random weights


def shapes(config: dict[str, Any]) -> Iterator[tuple[str, str, Layer]]:
    """Every matrix: its name in transformers and in GGUF, outputs and inputs; a head of its own is last."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    queries, keys = (config["head_dim"] * config[f"num_{kind}_heads"] for kind in ("attention", "key_value"))
    sizes = (
        (queries, hidden),
        (keys, hidden),
        (keys, hidden),
        (hidden, queries),
        (inner, hidden),
        (inner, hidden),
        (hidden, inner),
    )
    yield EMBEDDING, "token_embd.weight", (config["vocab_size"], hidden)
    for i in range(config["num_hidden_layers"]):
        for (name, short), size in zip(LINEARS.items(), sizes, strict=True):
            yield f"model.layers.{i}.{name}.weight", f"blk.{i}.{short}.weight", size
    if not config["tie_word_embeddings"]:
        yield HEAD, "output.weight", (config["vocab_size"], hidden)


def norms(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The name of every norm's weight, in transformers and in GGUF."""
    for i in range(config["num_hidden_layers"]):
        for name, short in NORMS.items():
            yield f"model.layers.{i}.{name}.weight", f"blk.{i}.{short}.weight"
    yield LAST, "output_norm.weight"


def folder_of(config: dict[str, Any], out: Path) -> Path:
    """A folder with a random model's config alone. One that is there stays: others may be reading it."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.json").exists():
        (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return out


# ---- ours


def checkpoint(job: Job) -> Path:
    """Our checkpoint of the variant, `STRUCTURE VALUES/HEAD`."""
    out = job.file("gossamer-")
    if (out / MANIFEST).exists():
        return out
    linears, head = job.variant.split("/")
    structure, values = linears.rsplit(" ", 1)
    config, random = job.config, not has_weights(job.model)
    files = None if random else WeightFiles(Path(job.model))
    writer = CheckpointWriter(out, Path(job.model))
    makers: dict[str, RandomLayers] = {}
    for name, _, shape in shapes(config):
        kind, number = ("dense", head) if name in (EMBEDDING, HEAD) else (structure, values)
        if files is None:
            maker = makers.setdefault(f"{kind} {number}", RandomLayers(KINDS[kind], number))
            sections = maker.sections(shape)
            matrix = Packed(sections, layout=KINDS[kind].layout, values=number, shape=shape)
        else:
            matrix = packed(files.tensor(name, torch.float32), KINDS[kind], number)
        writer.add_matrix(name, matrix)
        if name == EMBEDDING and config["tie_word_embeddings"]:
            writer.add_matrix(HEAD, matrix)
    for name, _ in norms(config):
        plain = torch.ones(config["hidden_size"]) if files is None else files.tensor(name)
        writer.add_tensor(name, plain.to(torch.bfloat16))
    return writer.finish({"by": "benchmarks.decode_files", "variant": job.variant})


def packed(weight: Tensor, structure: Structure, values: str) -> Packed:
    """Rounded to nearest, the largest weights kept."""
    mask = None
    if structure.pattern:
        mask = mask_from_scores(weight.abs(), parse_pattern(structure.pattern), structure.sparsity)
    return Packed.pack(weight, values, structure.layout, mask=mask)


def has_weights(model: str) -> bool:
    return any(Path(model).glob("*.safetensors"))


# ---- GGUF


def gguf(job: Job, target: Path) -> Path:
    """The dense model in float32 with its tokenizer, or random Q4_0 weights without one."""
    from gguf import GGMLQuantizationType, GGUFWriter

    if target.exists():
        return target
    config = job.config
    beside = target.with_suffix(".part")
    writer = GGUFWriter(beside, "llama")
    heads, keys = config["num_attention_heads"], config["num_key_value_heads"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(keys)
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config.get("rope_parameters", config)["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    files = WeightFiles(Path(job.model)) if has_weights(job.model) else None
    if files is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, Path(job.model))
    made: dict[Layer, np.ndarray] = {}
    for name, short, shape in shapes(config):
        if files is None:
            if shape not in made:
                made[shape] = random_q4_0(shape)
            writer.add_tensor(short, made[shape], raw_dtype=GGMLQuantizationType.Q4_0)
        else:
            weight = files.tensor(name, torch.float32).numpy()
            count = {"q_proj.weight": heads, "k_proj.weight": keys}.get(name.rpartition("self_attn.")[2])
            writer.add_tensor(short, rotated(weight, count) if count else weight)
    ones = np.ones(config["hidden_size"], np.float32)
    for name, short in norms(config):
        writer.add_tensor(short, ones if files is None else files.tensor(name, torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    beside.replace(target)
    return target


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries or keys in GGUF's order: pairs that rotate together are neighbours."""
    out, cols = weight.shape
    return np.ascontiguousarray(
        weight.reshape(heads, 2, out // heads // 2, cols).swapaxes(1, 2).reshape(out, cols)
    )


def random_q4_0(shape: Layer) -> np.ndarray:
    """Bytes (outputs, bytes of a row): blocks of 32 weights, a float16 scale and 16 bytes of codes."""
    blocks = np.random.default_rng(0).integers(0, 256, (shape[0], shape[1] // 32, 18), dtype=np.uint8)
    blocks[:, :, :2] = np.frombuffer(np.float16(SPREAD / 4.6).tobytes(), np.uint8)  # 4.6: of codes -8 to 7
    return blocks.reshape(shape[0], -1)


def add_tokenizer(writer: Any, folder: Path) -> None:
    """The byte-level BPE tokenizer of a Hugging Face folder, as llama.cpp reads it (SmolLM's splitting)."""
    found = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = dict(found["model"]["vocab"])
    special = {token["content"]: token["id"] for token in found["added_tokens"]}
    tokens |= special
    by_number = sorted(tokens, key=tokens.__getitem__)
    merges = [m if isinstance(m, str) else " ".join(m) for m in found["model"]["merges"]]
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(by_number)
    writer.add_token_types([3 if token in special else 1 for token in by_number])  # control, normal
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(False)


# ---- plain folders


def dense_folder(job: Job, tokenizer: Path) -> None:
    """Random bfloat16 weights beside a random model's config, and any tokenizer, for tools that convert."""
    from safetensors.torch import save_file

    folder = Path(job.model) / "dense"
    if (folder / SINGLE_FILE).exists():
        return
    folder_of(job.config, folder)
    for file in tokenizer.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    # every one different: a tool may store, and then read, equal weights once
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=SPREAD)
        for name, _, shape in shapes(job.config)
    }
    tensors |= {
        name: torch.ones(job.config["hidden_size"], dtype=torch.bfloat16) for name, _ in norms(job.config)
    }
    beside = folder / "weights.part"
    save_file(tensors, beside, metadata={"format": "pt"})
    beside.replace(folder / SINGLE_FILE)
