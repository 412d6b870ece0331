"""Plans: the layout of each kind of layer that is fastest on this machine, dense included, by measurement."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import nn

from gossamer.bench.explain import explain
from gossamer.bench.kinds import Kind, Members, leaves_of
from gossamer.bench.machine import Machine, OtherWork, machine_facts, read_bandwidth, use_threads
from gossamer.bench.plan_cache import PlanCache
from gossamer.bench.speed import decode_bytes
from gossamer.bench.timing import TORCH, Times, call_seconds, past_cache, time_forms
from gossamer.errors import EvaluationError, ModelError
from gossamer.matrices import Packed
from gossamer.nn.experts import count_experts
from gossamer.progress import Progress, silent

PROMPT_ROWS = 512  # longer prompts are timed on so many rows; beyond, time grows with their number
TIE = 0.02  # costs that differ by less are the same: the fewest bytes win


@dataclass(frozen=True)
class PlanRow:
    """Weights of one kind and what was measured of them.

    ``names``: the packed leaves, as modules of the model; ``nbytes``: of all of them as they are;
    ``candidates``: the layouts to choose from, the present one first and dense among them; ``reference``:
    torch's bfloat16 linear; ``other_work``: cores that other processes kept busy during the measurement.
    """

    kind: Kind
    names: tuple[str, ...]
    nbytes: int
    candidates: tuple[Times, ...]
    reference: Times
    chosen: Times
    other_work: float

    @property
    def label(self) -> str:
        """The layers' own names, without the path to them: ``gate_proj, up_proj``."""
        return ", ".join(dict.fromkeys(n.partition(".matrix")[0].rpartition(".")[2] for n in self.names))

    @property
    def present(self) -> Times:
        """The layout that the weights have."""
        return self.candidates[0]

    @property
    def dense(self) -> Times:
        """Dense, of the same values."""
        return next(times for times in self.candidates if times.form == "dense")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        told = {**asdict(self.kind), "layers": len(self.names), "names": list(self.names)}
        forms = [*self.candidates, self.reference]
        measured = [{**asdict(form), "gb_per_second": form.gb_per_second} for form in forms]
        done = {"bytes": self.nbytes, "measured": measured, "chosen": self.chosen.form}
        return {**told, **done, "other_work": self.other_work}


@dataclass(frozen=True)
class Total:
    """All weights of a plan together: bytes, and seconds a written token and a prompt."""

    nbytes: int
    decode_seconds: float
    prompt_seconds: float


