"""A model on the Hugging Face hub: the files that are needed, and a plain answer without a network."""

from __future__ import annotations

import json
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import ModelError
from gossamer.models.folders import PICKLES, is_model, pickle_refusal, wanted
from gossamer.progress import Progress

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SECONDS = 10  # to wait for an answer about a model
# the hub's client changes its HTTP library from release to release, and their errors have no common base
_NETWORK_MODULES = ("httpx", "httpx2", "httpcore", "requests", "urllib3", "huggingface_hub")


@dataclass(frozen=True)
class Snapshot:
    """A downloaded folder, or the one GGUF file that a repository holds, and the stated license."""

    path: Path
    license: str | None


def is_hub_name(source: str) -> bool:
    """Whether ``source`` has the form org/name."""
    return _NAME.fullmatch(source) is not None


def from_hub(name: str, progress: Progress) -> Snapshot:
    """The model ``name`` (org/name), through the hub's own cache; what is complete there is not asked for.

    Raises ModelError: not reachable, not there or not allowed, no model in safetensors or GGUF.
    """
    from huggingface_hub import HfApi, snapshot_download

    with suppress(OSError, ValueError, KeyError):
        folder = Path(snapshot_download(name, local_files_only=True))
        if _is_complete(folder):
            return Snapshot(folder, None)
        if (file := _only_gguf(folder)) is not None:
            return Snapshot(file, None)
    progress("download", 0, 1)
    try:
        info = HfApi().model_info(name, timeout=_SECONDS)
        files = _choose(name, [sibling.rfilename for sibling in info.siblings or ()])
        folder = Path(snapshot_download(name, revision=info.sha, allow_patterns=files, etag_timeout=_SECONDS))
    except ModelError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__module__.split(".")[0] not in _NETWORK_MODULES:
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{name} is no local path, and the Hugging Face hub does not give it "
            f"({type(error).__name__}: {reason})"
        ) from error
    progress("download", 1, 1)
    license_ = getattr(getattr(info, "card_data", None), "license", None)
    path = folder / files[0] if files[0].endswith(".gguf") else folder
    return Snapshot(path, license_ if isinstance(license_, str) else None)


def _choose(name: str, files: list[str]) -> list[str]:
    """The files to download, of those at the top of a repository."""
    top = sorted(file for file in files if "/" not in file)
    if is_model(top):
        return wanted(top)
    ggufs = [file for file in top if file.endswith(".gguf")]
    if len(ggufs) == 1:
        return ggufs
    if ggufs:
        raise ModelError(f"{name} on the hub holds {len(ggufs)} GGUF files: download one, and name its path")
    if any(file.endswith(PICKLES) for file in top):
        raise ModelError(pickle_refusal(f"{name} on the hub"))
    raise ModelError(f"{name} on the hub holds no model in safetensors or GGUF")


def _only_gguf(folder: Path) -> Path | None:
    """The one GGUF file that a snapshot holds in place of a model in safetensors; it is there when it is
    whole."""
    files = [path for path in folder.iterdir() if path.exists()]
    ggufs = [path for path in files if path.suffix == ".gguf"]
    others = any(path.suffix == ".safetensors" or path.name == "config.json" for path in files)
    return ggufs[0] if len(ggufs) == 1 and not others else None


def _is_complete(folder: Path) -> bool:
    """Whether a snapshot has config, tokenizer and all weights; a download may have been cut short."""
    names = {path.name for path in folder.iterdir() if path.exists()}
    if not is_model(names) or not any(name.startswith(("tokenizer", "vocab", "spiece")) for name in names):
        return False
    index = folder / "model.safetensors.index.json"
    if "model.safetensors" in names or not index.exists():
        return "model.safetensors" in names
    return set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()) <= names
