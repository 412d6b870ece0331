"""Miniature experiments on small nets of images, trained on the spot on scikit-learn's digits."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from gossamer import kernels
from gossamer.claim import Experiment
from gossamer.errors import MethodError, ModelError
from gossamer.evaluate import exp
from gossamer.matrices.checksums import checksums_of
from gossamer.progress import Progress, silent
from gossamer.recipes.gpusq import Mixed, gpusq, logits_of
from gossamer.recipes.modules import MODULES
from gossamer.recipes.sparsify import sparsify
from gossamer.report.code import code_of
from gossamer.report.texts import kept
from gossamer.tune.modules import ModuleTuning
from gossamer.version import VERSION

TRAINED, CALIBRATED, BATCH = 1200, 256, 64
EPOCHS = 40
OF_TEXT = ("head_values", "windows", "seqlen")
FIELDS_OF_TEXT = (
    "windows", "seqlen", "shrunk", "gated", "attending", "caching", "sampled", "rewritten", "answers",
    "blocks", "length", "first",
)  # fmt: skip


@dataclass(frozen=True)
class Net:
    """How a net is made of ``(batch, 1, 8, 8)`` images; ``skip``: weights that stay dense, its first ones and
    its classifier; ``blocks``: the class of the modules whose outputs are its features."""

    make: Callable[[], nn.Module]
    skip: str
    blocks: str


def convolutional() -> nn.Module:
    """280,000 weights, nearly all of them in five convolutions."""
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


def is_net(model: str) -> bool:
    """Whether ``model`` names a net, not a language model."""
    return model.startswith("digits:")


def figures(name: str, experiment: Experiment, work: Path, progress: Progress = silent) -> dict[str, Any]:
    """Accuracy of one contender on the 597 images that nothing saw, perplexity of their labels, KL to the
    dense net, each image by image, and seconds.

    A net is trained by the experiment's seed. Figures are kept in the folder ``work`` by all that they depend
    on. Raises MethodError where scikit-learn is missing.
    """

    def measure() -> dict[str, Any]:
        return _measured(name, experiment, progress)

    return kept(name, _asked(name, experiment), work, progress, measure)


def _measured(name: str, experiment: Experiment, progress: Progress) -> dict[str, Any]:
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
    return {
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


@lru_cache(maxsize=1)
def digits() -> tuple[Tensor, Tensor]:
    """1,797 images ``(1797, 1, 8, 8)`` and their labels, in their order: the first 1,200, whose mean is 0 and
    deviation 1, are trained, calibrated and tuned on, the others are what is measured."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        told = "claims on small nets take the digits of scikit-learn: pip install scikit-learn"
        raise MethodError(told) from error
    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x).float().reshape(-1, 1, 8, 8)
    seen = images[:TRAINED]
    return (images - seen.mean()) / seen.std(), torch.from_numpy(y).long()


@lru_cache(maxsize=4)
def trained(model: str, seed: int) -> nn.Module:
    """The dense net, trained anew from ``seed``: to be copied before it is changed."""
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
    if name == "dense":
        return copy.deepcopy(trained(experiment.model, experiment.seed)), {}
    if name in experiment.distilled:
        return _distilled(name, experiment)
    if name in experiment.tuned:
        return _tuned(name, experiment)
    return _sparsified(name, experiment)


def _sparsified(name: str, experiment: Experiment) -> tuple[nn.Module, Mapping[str, Tensor]]:
    images, labels = digits()
    model, _ = _made("dense", experiment)
    drawn = torch.randperm(TRAINED, generator=torch.Generator().manual_seed(experiment.seed))
    picked = torch.split(drawn[:CALIBRATED], 8)  # small batches: of each the gradient is one sample
    batches = [images[part] for part in picked]
    answers = {id(batch): labels[part] for batch, part in zip(batches, picked, strict=True)}

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return cross_entropy(logits_of(model(batch)), answers[id(batch)])

    skip, settings = NETS[experiment.model].skip, _sparsify_settings(name, experiment)
    return model, sparsify(model, batches, skip=skip, loss=loss, **settings).masks


