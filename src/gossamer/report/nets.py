"""Miniature experiments on small nets of images, trained on the spot on scikit-learn's digits."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from gossamer.claim import Experiment
from gossamer.errors import MethodError
from gossamer.evaluate import exp
from gossamer.matrices.atomic import atomic_file
from gossamer.progress import Progress, silent
from gossamer.recipes.gpusq import Mixed, gpusq, logits_of
from gossamer.recipes.sparsify import sparsify
from gossamer.report.code import code_of
from gossamer.report.texts import label
from gossamer.tune.modules import ModuleTuning
from gossamer.tune.weights import SHARE
from gossamer.version import VERSION

TRAINED, CALIBRATED, BATCH = 1200, 256, 64
EPOCHS = 40
OF_LANGUAGE_MODELS = ("head_values", "windows", "seqlen")


@dataclass(frozen=True)
class Net:
    """How a net is made of ``(batch, 1, 8, 8)`` images; ``skip``: weights that stay dense, its first ones and
    its classifier; ``blocks``: the class of the modules whose outputs are its features."""

    make: Callable[[], nn.Module]
    skip: str
    blocks: str


def convolutional() -> nn.Module:
    """280,000 weights in six convolutions."""
    layers: list[nn.Module] = []
    for inputs, outputs, stride in ((1, 32, 1), (32, 64, 1), (64, 64, 2), (64, 128, 1), (128, 128, 2)):
        layers += [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))


def transformer() -> nn.Module:
    """A vision transformer of four blocks on 16 patches."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8, patch_size=2, num_channels=1, hidden_size=64, num_hidden_layers=4,
        num_attention_heads=4, intermediate_size=128, num_labels=10,
    )  # fmt: skip
    made: nn.Module = ViTForImageClassification(config)
    return made


NETS = {
    "digits:cnn": Net(convolutional, r"^(0|17)$", "Conv2d"),
    "digits:vit": Net(transformer, "projection|classifier", "ViTLayer"),
}


def figures(name: str, experiment: Experiment, work: Path, progress: Progress = silent) -> dict[str, Any]:
    """Accuracy of one contender on the 597 images that nothing saw, perplexity of their labels, KL to the
    dense net, each image by image, and seconds.

    A net is trained by the experiment's seed. Figures are kept in the folder ``work`` by all that they depend
    on. Raises MethodError where scikit-learn is missing.
    """
    asked = _asked(name, experiment)
    file = work / f"{label(asked)}.json"
    if file.exists():
        progress(f"{name}: figures as kept in {work.name}", 1, 1)
        return dict(json.loads(file.read_text(encoding="utf-8")))
    images, labels = digits()
    dense = trained(experiment.model, experiment.seed)
    progress(f"{name} on {experiment.model}", 0, 1)
    start = time.perf_counter()
    model, _ = _made(name, experiment)
    seconds = time.perf_counter() - start
    progress(f"{name} on {experiment.model}", 1, 1)
    found, wanted = (_log_probabilities(one, images[TRAINED:]) for one in (model, dense))
    nll = -found.gather(1, labels[TRAINED:, None])[:, 0]
    kl = kl_div(found, wanted, reduction="none", log_target=True).sum(1).clamp_min(0)
    right = (found.argmax(1) == labels[TRAINED:]).double()
    result = {
        "asked": asked,
        "accuracy": float(right.mean()),
        "perplexity": exp(float(nll.mean())),
        "kl": float(kl.mean()),
        "right": right.tolist(),
        "nll": nll.tolist(),
        "window_kl": kl.tolist(),
        "windows": [len(right), 1],
        "text": "scikit-learn's digits",
        "smoke_test": False,
        "seconds": round(seconds, 1),
    }
    text = json.dumps(result, indent=1)
    with atomic_file(file) as beside:
        beside.write(text.encode())
    return dict(json.loads(text))


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images ``(1797, 1, 8, 8)`` of mean 0 and deviation 1, and their labels, in their order: the first
    1,200 are trained, calibrated and tuned on, the others are what is measured."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        told = "claims on small nets take the digits of scikit-learn: pip install scikit-learn"
        raise MethodError(told) from error
    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8)
    return (images - images.mean()) / images.std(), torch.from_numpy(y).long()


