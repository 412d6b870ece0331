"""Tiny random language models and tokenizers, made on the spot: what tests walk, prune and save."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 384
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_GPT2 = {"n_embd": 64, "n_inner": 128, "n_layer": 3, "n_head": 4, "n_positions": 512}

# what each architecture needs beyond, or instead of, the common sizes; `model_type` where it is not the key
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "llama_untied": {"model_type": "llama", "tie_word_embeddings": False},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2},
    "qwen3": {"head_dim": 32, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 8},
    "smollm3": {"no_rope_layer_interval": 2, "tie_word_embeddings": True},
    "gemma2": {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "gemma3": {
        "model_type": "gemma3_text",
        "head_dim": 16,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "gpt2": _GPT2,
    "starcoder2": {},
    "gpt_neox": {"tie_word_embeddings": False},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 32},
    "phi": {},
    "phi3": {},
    "bloom": {"n_layer": 3, "n_head": 4},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "stablelm": {},
    "olmo2": {},
    "gptj": {**_GPT2, "rotary_dim": 8},
    "mixtral": {"num_local_experts": 4, "sliding_window": None},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16},
    # experts with biases, stored transposed, gate and up interleaved
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 8},
}


def tiny_config(arch: str = "llama", **changes: Any) -> Any:
    """The transformers configuration of a tiny model of ``arch`` (a key of ARCHITECTURES)."""
    from transformers import AutoConfig

    settings = {**_COMMON, **ARCHITECTURES[arch], **changes}
    return AutoConfig.for_model(settings.pop("model_type", arch), **settings)


def tiny_model(arch: str = "llama", seed: int = 0, **changes: Any) -> Any:
    """A random causal language model in float32 and evaluation mode; ``changes`` go to its configuration.

    Norm weights and biases are random too, so that a mix-up of them shows.
    """
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(arch, **changes)).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return model


@lru_cache(maxsize=1)
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of VOCABULARY tokens with a chat template; any text round-trips."""
    import pydoc_data.topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    text = pydoc_data.topics.topics["assert"] + pydoc_data.topics.topics["numbers"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    fast.chat_template = (
        "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    return fast


def tiny_folder(folder: Path, arch: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Writes ``tiny_model(arch, seed, **changes)`` and the tokenizer as a Hugging Face folder; returns it."""
    tiny_model(arch, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return Path(folder)


def tiny_tokens(windows: int = 2, seqlen: int = 24, seed: int = 0) -> torch.Tensor:
    """Random token ids ``(windows, seqlen)``, without special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (windows, seqlen), generator=generator)
