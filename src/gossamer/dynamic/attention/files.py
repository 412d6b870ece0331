"""Policies by name, and as JSON: ``{"policy": NAME, ...settings}``; learned gates in safetensors beside."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from gossamer.dynamic.attention.label_blocks import LabelBlocks
from gossamer.dynamic.attention.minference import MInference, VerticalSlash
from gossamer.dynamic.attention.policy import POLICIES, Policy, whole
from gossamer.dynamic.attention.seer import Seer
from gossamer.errors import CheckpointError, MethodError
from gossamer.matrices.atomic import atomic_file
from gossamer.paths import expanded

FILE = "attention.json"  # beside a checkpoint


def policy_of(asked: str | Path | Policy) -> Policy:
    """A policy as it is, one of `POLICIES` by name with its defaults, or what `save_policy` wrote.

    Raises MethodError for what is neither, and CheckpointError for a damaged file.
    """
    if isinstance(asked, Policy):
        return asked
    path = expanded(asked)
    if str(asked) not in POLICIES and path.exists():
        return load_policy(path)
    return POLICIES[str(asked)]()


def save_policy(policy: Policy, path: str | Path) -> Path:
    """Writes ``policy`` as a file, or into a folder as FILE; returns its path. Raises OutputError."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    if isinstance(policy, Seer):
        with atomic_file(file.with_suffix(".safetensors")) as out:
            out.write(save({"gates": policy.gates.contiguous()}))
    with atomic_file(file) as out:
        out.write((json.dumps(to_dict(policy)) + "\n").encode())
    return file


def load_policy(path: str | Path) -> Policy:
    """What `save_policy` wrote; raises CheckpointError where it is missing or damaged."""
    file = Path(path) / FILE if Path(path).is_dir() else Path(path)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["policy"] == Seer.name:
            return Seer(load_file(file.with_suffix(".safetensors"))["gates"], content["count"])
        return from_dict(content)
    except OSError as error:
        raise CheckpointError(f"cannot read {file.name}: {error.strerror or error}") from error
    except (ValueError, TypeError, KeyError, MethodError, SafetensorError) as error:
        raise CheckpointError(f"{file.name} is no attention policy: {error}") from error


def to_dict(policy: Policy) -> dict[str, Any]:
    """Plain data, of MInference each pattern once: ``heads`` are ``[layer, head, number of the pattern]``."""
    if isinstance(policy, Seer):
        return {"policy": policy.name, "count": policy.count}
    if not isinstance(policy, MInference):
        return {"policy": policy.name, **asdict(policy)}  # type: ignore[call-overload]
    patterns = list(dict.fromkeys(policy.heads.values()))
    heads = [[layer, head, patterns.index(one)] for (layer, head), one in sorted(policy.heads.items())]
    return {
        "policy": policy.name,
        "other": to_dict(policy.other),
        "patterns": [to_dict(one) for one in patterns],
        "heads": heads,
    }


def from_dict(content: dict[str, Any]) -> Policy:
    """The policy that `to_dict` gives."""
    settings = dict(content)
    name = settings.pop("policy")
    if name == VerticalSlash.name:
        return VerticalSlash(**settings)
    if name == LabelBlocks.name:
        return LabelBlocks(**settings)
    if name != "minference":
        return POLICIES[name](**settings)
    patterns = [from_dict(one) for one in settings["patterns"]]
    heads = {}
    for place in settings["heads"]:
        layer, head, number = place
        if not all(map(whole, place)) or number >= len(patterns):
            raise MethodError(f"minference takes [layer, head, one of {len(patterns)} patterns], not {place}")
        heads[layer, head] = patterns[number]
    return MInference(heads, from_dict(settings["other"]))
