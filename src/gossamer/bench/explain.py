"""A plan in words: for each kind of layer what is chosen, by how much, and what bounds it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.bench.planning import Plan, PlanRow
    from gossamer.bench.timing import Times

BYTES_BOUND = 0.7  # reading alone would take this share of the time, or more
CALL_BOUND = 0.5


def explain(plan: Plan) -> str:
    """What `Plan.explain` returns."""
    lines = list(_heading(plan))
    for row in plan.rows:
        lines += ["", *_row(plan, row)]
    return "\n".join([*lines, "", *_totals(plan)])


def bound(plan: Plan, times: Times, seconds: float) -> str:
    """What a product that takes ``seconds`` spends them on: ``bytes``, ``the call`` or ``arithmetic``."""
    if plan.call_seconds >= CALL_BOUND * seconds:
        return "the call"
    reading = times.read * times.nbytes / (1e9 * plan.read_gb_per_second)
    return "bytes" if reading >= BYTES_BOUND * (seconds - plan.call_seconds) else "arithmetic"


def _heading(plan: Plan) -> Iterator[str]:
    machine = plan.machine
    yield (
        f"For a prompt of {plan.prompt} tokens and {plan.decode} written after it, on {machine.cpu}, "
        f"threads {machine.threads}, kernels {machine.isa}."
    )
    if plan.zeros is not None:
        yield f"{100 * plan.zeros:.3g} % of the activations are zero, at random."
    yield (
        f"A written token reads {_size(plan.working_set)} of weights from "
        f"{machine.weights_from(plan.working_set)}; a plain sum reads so many at "
        f"{plan.read_gb_per_second:.1f} GB/s. A product of next to nothing takes "
        f"{_time(plan.call_seconds)}: the call."
    )


def _row(plan: Plan, row: PlanRow) -> Iterator[str]:
    kind, chosen = row.kind, row.chosen
    yield f"{len(row.names)} x {row.label} ({kind}): {_verdict(row, plan.decode)}"
    ahead = chosen.cost(plan.decode) / row.reference.cost(plan.decode)
    if ahead > 1:
        yield f"  {row.reference.form} is faster still, {ahead:.2f}x, but no packed weight"
    others = [times for times in (*row.candidates, row.reference) if times is not chosen]
    if plan.decode:
        seconds = chosen.decode_seconds
        rivals = _rivals(seconds, ((times.form, times.decode_seconds) for times in others))
        yield (
            f"  a token: {chosen.form} {_time(seconds)}, {_size(chosen.nbytes)} at "
            f"{chosen.gb_per_second:.1f} GB/s, bound by {bound(plan, chosen, seconds)}; {rivals}"
        )
    if plan.prompt:
        seconds = chosen.prompt_seconds
        rivals = _rivals(seconds, ((times.form, times.prompt_seconds) for times in others))
        tokens = 1 if kind.head else plan.prompt
        rate = kind.shape[0] * kind.shape[1] * tokens / seconds / 1e9
        told = " (the head sees its last token)" if kind.head else ""
        yield (
            f"  a prompt{told}: {chosen.form} {_time(seconds)}, {rate:,.0f} GMAC/s, bound by "
            f"{bound(plan, chosen, seconds)}; {rivals}"
        )


def _verdict(row: PlanRow, decode: int) -> str:
    """What is chosen, beside the two that it could have been."""
    chosen, present, dense = row.chosen, row.present, row.dense
    if len(row.candidates) == 1:
        return f"{present.form} as it is; it has no mask that another layout could use"
    said = f"stays {chosen.form}" if chosen is present else f"{chosen.form} in place of {present.form}"
    unmasked = ("dense", "columns")
    forgets = present.form not in unmasked and chosen.form in unmasked
    forgotten = "; its mask is forgotten" if forgets else ""
    if chosen is dense:
        other = min((t for t in row.candidates if t is not dense), key=lambda times: times.cost(decode))
        best = ", the best sparse layout" if other.form not in unmasked else ""
        speed = other.cost(decode) / chosen.cost(decode)
        return f"{said}: {speed:.2f}x as fast as {other.form}{best}{forgotten}"
    speed, share = dense.cost(decode) / chosen.cost(decode), chosen.nbytes / dense.nbytes
    return f"{said}: {speed:.2f}x as fast as dense, in {share:.2f} of its bytes{forgotten}"


def _totals(plan: Plan) -> Iterator[str]:
    totals = plan.totals()
    if plan.mixture:
        yield "Each expert counts as if every token were sent to it: look at the rows, not at these totals."
    for name, total in totals.items():
        whole = total.prompt_seconds + plan.decode * total.decode_seconds
        yield (
            f"all planned weights, {name}: {_size(total.nbytes)}, {_time(total.decode_seconds)} a token, "
            f"{_time(total.prompt_seconds)} a prompt, {_time(whole)} together"
        )


def _rivals(seconds: float, others: Iterable[tuple[str, float]]) -> str:
    """Each other form with its time, and how fast it is beside one of ``seconds``."""
    return ", ".join(f"{form} {_time(other)} ({seconds / other:.2f}x)" for form, other in others)


def _time(seconds: float) -> str:
    """Microseconds, or milliseconds from ten on."""
    return f"{1e6 * seconds:,.1f} us" if seconds < 0.01 else f"{1e3 * seconds:,.1f} ms"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e6:.3g} MB"
