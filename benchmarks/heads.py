"""The head in few bits: what each way of rounding it costs a checkpoint whose blocks stay as they are.

Heads of other formats stand in the place of a checkpoint's own (a model whose embedding is its head: both),
rounded to the nearest or by the OBS sweep on what the head reads, as `gossamer compress --head-values` does.
Beside the error of the head's outputs on calibration text: perplexity, KL to the dense model and agreement on
WikiText-2's test part and on a novel.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import protocol
from benchmarks.recipes import TEXTS

FORMATS = (("nl4", 64), ("nl4", 32), ("int4", 32))
OWN = "as in the checkpoint"


def parse() -> argparse.Namespace:
    parser = protocol.parser("heads", __doc__)
    protocol.add_model_arguments(parser, required=False)
    parser.add_argument("--checkpoint", type=Path, metavar="DIR", help="of the recipe balanced, say")
    parser.add_argument("--windows", type=int, default=16, help="calibration windows of 1,024")
    parser.add_argument("--eval-windows", type=int, default=4, help="of 2,048 tokens, of each text")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "heads.json", metavar="FILE")
    parser.add_argument("--table", type=Path, metavar="FILE", help="measure nothing: write the table there")
    return parser.parse_args()


@torch.inference_mode()
def gram_of(checkpoint: Path, windows: Tensor) -> Any:
    """The Gram matrix of what the checkpoint's head reads."""
    from gossamer.calibrate import Gram
    from gossamer.models import load_checkpoint

    model = load_checkpoint(checkpoint)
    gram = Gram(model.get_output_embeddings().in_features)
    for window in windows:
        gram.update(model.model(window[None]).last_hidden_state[0])
    gram.finish()
    return gram


def heads(weight: Tensor, gram: Any) -> Iterator[tuple[str, Any, Any]]:
    """A name, and what stands for embedding and head (None: the checkpoint's own)."""
    from gossamer.calibrate import Gram
    from gossamer.prune import Layer
    from gossamer.recipes.prune_layer import pack_edge

    yield OWN, None, None
    for values, group in FORMATS:
        nearest = pack_edge(Layer("head", weight), values, group)
        yield f"`{values}` by {group}, to the nearest", nearest, nearest
        if (values, group) == ("nl4", 32):
            yield "the same as the embedding alone", nearest, None
            yield "the same as the head alone", None, nearest
        swept = pack_edge(Layer("head", weight, {Gram: gram}), values, group)
        yield f"`{values}` by {group}, by what it reads", swept, swept


def run(args: argparse.Namespace) -> None:
    from gossamer.evaluate import evaluate, reconstruction_error
    from gossamer.evaluate.logits import LogitReader
    from gossamer.models import evaluation_windows, load_checkpoint, read_text
    from gossamer.recipes.load import load

    dense = load(args.model, dtype="fast")
    weight = load(args.model).model.get_output_embeddings().weight.detach().float()
    texts = {
        name: evaluation_windows(
            read_text(args.data / file), dense.tokenizer, protocol.EVAL_SEQLEN, args.eval_windows
        )
        for name, file in TEXTS.items()
    }
    reader = LogitReader(dense.model, remember=True)
    gram = gram_of(
        args.checkpoint, protocol.calibration_windows(dense.tokenizer, str(args.data), args.windows)
    )
    for name, embedding, head in heads(weight, gram):
        model = load_checkpoint(args.checkpoint)
        tables = model.get_input_embeddings(), model.get_output_embeddings()
        for table, matrix in zip(tables, (embedding, head), strict=True):
            table.matrix = table.matrix if matrix is None else matrix
        stands = tables[1].matrix
        found: dict[str, Any] = {
            "bytes": stands.nbytes,
            "output_error": reconstruction_error(weight, stands.to_dense().float(), gram.matrix),
        }
        for text, windows in texts.items():
            quality = evaluate(model, windows, reference=reader)
            found[text] = {
                "perplexity_ratio": quality.perplexity / (quality.reference_perplexity or 1.0),
                "kl": quality.mean_kl,
                "agreement": quality.top1_agreement,
            }
        protocol.update_json(args.out, {"heads": {name: found}, "machine": protocol.machine()})
        print(page({name: found}), flush=True)


def page(found: dict[str, Any]) -> str:
    """The table in Markdown."""
    head = ["head and embedding", "MB", "error of outputs"]
    head += [f"{text}: {what}" for text in TEXTS for what in ("perplexity", "KL", "top-1")]
    rows = []
    for name, one in found.items():
        row = [name, f"{one['bytes'] / 1e6:.1f}", f"{one['output_error']:.4f}"]
        for text in TEXTS:
            got = one[text]
            row += [f"{got['perplexity_ratio']:.3f}x", f"{got['kl']:.4f}", f"{got['agreement']:.1%}"]
        rows.append(row)
    return protocol.markdown_table(head, rows)


def main() -> None:
    args = parse()
    if args.table:
        protocol.write_between(args.table, "heads", page(protocol.read_json(args.out).get("heads", {})))
        return
    if args.checkpoint is None:
        raise SystemExit("the checkpoint whose head is exchanged is needed: pass --checkpoint DIR")
    args.model, args.data = str(protocol.model_folder(args.model)), protocol.data_folder(args.data)
    protocol.set_threads(args.threads)
    run(args)


if __name__ == "__main__":
    main()