@lru_cache(maxsize=4)
def trained(model: str, seed: int) -> nn.Module:
    """The dense net, trained anew from ``seed``; it is not to be changed."""
    net, (images, labels) = NETS[model], digits()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = net.make().train()
        steps = EPOCHS * -(-TRAINED // BATCH)
        optimizer = torch.optim.AdamW(made.parameters(), weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        for _ in range(EPOCHS):
            for part in torch.split(torch.randperm(TRAINED), BATCH):
                optimizer.zero_grad()
                cross_entropy(logits_of(made(images[part])), labels[part]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
    return made.eval()


def _made(name: str, experiment: Experiment) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The contender and its masks."""
    dense, seed = trained(experiment.model, experiment.seed), experiment.seed
    if name == "dense":
        return dense, {}
    net, (images, labels) = NETS[experiment.model], digits()
    if name in experiment.distilled:
        model = copy.deepcopy(dense)
        blocks = [one for one, module in model.named_modules() if type(module).__name__ == net.blocks]
        seen = (torch.split(one[:TRAINED], BATCH) for one in (images, labels))
        pairs = list(zip(*seen, strict=True))
        settings = {"seed": seed, **experiment.distilled[name]}
        settings["loss"] = Mixed(**settings.get("loss", {}))
        return model, gpusq(model, pairs, features=blocks, skip=net.skip, **settings).masks
    if name in experiment.tuned:
        model, masks = _made(experiment.start, experiment)
        settings = {**experiment.tuning, **experiment.tuned[name]}
        _tune(model, masks, dense, seed, **settings)
        return model, masks
    model = copy.deepcopy(dense)
    drawn = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(seed))[:CALIBRATED]
    picked = torch.split(drawn, 8)
    batches = [images[part] for part in picked]
    answers = {id(batch): labels[part] for batch, part in zip(batches, picked, strict=True)}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(logits_of(model(batch)), answers[id(batch)])

    return model, sparsify(model, batches, skip=net.skip, loss=loss, **_settings(name, experiment)).masks


def _settings(name: str, experiment: Experiment) -> dict[str, Any]:
    """The settings of `sparsify` of a contender."""
    whole = {"method": name, "seed": experiment.seed, **experiment.settings(name)}
    return {key: value for key, value in whole.items() if key not in OF_LANGUAGE_MODELS}


def _tune(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    dense: nn.Module,
    seed: int,
    *,
    epochs: int,
    method: str = "full",
    options: Mapping[str, Any] | None = None,
    others: bool = True,
    share: float = SHARE,
) -> None:
    """Tunes the contender to the labels, in place."""
    images, labels = digits()
    model.train()
    tuning = ModuleTuning(
        model, masks, method=method, options=options, dense=dense, others=others, share=share
    )
    order, steps, done = torch.Generator().manual_seed(seed), epochs * -(-TRAINED // BATCH), 0
    for _ in range(epochs):
        for part in torch.split(torch.randperm(TRAINED, generator=order), BATCH):
            cross_entropy(logits_of(tuning(images[part])), labels[part]).backward()  # type: ignore[no-untyped-call]
            tuning.step((done + 0.5) / steps)
            done += 1
    tuning.merge()
    model.eval()


@torch.inference_mode()
def _log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([logits_of(model(part)) for part in torch.split(images, 256)]).double().log_softmax(1)


def _asked(name: str, experiment: Experiment) -> dict[str, Any]:
    """All that the figures of a contender depend on."""
    training = [EPOCHS, TRAINED, CALIBRATED, BATCH]
    asked = {"method": name, "model": experiment.model, "seed": experiment.seed, "training": training}
    asked |= {"version": VERSION, "torch": torch.__version__}
    if name == "dense":
        return asked
    if name in experiment.tuned:
        asked["tuning"] = settings = {**experiment.tuning, **experiment.tuned[name]}
        asked["start"] = _asked(experiment.start, experiment)
        return {**asked, "code": code_of([name, settings.get("method", "full")])}
    if name in experiment.distilled:
        return {**asked, "settings": dict(experiment.distilled[name]), "code": code_of([name])}
    settings = _settings(name, experiment)
    return {**asked, "settings": settings, "code": code_of([settings["method"], settings["allocation"]])}
