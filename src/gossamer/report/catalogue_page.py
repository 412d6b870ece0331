"""The page of all methods: what each is, needs and accepts, what its paper claims, what came of it here."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from gossamer.claim import BY_CONTENDER, Experiment
from gossamer.recipes.catalogue import MethodFacts, methods, without_claim
from gossamer.report.baselines import PREFIX

HEAD = """# Catalogue

Every method of the project, one small file each, and at the end what else is published. Made by
`gossamer reproduce --page`. *Measured* is the miniature experiment of the claim: the method's figure, that of
what it is held against, and their ratio with its 95 % bootstrap interval over windows, or over the images
that a small net is measured on (not clearly: the interval, or one of several seeds, lies on the other side of
what was asked). A claim that does not hold says so; methods without a figure have not been run. Claims of
pruning methods and allocations run beside random and magnitude masks, and beside the dense model in the
widest number format that takes no more bytes (rounded by the sweep of `obs`); figures that do not name the
last are of before that.
"""
FEW = 20  # windows; fewer are told
EARLIER = " (an earlier form of the claim)"
TITLES = {
    "prune": "Pruning",
    "allocation": "One sparsity shared out over layers",
    "format": "Number formats",
    "shrink": "Fewer blocks",
    "tune": "Tuning what was kept, block by block",
    "finetune": "Fine-tuning a whole checkpoint: which weights move",
    "loss": "What a checkpoint is tuned to",
    "text": "Text that the dense model writes for its copy",
    "module": "Recipes for PyTorch modules",
    "activations": "Activation sparsity at run time",
    "attention": "Sparse attention at run time",
    "cache": "Caches",
}


def page(verdicts: Mapping[str, Mapping[str, Any]]) -> str:
    """The page in Markdown; ``verdicts`` by method, as `Verdict.to_dict` gives them."""
    parts = [HEAD]
    found = methods()
    for family in dict.fromkeys(method.family for method in found):
        rows = [["method", "what it is", "needs", "accepts", "paper", "claim", "measured here", "run it"]]
        rows += [_row(method, verdicts.get(method.name)) for method in found if method.family == family]
        parts += [f"## {TITLES.get(family, family)}\n", _table(rows)]
    rows = [["what", "paper", "its figures", "why no claim of it runs"]]
    rows += [_cells([one.name, one.cite, _section(one.figures), one.why]) for one in without_claim()]
    return "\n".join([*parts, "## Without a claim that runs\n", _table(rows)])


def _table(rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return "\n".join(lines) + "\n"


def _cells(texts: Sequence[str]) -> list[str]:
    return [text.replace("|", "\\|").replace("\n", " ") for text in texts]


def _section(title: str) -> str:
    """A link to a section of the figures."""
    return f"[{title}](figures.md#{title.lower().replace(' ', '-')})" if title else "none"


def _row(method: MethodFacts, verdict: Mapping[str, Any] | None) -> list[str]:
    claim = method.claim.says if method.claim else ""
    return _cells([
        f"`{method.name}`",
        method.says,
        ", ".join(method.needs) or "no data",
        ", ".join(method.patterns),
        method.cite,
        claim,
        "" if verdict is None else measured(verdict) + _outdated(method, verdict),
        f"`gossamer reproduce {method.name}`" if method.claim else "",
    ])  # fmt: skip


def _outdated(method: MethodFacts, verdict: Mapping[str, Any]) -> str:
    """What is said where the claim that was run asked for something else than today's does."""
    if method.claim is None:
        return ""
    now, then = (_asked(method.name, claim) for claim in (method.claim.to_dict(), verdict["claim"]))
    return "" if now == then else EARLIER


def _asked(name: str, claim: Mapping[str, Any]) -> list[Any]:
    """What a claim as plain values runs and asks; settings that it does not have yet are today's defaults,
    and those of contenders that it does not run are left out."""
    defaults = json.loads(json.dumps(asdict(Experiment())))
    told = {key: claim["experiment"].get(key, default) for key, default in defaults.items()}
    runs = {name, claim["than"], *told["against"], told["start"]}
    for kind in BY_CONTENDER:
        told[kind] = {one: settings for one, settings in told[kind].items() if one in runs}
    return [told, *(claim.get(key) for key in ("metric", "than", "factor", "bound"))]


def measured(verdict: Mapping[str, Any]) -> str:
    """One verdict as a sentence."""
    claim, figures = verdict["claim"], verdict["figures"]
    metric, name, than = claim["metric"], verdict["name"], claim["than"]
    values = f"{metric} {figures[name][metric]:.4g}, {than} {figures[than][metric]:.4g}"
    if "dense" in figures and than != "dense":
        values += f", dense {figures['dense'][metric]:.4g}"
    for one in figures:
        if one.startswith(PREFIX):
            values += f", {one.replace('_', ' ')} {figures[one][metric]:.4g}"
    interval = verdict["interval"]
    around = "" if interval is None else f" [{interval[0]:.3g} to {interval[1]:.3g}]"
    bound = f"{claim['bound'].replace('_', ' ')} {claim['factor']:g}"
    words = "holds" if verdict["holds"] else "**does not hold**"
    ratios = verdict.get("ratios") or ()
    clear = verdict["clear"] and (interval is not None or len(ratios) > 1)
    words += "" if clear else " (not clearly)" if interval is not None else " (one run, no interval)"
    windows = figures[name].get("windows")
    if windows is not None and windows[0] < FEW:
        words += f", on {windows[0]} windows of {windows[1]:,}"
    if any(one.get("smoke_test") for one in figures.values()):
        words += " -- SMOKE TEST, on the prose inside Python"
    seeds = f", {len(ratios)} seeds {min(ratios):.3g} to {max(ratios):.3g}" if ratios else ""
    return f"{values}: ratio {verdict['ratio']:.3g}{around}{seeds}, asked {bound}: {words}"
