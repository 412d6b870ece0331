"""`gossamer bench --profile`: the parts of a token, what each takes, and how fast it reads and multiplies."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from gossamer.cli import show

if TYPE_CHECKING:
    from gossamer.bench import Part, Profile

NAMES = {"attention_products": "q, k, v, o", "mlp": "MLP"}  # the others are what they are called


def print_profile(found: Profile, notes: list[str]) -> None:
    """The table of ``found``, and ``notes`` below it."""
    header = (
        "part",
        "token",
        "share",
        "reads",
        "GB/s",
        "of plain reading",
        "prompt, a token",
        "share",
        "Gop/s",
    )
    title = (
        f"Profile: medians of tokens {found.prompt + 1} to {found.prompt + found.decode}, and of the prompt"
    )
    rows = [_row(found, NAMES.get(name, name), part) for name, part in found.parts.items()]
    rows.append(_row(found, "whole", found.whole))
    source = found.machine.weights_from(round(found.whole.nbytes))
    show.columns(title, header, rows, [f"what a token reads comes from: {source}", *notes])


def _row(found: Profile, name: str, part: Part) -> tuple[str, ...]:
    token, prompt = median(part.token_seconds), median(part.prompt_seconds)
    share = found.share_of_reading(part)
    return (
        name,
        f"{1e6 * token:,.1f} us",
        show.percent(round(token / median(found.whole.token_seconds), 3)),
        show.size(part.nbytes) if part.nbytes else "",
        f"{part.gb_per_second:.1f}" if part.nbytes else "",
        show.percent(round(share, 2)) if share is not None and part.nbytes else "",
        f"{1e6 * prompt:,.2f} us",
        show.percent(round(prompt / median(found.whole.prompt_seconds), 3)),
        f"{part.gop_per_second:,.1f}" if part.operations else "",
    )
