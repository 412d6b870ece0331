"""Tiny GGUF files, written as llama.cpp's converter writes them: what conversion is tested on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import torch

from tiny import tiny_model, tiny_tokenizer


def tiny_gguf(path: Path, arch: str = "llama", seed: int = 0, kind: str = "F32", **changes: Any) -> Any:
    """Writes ``tiny_model(arch, seed, **changes)`` to ``path`` and returns it; ``kind``: of its matrices
    (F32, F16, Q8_0, Q4_0)."""
    model = tiny_model(arch, seed, **changes)
    writer = gguf.GGUFWriter(path, arch)
    _write_settings(writer, model.config, arch)
    _write_tokenizer(writer)
    key = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    names = gguf.get_tensor_name_map(key, model.config.num_hidden_layers)
    seen = set()
    for name, parameter in model.named_parameters():
        seen.add(id(parameter))
        base, _, suffix = name.rpartition(".")
        array = _as_llama_cpp(name, parameter.detach(), model.config, arch).contiguous().numpy()
        stored = gguf.GGMLQuantizationType[kind if array.ndim == 2 else "F32"]
        data = array if stored.name == "F32" else gguf.quants.quantize(array, stored)
        writer.add_tensor(f"{names.get_name(base)}.{suffix}", data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _as_llama_cpp(name: str, weight: torch.Tensor, config: Any, arch: str) -> torch.Tensor:
    if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
        # rotary pairs (i, i + half) of each head become neighbours, as llama.cpp rotates them
        halves = weight.reshape(heads, 2, -1, weight.shape[1])
        return torch.stack([halves[:, 0], halves[:, 1]], dim=2).reshape(weight.shape)
    if arch in ("gemma2", "gemma3") and name.endswith("norm.weight"):
        return weight + 1
    if arch == "gpt2" and weight.dim() == 2 and ".h." in name:
        return weight.T
    return weight


def _write_settings(writer: gguf.GGUFWriter, config: Any, arch: str) -> None:
    writer.add_name("tiny")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(getattr(config, "intermediate_size", None) or config.n_inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    if arch == "gpt2":
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    if arch == "starcoder2":
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_eps(config.norm_epsilon)
        _write_rotary(writer, config.rope_parameters)
        return
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    _write_rotary(writer, config.rope_parameters)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)


def _write_rotary(writer: gguf.GGUFWriter, parameters: dict[str, Any]) -> None:
    parameters = parameters.get("full_attention", parameters)
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "default":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(parameters["rope_type"]))
    writer.add_rope_scaling_factor(parameters["factor"])
    if "original_max_position_embeddings" in parameters:
        writer.add_rope_scaling_orig_ctx_len(parameters["original_max_position_embeddings"])


def _write_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    described = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    tokens = [token for token, _ in sorted(described["vocab"].items(), key=lambda item: item[1])]
    control = {tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    kinds = [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in described["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def add_to(
    source: Path, target: Path, *, tensors: Any = None, rotation: Any = None, ends: Any = None
) -> Path:
    """Copies a GGUF file and adds to it ``tensors`` (arrays by name), what is told under ``ARCH.rope``
    (strings and floats by name), and tokens that ``ends`` names (``eot``, ``eom``); returns ``target``."""
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(target, arch)
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name == "general.architecture":
            continue
        kind = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=kind)
    for name, value in (rotation or {}).items():
        (writer.add_string if isinstance(value, str) else writer.add_float32)(f"{arch}.rope.{name}", value)
    for name, token in (ends or {}).items():
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, array in (tensors or {}).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target
