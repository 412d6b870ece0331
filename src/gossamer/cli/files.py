"""`gossamer info`, `verify` and `export`: looking at what lies on disk, and taking it elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from gossamer.cli import options, show
from gossamer.cli.guard import MISUSE, guarded
from gossamer.cli.progress import progress

if TYPE_CHECKING:
    from gossamer.recipes.describe import CheckpointFacts, ModelFacts


class ExportDtype(str, Enum):
    """What an export's floating tensors are stored in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


class ExportFormat(str, Enum):
    """How an export stores linear layers with zeros."""

    dense = "dense"
    sparse_bitmask = "sparse-bitmask"
    sparse_24_bitmask = "sparse-24-bitmask"


@guarded
def info(model: options.AnyModel, as_json: options.AsJson = False) -> None:
    """Say what a checkpoint or model is made of, without loading its weights."""
    from gossamer.recipes.describe import CheckpointFacts, describe

    with progress() as report:
        found = describe(model, report)
    if as_json:
        show.document(found.to_dict())
    elif isinstance(found, CheckpointFacts):
        show.facts(
            f"{found.label}: a Gossamer checkpoint", [*checkpoint_rows(found), *_made_rows(found.made)]
        )
    else:
        show.facts(f"{found.label}: {found.architecture}", _model_rows(found))


@guarded
def verify(checkpoint: options.Checkpoint, as_json: options.AsJson = False) -> None:
    """Read every byte of a checkpoint and compare it with the sha256 it was written with."""
    from gossamer.models.verify import verify_checkpoint

    with progress() as report:
        found = verify_checkpoint(checkpoint, progress=report)
    if as_json:
        files = [asdict(file) for file in found.files]
        problems = list(found.problems)
        show.document({"ok": found.ok, "files": files, "matrices": found.matrices, "problems": problems})
    elif found.ok:
        total = show.size(sum(file.size for file in found.files))
        print(f"{checkpoint} is undamaged: {len(found.files)} files ({total}), {found.matrices} matrices")
    else:
        print(f"{checkpoint} is damaged:")
        for problem in found.problems:
            print(f"  {problem}")
    if not found.ok:
        raise typer.Exit(MISUSE)


@guarded
def export(
    checkpoint: options.Checkpoint,
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to make; must not exist.")],
    dtype: Annotated[ExportDtype, typer.Option("--dtype", help="Of every weight.")] = ExportDtype.bfloat16,
    form: Annotated[
        ExportFormat,
        typer.Option("--format", help="dense, or one of compressed-tensors' (0.9 to 0.14) sparse formats."),
    ] = ExportFormat.dense,
    as_json: options.AsJson = False,
) -> None:
    """Write a checkpoint as a folder that transformers loads unchanged, zeros where pruned."""
    from gossamer.models.export import export_dense
    from gossamer.recipes.describe import weight_bytes

    with progress() as report:
        sparse = None if form is ExportFormat.dense else form.value
        path = export_dense(checkpoint, out, dtype.value, sparse=sparse, progress=report)
    size = weight_bytes(path)
    if as_json:
        found = {"out": str(path), "dtype": dtype.value, "format": form.value, "weight_file_bytes": size}
        show.document(found)
    else:
        print(f"{path}: {show.size(size)} of {dtype.value}, {form.value}")
        if (checkpoint / "activations.json").is_file():
            print("its gates are left out: the folder computes with all activations")
        if sparse is None:
            print(f"next: AutoModelForCausalLM.from_pretrained({str(path)!r})")
        else:
            print(
                "for compressed-tensors 0.9 to 0.14, and gossamer: beside a later one transformers starts "
                "sparse layers with random weights, so give that a dense export"
            )