@dataclass(frozen=True)
class Plan:
    """What `plan` found. ``prompt``, ``decode``: the tokens of a prompt and those written after it, by which
    costs are weighed. ``working_set``: bytes of weights that the whole model reads for a token, as it is (of
    a plain model: the planned ones alone); ``read_gb_per_second``: the rate at which a plain sum reads so
    many; ``call_seconds``: of a product whose weight is next to nothing; ``zeros``: the share of activations
    that are zero, None where nobody said; ``mixture``: it holds experts, each of which counts as if every
    token were sent to it: its rows hold, its totals do not."""

    rows: tuple[PlanRow, ...]
    prompt: int
    decode: int
    working_set: int
    read_gb_per_second: float
    call_seconds: float
    machine: Machine
    zeros: float | None = None
    mixture: bool = False

    @property
    def other_work(self) -> float:
        """Cores that other processes kept busy, in the worst of the measurements."""
        return max(row.other_work for row in self.rows)

    def totals(self) -> dict[str, Total]:
        """The planned weights together: in the ``present`` layouts, the ``chosen`` ones, all ``dense``, and
        through `TORCH`."""
        ways: dict[str, Callable[[PlanRow], Times]] = {
            "present": lambda row: row.present,
            "chosen": lambda row: row.chosen,
            "dense": lambda row: row.dense,
            TORCH: lambda row: row.reference,
        }
        return {name: _total((way(row), len(row.names)) for row in self.rows) for name, way in ways.items()}

    def explain(self) -> str:
        """For each kind of layer what is chosen and why, as lines of text."""
        return explain(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "machine": self.machine.to_dict(),
            "other_work": self.other_work,
            "prompt": self.prompt,
            "decode": self.decode,
            "working_set": self.working_set,
            "past_cache": self.machine.past_cache(self.working_set),
            "read_gb_per_second": self.read_gb_per_second,
            "call_seconds": self.call_seconds,
            "zeros": self.zeros,
            "mixture": self.mixture,
            "rows": [row.to_dict() for row in self.rows],
            "totals": {name: asdict(total) for name, total in self.totals().items()},
        }

    def apply(self, model: nn.Module) -> dict[str, str]:
        """Repacks in place the weights of ``model`` whose chosen layout is another than they have; returns
        their names and new layouts.

        Float values stay bit for bit and integer codes exactly, so integer products do not change. **Where
        dense or columns is chosen the mask is forgotten**: which weights were pruned cannot be told
        afterwards. Raises ModelError where the plan is of another model, or of one that was not packed yet.
        """
        wanted = {name: row for row in self.rows for name in row.names}
        found: dict[str, Packed] = {}
        for name, row in wanted.items():
            leaf = _module(model, name)
            if not isinstance(leaf, Packed) or leaf.shape != row.kind.shape:
                raise ModelError(
                    f"{type(model).__name__} has no packed weight {name} of {row.kind.shape}: the plan is of "
                    "another model, or of one that was not packed yet"
                )
            found[name] = leaf
        places = _places(model)
        changed: dict[str, str] = {}
        repacked: dict[int, str] = {}  # a weight that layers share is packed once
        for name in wanted:
            leaf, layout = found.pop(name), wanted[name].chosen.form
            if id(leaf) not in repacked and leaf.layout != layout:
                repacked[id(leaf)] = layout
                packed = leaf.repack(layout)
                for parent, key in places[id(leaf)]:
                    parent._modules[key] = packed
            if id(leaf) in repacked:
                changed[name] = repacked[id(leaf)]
        return changed


def plan(
    model: nn.Module,
    *,
    prompt: int = 512,
    decode: int = 64,
    values: str | None = None,
    pattern: str | None = None,
    sparsity: float | None = None,
    group: int = 64,
    zeros: float | None = None,
    threads: int | None = None,
    refresh: bool = False,
    progress: Progress = silent,
) -> Plan:
    """Times the layouts that could hold each kind of packed weight in ``model`` on this machine, dense always
    among them, and chooses the fastest for a prompt of ``prompt`` tokens and ``decode`` written after it.

    ``model``: one whose StructuredLinear modules hold packed weights (those of a sum or product count one by
    one); or a plain decoder, its parameters on the meta device or not, whose prunable layers would become
    ``values`` in ``pattern`` (None: dense) at ``sparsity`` in groups of ``group``: random weights are timed.
    ``zeros``: the share of activations that will be zero, as the caller has seen or will make it (0.7: 70 %):
    all is timed with so many, at random, and the layout columns, which leaves their weights unread, is a
    candidate. ``threads``: of PyTorch and the kernels; None leaves them. ``refresh``: measure what the
    cache of this machine holds anew.

    Costs within 2 % count as equal, and the fewest bytes win. Every weight counts once a token: in a mixture
    of experts, which reads few of them, look at the rows and not at the totals.
    Raises EvaluationError where there is nothing to plan, KernelError without the native kernels.
    """
    if prompt < 0 or decode < 0 or prompt + decode == 0:
        raise EvaluationError(f"a plan is for some tokens, got a prompt of {prompt} and {decode} to write")
    if zeros is not None and not 0 <= zeros <= 1:
        raise EvaluationError(f"zeros are a share of the activations, from 0 to 1, got {zeros}")
    kinds = leaves_of(model, values, pattern, sparsity, group, zeros is not None)
    nbytes = sum(members.nbytes for members in kinds.values())
    working_set = decode_bytes(model) if values is None else nbytes
    with use_threads(threads):
        machine = machine_facts(bandwidth=False)
        cache = PlanCache(machine.threads, refresh=refresh)
        walked = min(working_set, past_cache(1))
        read = _number(cache, f"reading {walked} bytes", lambda: read_bandwidth(working_set=walked))
        call = _number(cache, "a call", call_seconds)
        rows = []
        for index, (kind, members) in enumerate(kinds.items()):
            progress("plan", index, len(kinds))
            rows.append(_row(kind, members, prompt, decode, working_set, cache, zeros))
        progress("plan", len(kinds), len(kinds))
    return Plan(
        rows=tuple(rows),
        prompt=prompt,
        decode=decode,
        working_set=working_set,
        read_gb_per_second=read / 1e9,
        call_seconds=call,
        machine=machine,
        zeros=zeros,
        mixture=any(count_experts(module) for module in model.modules()),
    )


