"""A needle in a haystack: a pass key in a novel, by length of the text and by depth, for every policy.

"The pass key is 71432." stands, twice, somewhere in text of a novel, and the question for it at the end. A
trial is right where each of the five digits is the likeliest token after those before (greedy decoding would
write the key); *digits* is the share of them that are. Every policy runs in the native decoder with about the
same number of blocks for each block of queries, beside dense attention there. Where dense is right in less
than half of the trials nothing is claimed of a policy. Results merge into the JSON file, and a picture is
drawn from it where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import protocol
from benchmarks.dynamic import contenders
from gossamer.dynamic.attention import Policy
from gossamer.engine import Decoder
from gossamer.kernels import isa

NEEDLE = "\n\nThe pass key is {key}. Remember it. {key} is the pass key.\n\n"
QUESTION = "\n\nWhat is the pass key? The pass key is "
DIGITS = 5


def parse() -> argparse.Namespace:
    parser = protocol.parser("dynamic needles", __doc__)
    protocol.add_model_arguments(parser)
    parser.set_defaults(threads=2)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8064])
    parser.add_argument("--depths", type=float, nargs="+", default=[0.0, 0.25, 0.5, 0.75, 1.0])
    parser.add_argument("--trials", type=int, default=3)
    parser.add_argument("--budget", type=int, default=16, help="blocks a block of queries")
    parser.add_argument("--policies", nargs="+", help=f"of: {', '.join(contenders.NAMES)} (default: all)")
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "dynamic_needles.json")
    return parser.parse_args()


def haystack(tokenizer: Any, text: Tensor, tokens: int, depth: float, trial: int) -> tuple[Tensor, Tensor]:
    """Tokens of a text with a needle and the question, and those of its key."""
    chance = random.Random(f"{tokens} {depth} {trial}")
    key = "".join(chance.choice("0123456789") for _ in range(DIGITS))

    def ids(words: str) -> Tensor:
        return torch.tensor(tokenizer(words, add_special_tokens=False).input_ids)

    needle, question, answer = ids(NEEDLE.format(key=key)), ids(QUESTION), ids(key)
    if len(answer) != DIGITS:
        raise SystemExit("the tokenizer of this model does not write digits one by one")
    length = tokens - len(needle) - len(question) - len(answer)
    begin = chance.randrange(len(text) - length)
    hay, at = text[begin : begin + length], int(depth * length)
    return torch.cat([hay[:at], needle, hay[at:], question, answer]), answer


def digits_right(decoder: Decoder, ids: Tensor, answer: Tensor, asked: Policy | None) -> float:
    """The share of digits that greedy decoding gets right after the right ones before."""
    logits = contenders.read(decoder, ids, asked, DIGITS + 1)[1]
    return float((logits[:-1].argmax(-1) == answer).float().mean())


def run(args: argparse.Namespace) -> None:
    tokenizer, model = protocol.load_tokenizer(args.model), protocol.load_model(args.model, "bfloat16")
    text = contenders.tokens_of(tokenizer, args.data, contenders.MEASURED)
    other = contenders.tokens_of(tokenizer, args.data, contenders.SEARCHED)
    decoder = Decoder(model)
    protocol.update_json(
        args.out,
        {
            "machine": protocol.machine(),
            "setting": {"isa": isa(), "threads": args.threads, "budget": args.budget, "trials": args.trials},
        },
    )
    for tokens in sorted(args.tokens):
        asked: dict[str, Policy | None] = {"dense": None}
        for name in contenders.chosen(args.policies):
            asked[name] = contenders.policy(name, args.budget, tokens, model, other)
        for depth in args.depths:
            hays = [haystack(tokenizer, text, tokens, depth, trial) for trial in range(args.trials)]
            for name, one in asked.items():
                found = [digits_right(decoder, *hay, one) for hay in hays]
                place = f"{name}, {tokens} tokens, depth {depth:g}"
                cell = {"policy": name, "tokens": tokens, "depth": depth, "digits": found}
                protocol.update_json(args.out, {"cells": {place: cell}})
                print(json.dumps({place: found}), flush=True)


def accuracies(cells: dict[str, Any]) -> dict[str, dict[tuple[int, float], tuple[float, float]]]:
    """By policy, tokens and depth: the share of keys that are right, and of digits."""
    found: dict[str, dict[tuple[int, float], tuple[float, float]]] = {}
    for cell in cells.values():
        right = statistics.mean(one == 1 for one in cell["digits"])
        place = int(cell["tokens"]), float(cell["depth"])
        found.setdefault(cell["policy"], {})[place] = right, statistics.mean(cell["digits"])
    return found


def table(found: dict[str, dict[tuple[int, float], tuple[float, float]]]) -> None:
    rows = []
    for name, places in found.items():
        claimed = [place for place in places if found["dense"].get(place, (0.0, 0.0))[0] >= 0.5]
        for tokens in sorted({tokens for tokens, _ in places}):
            some = [place for place in claimed if place[0] == tokens]
            keys, digits = (
                f"{statistics.mean(places[place][i] for place in some):.0%}" if some else "no claim"
                for i in (0, 1)
            )
            depths = f"{len(some)} of {sum(place[0] == tokens for place in places)}"
            rows.append([name, f"{tokens:,}", depths, keys, digits])
    protocol.print_table(["", "tokens", "depths where dense is right", "keys right", "digits right"], rows)


def picture(found: dict[str, dict[tuple[int, float], tuple[float, float]]], path: Path) -> None:
    """Heat maps of the digits that are right, one for each contender, as a PNG."""
    try:
        import matplotlib
    except ImportError:
        print("no picture: matplotlib is not installed")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(2.6 * len(found), 3), squeeze=False)
    for axis, (name, places) in zip(axes[0], found.items(), strict=True):
        lengths, depths = sorted({p[0] for p in places}), sorted({p[1] for p in places})
        shares = [[places.get((n, d), (0.0, 0.0))[1] for n in lengths] for d in depths]
        axis.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        for y, depth in enumerate(depths):
            for x, tokens in enumerate(lengths):
                dense = found["dense"].get((tokens, depth), (0.0, 0.0))[0]
                label = f"{places[tokens, depth][0]:.0%}" if (tokens, depth) in places else ""
                axis.text(x, y, label if dense >= 0.5 else f"({label})", ha="center", va="center", fontsize=7)
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axis.set_yticks(range(len(depths)), [f"{d:.0%}" for d in depths], fontsize=7)
    axes[0][0].set_ylabel("depth of the needle")
    figure.suptitle(
        "digits of the pass key right (colour), whole keys (text; in brackets: dense fails)", fontsize=8
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130, metadata={"Software": None})
    print(f"wrote {path.name}")


def main() -> None:
    args = parse()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    protocol.set_threads(args.threads)
    run(args)
    found = accuracies(protocol.read_json(args.out)["cells"])
    table(found)
    picture(found, args.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
