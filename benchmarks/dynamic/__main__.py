"""`python -m benchmarks.dynamic PART`: one part after the other, or all of them with what they need."""

from __future__ import annotations

import runpy
import sys

PARTS = {
    "natural": "how sparse activations are by themselves, what a model bears, calibration and robustness",
    "quality": "perplexity and KL while activations are dropped",
    "prepared": "WINA's preparation: the model rotated for it",
    "speed": "tokens a second in the native decoder while activations are dropped",
    "sirius": "the dense model corrects the one that drops activations",
    "blocks": "the block-sparse attention kernel beside dense attention",
    "prompts": "time and perplexity of attention policies on long prompts",
    "needles": "pass keys found in long texts by attention policies",
    "bases": "what keys lose in low rank, by where the directions were found",
    "caches": "bytes, perplexity and decode speed of compressed and selectively read caches",
}


def main() -> None:
    part = sys.argv[1] if len(sys.argv) > 1 else ""
    if part not in PARTS:
        wide = max(map(len, PARTS))
        lines = "\n".join(f"  {name:{wide}}  {what}" for name, what in PARTS.items())
        raise SystemExit(f"usage: python -m benchmarks.dynamic PART [options of the part]\n\n{lines}")
    del sys.argv[1]
    runpy.run_module(f"benchmarks.dynamic.{part}", run_name="__main__")


if __name__ == "__main__":
    main()