def checkpoint_rows(found: CheckpointFacts) -> list[tuple[str, str]]:
    """What a checkpoint is, in lines of a table; also at the end of `gossamer compress`."""
    layouts = ", ".join(f"{count} x {form}" for form, count in found.layouts.items())
    rows = [
        ("size on disk", f"{show.size(found.file_bytes)} (weights {show.size(found.weight_file_bytes)})"),
        ("bits a weight", f"{found.linear_bits:.3f} linears only, {found.all_bits:.3f} all in"),
        (
            "parameters",
            f"{found.parameters:,}, of them {found.linear_parameters:,} in {found.linear_layers} linears",
        ),
    ]
    if found.sparsity is not None and found.sparsity_requested is not None:
        share = f"{show.percent(found.sparsity_requested)} requested, {show.percent(found.sparsity)} achieved"
        rows.append(("sparsity", f"{share}, of {found.sparsity_of or 'the linears'}"))
    if isinstance(budget := found.made.get("budget"), dict):
        of = {
            "bytes": "of weights on disk",
            "bits": "a weight in the linears",
            "seconds": "a token in the linears, as timed",
        }.get(str(budget.get("measure")), "")
        rows.append(("budget", f"{budget.get('asked')} {of}"))
        if found.sparsity is not None:
            rows.append(("sparsity", f"{show.percent(found.sparsity)} of {found.sparsity_of}"))
    if (error := found.layer_error) is not None:
        of = "outputs" if error.kind == "output_error" else "weights"
        mean, worst = f"{100 * error.mean:.3g} %", f"{100 * error.worst:.3g} %"
        rows.append(("layer error", f"mean {mean} of the {of}' energy, worst {worst} ({error.worst_layer})"))
    rows.append(("stored as", layouts))
    if (left := sum(found.uncompressed.values())) > 0.01 * found.parameters:
        largest = max(found.uncompressed, key=lambda name: found.uncompressed[name])
        share = f"{show.percent(left / found.parameters)} of all parameters, such as {largest}"
        rows.append(("left as it is", f"{share}: no linear layers, which alone are compressed"))
    if found.unreached:
        words = (
            f"{found.unreached} layers of experts that no calibration token came by: more windows reach more"
        )
        rows.append(("by weights alone", words))
    rows += [("damaged", problem) for problem in found.problems]
    return rows


def _made_rows(made: dict[str, Any]) -> list[tuple[str, str]]:
    rows = [(name, str(made[name])) for name in ("model", "method", "pattern") if made.get(name) is not None]
    recipe = made.get("recipe")
    if isinstance(recipe, dict):
        rows.append(("recipe", f"{recipe.get('name')} ({str(recipe.get('sha256'))[:12]})"))
    if isinstance(sampled := made.get("sampled"), dict):
        drawn = f"{sampled.get('tokens', 0):,} tokens in {sampled.get('records', 0):,} documents"
        rows.append(("self-written", f"{drawn}, after {sampled.get('text')}"))
    for tuned in made.get("tuned") or ():
        settings = tuned.get("settings", {})
        losses = " + ".join(settings.get("losses", {}))
        rows.append(("tuned", f"{settings.get('method')}, {losses}, {tuned.get('tokens', 0):,} tokens"))
    activations = made.get("activations")
    if isinstance(activations, dict):
        rows.append(("gated", f"activations by {activations.get('method')}"))
    calibration = made.get("calibration")
    if isinstance(calibration, dict):
        smoke = " (smoke test)" if calibration.get("smoke_test") else ""
        windows = f"{calibration.get('windows')} windows of {calibration.get('seqlen')} tokens"
        rows.append(("calibration", f"{windows} of {calibration.get('text')}{smoke}"))
    with_ = made.get("with")
    if isinstance(with_, dict):
        rows.append(("made with", ", ".join(f"{name} {value}" for name, value in with_.items())))
    return rows


def _model_rows(found: ModelFacts) -> list[tuple[str, str]]:
    share = found.prunable_parameters / found.parameters
    head = "tied to the embeddings" if found.tied else f"{found.head_parameters:,}"
    stored = ", ".join(f"{count:,} {dtype}" for dtype, count in found.dtypes.items())
    larger = found.source_bytes != found.weight_file_bytes
    made_from = f", made from {show.size(found.source_bytes)}" if larger else ""
    rows = [
        ("parameters", f"{found.parameters:,}"),
        ("blocks", f"{found.blocks}"),
        (
            "prunable",
            f"{found.prunable_parameters:,} in {found.prunable_layers} linears, {show.percent(share)} of all",
        ),
        ("embeddings", f"{found.embedding_parameters:,}"),
        ("head", head),
        ("stored as", f"{stored} ({show.size(found.weight_file_bytes)}{made_from})"),
    ]
    told = (("licence", found.license), ("from", found.origin))
    return rows + [(name, value) for name, value in told if value]
