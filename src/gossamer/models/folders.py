"""Which files make a folder a model, which of them are taken along, and which are refused."""

from __future__ import annotations

import json
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
_WANTED = (".json", ".model", ".txt", ".jinja", ".tiktoken")
_CONVERT = (
    "import transformers as t; [kind.from_pretrained('MODEL').save_pretrained('OUT') "
    "for kind in (t.AutoModelForCausalLM, t.AutoTokenizer)]"
)
_ABOUT = "gossamer_source.json"


def is_model(names: Collection[str]) -> bool:
    """Whether files of these names in one folder are a Hugging Face model in safetensors."""
    return "config.json" in names and any(name in names for name in _WEIGHTS)


def wanted(names: Collection[str]) -> list[str]:
    """Of such a folder's files, in their order, those that are taken along: weights, config and tokenizer.
    One file of weights hides shards and their index."""
    single, index = _WEIGHTS
    if single in names:
        return [name for name in names if name == single or (name.endswith(_WANTED) and name != index)]
    return [
        name
        for name in names
        if name.endswith(_WANTED) or (name.startswith("model") and name.endswith(".safetensors"))
    ]


def pickle_refusal(where: str) -> str:
    """Why weights in ``.bin`` and the like are not read, and what makes safetensors of them."""
    return (
        f"{where} holds weights only in a pickle format ({', '.join(PICKLES)}), which can run code when it "
        "is read: convert them to safetensors first. If you trust who made it, transformers does so: "
        f"python -c {_CONVERT!r}"
    )


def write_about(
    folder: Path, key: str, origin: str, license_: str | None, weight_bytes: int | None = None
) -> None:
    """Notes in ``folder`` what it was made from: its sha256, its name and its license, and where weights were
    made larger on the way the bytes that they took before."""
    about = {"license": license_, "origin": origin, "sha256": key, "weight_bytes": weight_bytes}
    (folder / _ABOUT).write_text(json.dumps(about, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_about(folder: Path) -> dict[str, Any]:
    """What `write_about` noted; empty where it did not."""
    with suppress(OSError, ValueError):
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        if isinstance(about, dict):
            return about
    return {}
