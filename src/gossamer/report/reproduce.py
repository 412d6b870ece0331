"""`reproduce`: a method's claim run in miniature, its figures beside the paper's words and the baselines'."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from gossamer.claim import Claim, Experiment
from gossamer.errors import CheckpointError, GossamerError, MethodError
from gossamer.evaluate import exp, paired_ratio, perplexity_ratio_interval
from gossamer.matrices.atomic import output_error
from gossamer.progress import Progress, silent
from gossamer.recipes.catalogue import methods
from gossamer.report import nets, one_shot
from gossamer.report.baselines import with_baselines
from gossamer.report.texts import Texts

PARTS = {"perplexity": "nll", "kl": "window_kl", "accuracy": "right"}
"""What a metric is the mean of, of each window (of a net: each image)."""

__all__ = ["Texts", "Verdict", "claimed", "reproduce", "verdicts_in"]


@dataclass(frozen=True)
class Verdict:
    """What came of a claim. ``figures``: by contender; ``ratio`` of the method's metric to that of
    ``claim.than``, and its 95 % bootstrap interval over windows, where there are two or more; ``holds``: the
    ratio keeps the bound; ``clear``: so do its whole interval and every seed, or none of them, and there is
    an interval or more than one seed. Of several seeds figures are means, and ``ratios`` those of each."""

    name: str
    claim: Claim
    figures: dict[str, dict[str, Any]]
    ratio: float
    interval: tuple[float, float] | None
    holds: bool
    clear: bool
    seconds: float
    ratios: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; the values of each window are left out."""
        plain = {**asdict(self), "claim": self.claim.to_dict()}
        plain["figures"] = {
            name: {key: value for key, value in found.items() if key not in (*PARTS.values(), "asked")}
            for name, found in self.figures.items()
        }
        return plain


def claimed() -> dict[str, Claim]:
    """The methods that have a claim which runs, by name."""
    return {method.name: method.claim for method in methods() if method.claim is not None}


def reproduce(
    name: str,
    work: str | Path,
    *,
    claim: Claim | None = None,
    texts: Texts | None = None,
    seeds: int = 1,
    progress: Progress = silent,
) -> Verdict:
    """Runs the claim of the method ``name`` (or ``claim`` in its place): the method, ``claim.than``, all that
    its experiment names beside, and the baselines of pruning, on the same windows. ``seeds``: of calibration
    text, methods and tuning, one run for each.

    Figures are kept under ``work``, so that an interrupted run goes on and contenders are measured once for
    all claims that share them. Raises MethodError for a method without a claim.
    """
    claim = claim or claimed().get(name)
    if claim is None:
        known = ", ".join(claimed())
        raise MethodError(f"the method {name!r} has no claim to run (there are: {known})")
    work, texts = Path(work), texts or Texts()
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise output_error(error, work, None) from error
    start = time.perf_counter()
    whole = with_baselines(name, claim.experiment)
    if nets.is_net(whole.model):
        nets.check(whole)
    elif claim.metric == "accuracy":
        raise MethodError(f"the accuracy of {name} is that of a net, not of {whole.model}")
    names = dict.fromkeys([name, claim.than, *whole.against, "dense"])
    runs = [
        {one: _figures(one, experiment, texts, work, progress) for one in names}
        for experiment in (replace(whole, seed=whole.seed + i) for i in range(seeds))
    ]
    found = {one: _mean([run[one] for run in runs]) for one in names}
    ratio, *ratios = (
        _ratio(run[name][claim.metric], run[claim.than][claim.metric]) for run in (found, *runs)
    )
    interval = _interval(claim, found[name], found[claim.than])
    kept = {_keeps(claim, one) for one in (ratio, *ratios, *(interval or ()))}
    return Verdict(
        name,
        claim,
        found,
        ratio,
        interval,
        _keeps(claim, ratio),
        len(kept) == 1 and (interval is not None or seeds > 1),
        time.perf_counter() - start,
        tuple(ratios) if seeds > 1 else (),
    )


def _figures(
    name: str, experiment: Experiment, texts: Texts, work: Path, progress: Progress
) -> dict[str, Any]:
    """Those of one contender."""
    if nets.is_net(experiment.model):
        return nets.figures(name, experiment, work, progress)
    return one_shot.figures(name, experiment, texts, work, progress)


def _mean(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A contender's figures over seeds, window by window."""
    if len(runs) == 1:
        return runs[0]
    found: dict[str, Any] = {}
    for metric, parts in PARTS.items():
        if runs[0].get(metric) is not None:
            each = [fmean(window) for window in zip(*(run[parts] for run in runs), strict=True)]
            found |= {metric: exp(fmean(each)) if metric == "perplexity" else fmean(each), parts: each}
    seconds = [run["seconds"] for run in runs]
    return {**runs[0], **found, "seconds": None if None in seconds else round(fmean(seconds), 1)}


def _ratio(ours: float, theirs: float) -> float:
    return float(ours) / theirs if theirs else math.inf


def _keeps(claim: Claim, ratio: float) -> bool:
    return ratio <= claim.factor if claim.bound == "at_most" else ratio >= claim.factor


def _interval(claim: Claim, ours: dict[str, Any], theirs: dict[str, Any]) -> tuple[float, float] | None:
    key = PARTS[claim.metric]
    values, reference = ours[key], theirs[key]
    if len(values) < 2 or not all(map(math.isfinite, [*values, *reference])):
        return None
    if key == "nll":
        found = perplexity_ratio_interval(values, reference)
    elif min(sum(values), sum(reference)) <= 0:  # the dense model's own
        return None
    else:
        found = paired_ratio(values, reference)
    return found.low, found.high


def run_all(
    names: Sequence[str], work: str | Path, *, budget: float | None = None, **options: Any
) -> Iterator[tuple[str, Verdict | GossamerError]]:
    """The claims of ``names`` in turn, each with its verdict, or with what kept it from one; none is begun
    once ``budget`` seconds are over."""
    start = time.monotonic()
    for name in names:
        if budget is not None and time.monotonic() - start > budget:
            return
        try:
            came: Verdict | GossamerError = reproduce(name, work, **options)
        except GossamerError as error:
            came = error
        yield name, came


def verdicts_in(file: Path) -> dict[str, dict[str, Any]]:
    """Verdicts by method that a JSON file holds, none where there is no file; raises CheckpointError where
    it is damaged."""
    try:
        return dict(json.loads(file.read_text(encoding="utf-8"))["claims"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file.name} holds no verdicts: {error!r}") from error