def _tuned(name: str, experiment: Experiment) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """Tuned to the labels."""
    images, labels = digits()
    settings = _tune_settings(name, experiment)
    epochs, done = settings.pop("epochs"), 0
    model, masks = _made(experiment.start, experiment)
    dense, _ = _made("dense", experiment)
    model.train()
    tuning = ModuleTuning(model, masks, dense=dense, **settings)
    order, steps = torch.Generator().manual_seed(experiment.seed), epochs * -(-TRAINED // BATCH)
    for _ in range(epochs):
        for part in torch.split(torch.randperm(TRAINED, generator=order), BATCH):
            cross_entropy(logits_of(tuning(images[part])), labels[part]).backward()  # type: ignore[no-untyped-call]
            tuning.step((done + 0.5) / steps)
            done += 1
    tuning.merge()
    return model.eval(), masks


def _distilled(name: str, experiment: Experiment) -> tuple[nn.Module, Mapping[str, Tensor]]:
    model, _ = _made("dense", experiment)
    net, settings = NETS[experiment.model], _distill_settings(name, experiment)
    blocks = [one for one, module in model.named_modules() if type(module).__name__ == net.blocks]
    if not blocks:
        raise ModelError(f"{experiment.model} has no {net.blocks} whose features could be drawn")
    seen = (torch.split(one[:TRAINED], BATCH) for one in digits())
    settings["loss"] = Mixed(**settings.get("loss", {}))
    found = gpusq(model, list(zip(*seen, strict=True)), features=blocks, skip=net.skip, **settings)
    return model, found.masks


def _sparsify_settings(name: str, experiment: Experiment) -> dict[str, Any]:
    whole = {"method": name, "seed": experiment.seed, **experiment.settings(name)}
    return {key: value for key, value in whole.items() if key not in OF_TEXT}


def _tune_settings(name: str, experiment: Experiment) -> dict[str, Any]:
    """Of `ModuleTuning`, and ``epochs``."""
    return {"method": "full", **experiment.tuning, **experiment.tuned[name]}


def _distill_settings(name: str, experiment: Experiment) -> dict[str, Any]:
    common = {"pattern": experiment.pattern, "values": experiment.values, "seed": experiment.seed}
    return {**common, **experiment.distilled[name]}


@torch.inference_mode()
def _log_probabilities(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([logits_of(model(part)) for part in torch.split(images, 256)]).double().log_softmax(1)


def _asked(name: str, experiment: Experiment) -> dict[str, Any]:
    """All that the figures of a contender depend on."""
    asked: dict[str, Any] = {
        "method": name,
        "model": experiment.model,
        "seed": experiment.seed,
        "training": [EPOCHS, TRAINED, CALIBRATED, BATCH, checksums_of(Path(__file__)).sha256],
        "with": [VERSION, torch.__version__, version("transformers")],
        "in": [kernels.isa(), torch.get_num_threads()],  # each order of summation trains another net
    }
    if name == "dense":
        return asked
    if name in experiment.tuned:
        settings = _tune_settings(name, experiment)
        asked["start"], made = _asked(experiment.start, experiment), [settings["method"]]
    elif name in experiment.distilled:
        settings, made = _distill_settings(name, experiment), ["gpusq", *MODULES["gpusq"].made_of]
    else:
        settings = _sparsify_settings(name, experiment)
        made = [settings["method"], settings["allocation"]]
    return {**asked, "settings": settings, "code": code_of(made)}


def check(experiment: Experiment) -> None:
    """Raises MethodError for a net that there is not, and for what only language models are asked."""
    if experiment.model not in NETS:
        raise MethodError(f"there is no net {experiment.model!r} (there are: {', '.join(NETS)})")
    for field in FIELDS_OF_TEXT:
        if getattr(experiment, field) != getattr(Experiment(), field):
            raise MethodError(f"{field} is asked of language models, not of the net {experiment.model}")
