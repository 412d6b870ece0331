"""Times llm-compressor's SparseGPT or Wanda on a model folder, and measures what it made of the model.

Run it in an environment of its own: `pip install torch llmcompressor==0.14.0` (torch from the CPU index).
The seconds are those of `oneshot` alone: no loading of the model, no tokenising, no saving.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import protocol

# By its plain name `lm_head` is not ignored: it is pruned, without a word.
HEAD = "re:.*lm_head"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.rival_llmcompressor", description=__doc__)
    protocol.add_model_arguments(parser)
    parser.add_argument("--method", choices=["sparsegpt", "wanda"], default="sparsegpt")
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--pattern", default="0:0", metavar="N:M", help="0:0 (default) is unstructured; 2:4")
    parser.add_argument("--windows", type=int, default=128, help="calibration windows of 1,024 (default 128)")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the model (default bfloat16)"
    )
    parser.add_argument("--eval-windows", type=int, default=protocol.EVAL_WINDOWS, help="0 skips perplexity")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "llmcompressor.json", metavar="FILE")
    return parser.parse_args()


def loader(windows: torch.Tensor) -> Any:
    """Calibration windows [count, seqlen] as the DataLoader that oneshot asks for."""
    samples = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in windows]
    return torch.utils.data.DataLoader(samples, batch_size=1, shuffle=False)  # type: ignore[arg-type]


def modifier(args: argparse.Namespace) -> Any:
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = {"sparsegpt": SparseGPTModifier, "wanda": WandaPruningModifier}[args.method]
    return kind(sparsity=args.sparsity, mask_structure=args.pattern, targets=["Linear"], ignore=[HEAD])


def zeros(model: Any) -> tuple[float, float]:
    """Fraction of zeros in the blocks' linears, and in the head (which must stay dense)."""
    linears = [m.weight for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear)]
    total = sum(weight.numel() for weight in linears)
    blocks = sum(int((weight == 0).sum()) for weight in linears) / total
    return blocks, float((model.lm_head.weight == 0).double().mean())


def main() -> None:
    args = parse()
    protocol.set_threads(args.threads)
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM

    tokenizer = protocol.load_tokenizer(args.model)
    windows = protocol.calibration_windows(tokenizer, args.data, args.windows)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    head_before = zeros(model)[1]
    load_peak = protocol.peak_rss_gb()
    protocol.reset_peak_rss()
    start = time.perf_counter()
    oneshot(
        model=model,
        recipe=[modifier(args)],
        dataset=loader(windows),
        num_calibration_samples=args.windows,
        max_seq_length=windows.shape[1],
        pipeline="sequential",
    )
    seconds = time.perf_counter() - start
    compress_peak = protocol.peak_rss_gb()
    sparsity, head = zeros(model)
    ppl = None
    if args.eval_windows:
        measured = protocol.measured_windows(tokenizer, args.data, args.eval_windows)
        ppl = round(protocol.perplexity(model.float(), measured), 4)
    report(
        args,
        {
            "method": args.method,
            "sparsity": args.sparsity,
            "pattern": args.pattern,
            "calibration_windows": args.windows,
            "dtype": args.dtype,
            "threads": args.threads,
            "seconds": round(seconds, 1),
            "peak_rss_gb": round(max(load_peak, compress_peak), 2),
            "peak_rss_of_compression_gb": round(compress_peak, 2),
            "perplexity": ppl,
            "eval_windows": args.eval_windows,
            "zeros": round(sparsity, 6),
            "head_zeros": round(head, 6),
            "head_zeros_before": round(head_before, 6),
        },
    )


def report(args: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print the figures and merge them into the result file under the run's name."""
    import llmcompressor

    name = f"{args.method}_{args.pattern}_{args.sparsity:g}_w{args.windows}_{args.dtype}_t{args.threads}"
    protocol.update_json(
        args.out,
        {
            "runs": {name: figures},
            "command": "python -m benchmarks.rival_llmcompressor --model DIR --windows N --threads N",
            "llmcompressor": llmcompressor.__version__,
            "machine": protocol.machine(),
        },
    )
    protocol.print_table(["figure", "llm-compressor"], [[key, value] for key, value in figures.items()])


if __name__ == "__main__":
    main()
