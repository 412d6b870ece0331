"""Peak memory of block-wise tuning on blocks of Llama-3.2-1B's shape: two of them, then four.

Random weights, the whole embedding of 128,256 tokens, the tokenizer of `--model`. One `gossamer compress
--pattern 32:64 --values int4 --tune blockwise` each, in a process of its own. One block is in memory at a
time, so that four blocks must take what two take, and the sixteen of the model no more. Hidden states of the
calibration windows lie on disk: 4 KiB a token in bfloat16, twice (dense and compressed).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import protocol
from benchmarks.compress import GOSSAMER, limited
from benchmarks.decode_files import SPREAD, norms, shapes
from benchmarks.decode_protocol import llama

BLOCKS = (2, 4)


def parse() -> argparse.Namespace:
    parser = protocol.parser("tune_memory", __doc__)
    protocol.add_model_arguments(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--work", type=Path, default=Path("tune_memory.work"))
    parser.add_argument("--windows", type=int, default=8, help="of 1,024 tokens (default 8)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "tune_memory.json")
    return parser.parse_args()


def folder_of(args: argparse.Namespace, blocks: int) -> Path:
    """A model of so many blocks with random weights in bfloat16."""
    from safetensors.torch import save_file

    folder: Path = args.work / f"blocks-{blocks}"
    if (folder / "model.safetensors").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = llama(2048, 8192, blocks, tied=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in Path(args.model).glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: torch.empty(shape, dtype=torch.bfloat16).normal_(std=SPREAD)
        for name, _, shape in shapes(config)
    }
    tensors |= {name: torch.ones(config["hidden_size"], dtype=torch.bfloat16) for name, _ in norms(config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def tuned(args: argparse.Namespace, blocks: int) -> dict[str, Any]:
    out = args.work / f"tuned-{blocks}"
    command = [sys.executable, "-c", GOSSAMER, "compress", str(folder_of(args, blocks)), "--out", str(out)]
    command += ["--pattern", "32:64", "--values", "int4", "--tune", "blockwise", "--json"]
    command += ["--tune-option", f"epochs={args.epochs}", "--windows", str(args.windows)]
    command += ["--calibration", str(Path(args.data) / protocol.CALIBRATION_TEXT)]
    command += ["--seqlen", str(protocol.CALIBRATION_SEQLEN), "--threads", str(args.threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, env=limited(args.threads), check=True)
    told = json.loads(done.stdout)
    return {"peak_gb": round(told["peak_memory_bytes"] / 1e9, 2), "seconds": round(told["seconds"], 1)}


def main() -> None:
    args = parse()
    protocol.data_folder(args.data)
    rows = []
    for blocks in BLOCKS:
        found = tuned(args, blocks) | {"windows": args.windows, "epochs": args.epochs}
        protocol.update_json(args.out, {"runs": {f"{blocks} blocks": found}, "machine": protocol.machine()})
        rows.append([blocks, found["peak_gb"], found["seconds"]])
    protocol.print_table(["blocks", "peak, GB", "seconds"], rows)


if __name__ == "__main__":
    main()