def choose(candidates: Iterable[Times], decode: int) -> Times:
    """The candidate with the fewest bytes among those whose cost is within TIE of the least."""
    candidates = list(candidates)
    least = min(times.cost(decode) for times in candidates)
    return min((t for t in candidates if t.cost(decode) <= least * (1 + TIE)), key=lambda t: t.nbytes)


def _row(
    kind: Kind,
    members: Members,
    prompt: int,
    decode: int,
    working_set: int,
    cache: PlanCache,
    zeros: float | None,
) -> PlanRow:
    tokens = min(prompt, 1) if kind.head else prompt
    rows = min(tokens, PROMPT_ROWS)
    sample = members.sample
    copies = max(1, round(working_set / sample.nbytes))
    name = (
        f"{kind}: {', '.join(members.layouts)}; {rows} rows; {min(copies, past_cache(sample.nbytes))} copies"
    )
    if zeros is not None:
        name += f"; {zeros} zeros"
    found = _measured(cache.get(name), members.layouts)
    if found is None:
        others = OtherWork()
        forms = [sample, *(sample.repack(layout) for layout in members.layouts[1:])]
        times = time_forms(forms, rows, copies, zeros or 0.0)
        found = times, others.cores()
        cache.put(name, {"times": [asdict(one) for one in times], "other_work": found[1]})
    scale = tokens / rows if rows else 0.0
    *candidates, reference = (replace(one, prompt_seconds=scale * one.prompt_seconds) for one in found[0])
    return PlanRow(
        kind=kind,
        names=members.names,
        nbytes=members.nbytes,
        candidates=tuple(candidates),
        reference=reference,
        chosen=choose(candidates, decode),
        other_work=found[1],
    )


def _measured(value: Any, layouts: tuple[str, ...]) -> tuple[list[Times], float] | None:
    """Times and other work as the cache holds them, or None where that is not what was put there."""
    try:
        times = [Times(**one) for one in value["times"]]
        figures = [number for one in times for number in list(asdict(one).values())[1:]]
        usable = all(number >= 0 for number in figures) and all(one.decode_seconds > 0 for one in times)
        other_work = float(value["other_work"])
    except (TypeError, KeyError, ValueError):
        return None
    forms = tuple(one.form for one in times[:-1])
    return (times, other_work) if usable and forms == layouts else None


def _number(cache: PlanCache, name: str, measure: Callable[[], float]) -> float:
    """A positive number that the cache holds, or measured now."""
    held = cache.get(name)
    if isinstance(held, float) and held > 0:
        return held
    measured = measure()
    cache.put(name, measured)
    return measured


def _total(weights: Iterable[tuple[Times, int]]) -> Total:
    weights = list(weights)
    return Total(
        nbytes=sum(count * times.nbytes for times, count in weights),
        decode_seconds=sum(count * times.decode_seconds for times, count in weights),
        prompt_seconds=sum(count * times.prompt_seconds for times, count in weights),
    )


def _module(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where each module hangs: its parents, and its key in them."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, key))
    return places
