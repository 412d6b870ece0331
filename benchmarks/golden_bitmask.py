"""Writes tests/golden/bitmask-*.safetensors by compressed-tensors itself, in an environment that has it.

python -m venv CT && CT/bin/pip install torch transformers compressed-tensors==0.11.0
CT/bin/python benchmarks/golden_bitmask.py tests/golden

Versions 0.9 to 0.14 hold the formats; with 0.8.1 and `--old` it writes sparse-bitmask under the names of
then. Beside what the library stored lies each weight as it was, as `dense.NAME`.
"""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.config import SparsityCompressionConfig
from safetensors.torch import save_file


def weights(kind: str) -> dict[str, torch.Tensor]:
    """Weights of several dtypes and widths, some rows empty."""
    random = torch.Generator().manual_seed(7)
    found = {}
    for name, dtype, rows, columns in (
        ("a.q_proj", torch.float32, 5, 12),
        ("a.k_proj", torch.bfloat16, 8, 32),
        ("b.up_proj", torch.float16, 3, 20),
    ):
        weight = torch.randn((rows, columns), generator=random)
        if kind == "sparse-24-bitmask":
            least = weight.abs().reshape(-1, 4).topk(2, dim=1, largest=False).indices
            weight = weight.reshape(-1, 4).scatter(1, least, 0).reshape(rows, columns)
        else:
            weight = weight * (torch.rand((rows, columns), generator=random) < 0.4)
        weight[1] = 0
        found[f"{name}.weight"] = weight.to(dtype)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--old", action="store_true")
    args = parser.parse_args()
    try:
        by = version("compressed-tensors")
    except PackageNotFoundError:  # from an unpacked wheel
        by = "unknown"
    for kind in ["sparse-bitmask"] if args.old else ["sparse-bitmask", "sparse-24-bitmask"]:
        structure = "2:4" if "24" in kind else "unstructured"
        config = SparsityCompressionConfig(format=kind, sparsity_structure=structure)
        dense = weights(kind)
        stored = BaseCompressor.load_from_registry(kind, config=config).compress(dense)
        tensors = {**stored, **{f"dense.{name}": weight for name, weight in dense.items()}}
        path = args.out / f"bitmask-{kind}{'-old' if args.old else ''}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"by": by})
        print(path, sorted(tensors))


if __name__ == "__main__":
    main()
