"""`gossamer methods` and `gossamer isa`: what there is to choose from."""

from __future__ import annotations

from typing import Any

from gossamer.cli import show
from gossamer.cli.guard import guarded
from gossamer.cli.options import AsJson

NM_NOTE = "N:M keeps N of every M consecutive inputs: 2:4 keeps 2."


@guarded
def methods(as_json: AsJson = False) -> None:
    """List the methods: what each needs and accepts, its paper, and what that claims."""
    from gossamer.recipes.catalogue import methods as all_methods

    found = all_methods()
    if as_json:
        show.document([method.to_dict() for method in found])
        return
    for family, title, what, notes in (
        ("prune", "Pruning methods", "patterns", (NM_NOTE,)),
        ("allocation", "Allocations: one sparsity shared out over layers", "patterns", ()),
        ("format", "Number formats of what is kept", "patterns", ()),
        ("shrink", "Removing whole blocks", "removes", ()),
        ("tune", "Tuning of what was kept, block by block", "patterns", ()),
        ("finetune", "Fine-tuning of a whole checkpoint: which weights move", "patterns", ()),
        ("loss", "What a checkpoint is tuned to, alone or together", "patterns", ()),
        ("text", "Text that the dense model writes for its copy", "patterns", ()),
        ("module", "Recipes for PyTorch modules (in Python)", "patterns", ()),
        ("activations", "Activation sparsity at run time", "drops", ()),
        ("attention", "Sparse attention at run time", "looks at", ()),
        ("cache", "Caches of keys and values", "keeps", ()),
    ):
        show.columns(
            title,
            ("method", "needs", what, "compares within", "cite and claim"),
            [
                (
                    "\n".join((method.name, *(f"= {alias}" for alias in method.aliases))),
                    ", ".join(method.needs) or "no data",
                    "\n".join(method.patterns),
                    method.comparison_group,
                    method.cite + (f"\n{method.claim.says}" if method.claim else ""),
                )
                for method in found
                if method.family == family
            ],
            notes,
            left=5,
        )


@guarded
def isa(as_json: AsJson = False) -> None:
    """Say which instruction set the kernels use here, and which they could."""
    from gossamer import kernels

    facts: dict[str, Any] = {"isa": kernels.isa(), "available": list(kernels.available())}
    if as_json:
        show.document(facts)
        return
    others = ", ".join(facts["available"])
    print(f"{facts['isa']} (runs here: {others}; GOSSAMER_ISA forces one of them)")
