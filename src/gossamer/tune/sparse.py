"""Fine-tuning of a whole sparse or quantized model, as an object that any training loop can drive."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gossamer.errors import CalibrationError, MethodError, ModelError
from gossamer.matrices import Matrix
from gossamer.models.walk import find_parts
from gossamer.tune.beside import Beside, BesideOptions, apart
from gossamer.tune.formats import Format
from gossamer.tune.forward import run
from gossamer.tune.logits import LogitHead, LogitLosses
from gossamer.tune.losses import LogitLoss, Loss, StateLoss, loss
from gossamer.tune.place import (
    dense_weight,
    make_weights,
    place_norms,
    place_weights,
    remove_norms,
    remove_weights,
)
from gossamer.tune.weights import FLOAT_SHARE, WEIGHTS, TunedWeight, adamw, check_warmup, set_rates
from gossamer.tune.windows import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Losses = Mapping[str, float] | Sequence[tuple[Loss, float]]


class SparseTuning:
    """``model``, a language model of transformers, under tuning: its packed linears (and ``nn.Linear`` layers
    whose ``masks`` are given) become trainable weights that keep their masks and number formats at every
    step.

        tuning = SparseTuning(model, teacher=dense, losses={"kl": 1, "squarehead": 1})
        for fraction, ids in batches:  # fraction of the whole run that is done
            tuning.loss(ids).backward()
            tuning.step(fraction)
        tuning.merge()

    ``teacher``: a model of the same vocabulary, for losses that need one; ``dense``: the model with the same
    layers that methods which bring back pruned weights take them from (None: the teacher); ``losses``:
    weights by name, or losses with their weights; ``method`` with ``options``: which weights move
    (`WEIGHTS`), or masks, within each layer's own pattern where ``options`` name none; ``values`` and
    ``group``: other ones than the model's; ``beside``: options of low-rank parameters beside each weight
    (:class:`gossamer.tune.beside.BesideOptions`), which ``merge`` keeps apart from it; a model that has some
    goes on with them; ``norms``: norms and biases are tuned too. Embeddings and head
    stay. ``rate`` of AdamW, for scales times ``scale_rate``; None: for each layer SHARE of the mean size of
    its weights, FLOAT_SHARE where they are no integers (of its scales, and of 1 for norms: times
    ``scale_rate``), since a step of one size ruins some models and does not move others. It rises over the
    share ``warmup`` of the run and falls to zero by a cosine; gradients are clipped to the norm ``clip``.

    ``masks``: bool ``(out, in)`` by the names of layers, True = kept, as `sparsify` gives them (None: a plain
    layer without one). Packed layers keep their own, but not in the layouts dense (chosen at little sparsity
    too) and columns: there pruned weights come back unless ``masks`` are given, or ``pruned``, the names of
    layers whose zeros are all pruned weights.

    The model is in evaluation mode throughout: no dropout. Raises ModelError or MethodError for what does not
    fit together, and leaves the layers of the model as they were then.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        teacher: PreTrainedModel | None = None,
        losses: Losses,
        method: str = "full",
        options: Mapping[str, Any] | None = None,
        values: str | None = None,
        group: int | None = None,
        beside: Mapping[str, Any] | None = None,
        masks: Mapping[str, Tensor | None] | None = None,
        pruned: Collection[str] = (),
        norms: bool = True,
        rate: float | None = None,
        scale_rate: float = 0.1,
        warmup: float = 0.05,
        weight_decay: float = 0.0,
        clip: float = 1.0,
        gradient_checkpointing: bool = False,
        dense: PreTrainedModel | None = None,
    ) -> None:
        check_warmup(warmup)
        for one in (model, teacher, dense):
            if one is not None and not hasattr(one, "get_output_embeddings"):
                raise ModelError(
                    f"SparseTuning takes language models of transformers (of gs.load: its model), not a "
                    f"{type(one).__name__}: other modules are tuned by ModuleTuning"
                )
        self.losses = _weighed(losses)
        self.model, self.teacher = model.eval().requires_grad_(False), teacher
        dtype = (
            model.get_input_embeddings().dtype
            if hasattr(model.get_input_embeddings(), "dtype")
            else model.dtype
        )
        self.head = LogitHead.of(model, dtype)
        self.teacher_head = None if teacher is None else LogitHead.of(teacher.eval(), teacher.dtype)
        self._check()
        kind = WEIGHTS[method]
        chosen, added = kind.chosen(options or {}), BesideOptions.of(beside)
        self._formats: dict[str, Format] = {}
        self.beside: dict[str, Beside] = {}

        def make(name: str, matrix: Matrix, mask: Tensor | None) -> TunedWeight:
            matrix, found = apart(matrix)
            if found is not None:
                self.beside[name] = found
            self._formats[name] = Format.of(matrix, values, group)
            return self._formats[name].begin(matrix, kind, options, mask=mask, zeros_stay=name in pruned)

        self.weights = make_weights(model, make, masks)
        if added is not None and self.beside:
            raise MethodError("the model has low-rank parameters already, which are tuned: leave beside out")
        if kind.brings_back(chosen):
            for name, before in self._before(method, dense or teacher):
                self.weights[name].fill(before)
        if added is not None and added.begin == "zero":
            self.beside = {n: Beside.begin(added, w.finished()[0], None) for n, w in self.weights.items()}
        elif added is not None:
            for name, before in self._before("beginning with what was lost", dense or teacher):
                self.beside[name] = Beside.begin(added, self.weights[name].finished()[0], before)
        place_weights(model, self.weights, self.beside)  # nothing is refused from here on
        if not any(one.needs_teacher for one, _ in self.losses):
            self.teacher = self.teacher_head = None  # no longer held in memory
        self.norms = place_norms(model) if norms else {}
        self.warmup, self.clip = warmup, clip
        self.optimizer = self._optimizer(rate, scale_rate, weight_decay)
        self.parts: dict[str, float] = {}
        self._forwards: list[tuple[nn.Module, dict[str, Any]]] = []  # what checkpointing took the place of
        self.checkpoint_gradients(gradient_checkpointing)

    # --- training ---

    def loss(self, batch: Tensor | Mapping[str, Any], *, defer: bool = True) -> Tensor:
        """The weighted sum of the losses, a mean over tokens; ``parts`` then holds each one by name.

        Backward passes leave the gradients of finished weights for `step`, which takes them further once;
        ``defer`` False: gradients are whole after each pass, for an optimizer of one's own.

        ``batch``: token ids ``(windows, seqlen)``, or transformers' ``input_ids`` with ``attention_mask`` and
        ``labels`` (the same tokens; -100 where no loss counts). Every position but the last counts.
        """
        for tuned in self.weights.values():
            tuned.defers = defer
        batch = {"input_ids": batch} if isinstance(batch, Tensor) else batch
        ids, mask = batch["input_ids"], batch.get("attention_mask")
        labels = batch.get("labels")
        labels = ids if labels is None else labels
        labels = labels if mask is None else labels.masked_fill(mask == 0, IGNORED)
        counts = labels[:, 1:] != IGNORED
        if mask is not None:
            counts &= mask[:, :-1] != 0  # behind padding a first token is predicted from nothing
        want_states = any(isinstance(one, StateLoss) for one, _ in self.losses)
        got = run(self.model, ids, mask, states=want_states)
        given = None
        if self.teacher is not None:
            with torch.no_grad():
                given = run(self.teacher, ids, mask, states=want_states)

        def counted(x: Tensor) -> Tensor:
            return x[:, :-1][counts]

        total, parts = torch.zeros(()), {}
        ofs = [(one, weight) for one, weight in self.losses if isinstance(one, LogitLoss)]
        if ofs:
            hidden = counted(got.last)
            grads = torch.is_grad_enabled() and hidden.requires_grad
            teacher = None if given is None else counted(given.last)
            total, means = LogitLosses.apply(  # type: ignore[no-untyped-call]
                hidden, labels[:, 1:][counts], teacher, self.head, self.teacher_head, ofs, grads
            )
            parts = {one.name: float(mean) for (one, _), mean in zip(ofs, means, strict=True)}
        for one, weight in self.losses:
            if isinstance(one, StateLoss):
                assert given is not None
                value = one.of([counted(x) for x in got.states], [counted(x) for x in given.states])
                total, parts[one.name] = total + weight * value, float(value.detach())
        self.parts = parts
        return total

    def step(self, fraction: float) -> None:
        """One step of AdamW with the gradients that backward passes left, ``fraction`` of the run done: the
        step's middle, say, since the rate is zero where warmup begins and where the run ends."""
        set_rates(self.optimizer, self.factor(fraction))
        self.before_step(fraction)
        for weight in self.weights.values():
            weight.settle()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)  # in a Trainer's order
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.after_step(fraction)

    def set_passes(self, count: int) -> None:
        """How many backward passes a step has where they do not defer, each of a loss divided by that: what
        a method adds to gradients counts once a step."""
        for weight in self.weights.values():
            weight.passes = count

    def before_step(self, fraction: float) -> None:
        """What the method does before gradients settle."""
        for weight in self.weights.values():
            weight.before_step(fraction)

    def after_step(self, fraction: float) -> None:
        """What the method does behind an optimizer's step."""
        for weight in self.weights.values():
            weight.after_step(fraction)

    def factor(self, fraction: float) -> float:
        """Of the learning rate, when ``fraction`` of the run is done: a linear rise, then half a cosine."""
        fraction = min(max(fraction, 0.0), 1.0)
        if fraction < self.warmup:
            return fraction / self.warmup
        return 0.5 + 0.5 * math.cos(math.pi * (fraction - self.warmup) / (1 - self.warmup))

    def checkpoint_gradients(self, on: bool) -> None:
        """Whether backward passes run blocks again in place of keeping what they computed: less memory, a
        third more time, the same weights."""
        for module, forward in self._forwards:
            del module.forward
            vars(module).update(forward)
        self._forwards = []
        # transformers' own way asks for training mode, and with it for dropout
        for block in find_parts(self.model).blocks if on else ():
            module = block.module
            own = {"forward": module.forward} if "forward" in vars(module) else {}
            self._forwards.append((module, own))
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained."""
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    # --- keeping and finishing ---

    def values(self) -> dict[str, Tensor]:
        """What is tuned, by name: enough to come back to this state but for the optimizer."""
        found = {f"{name}.{key}": t for name, w in self.weights.items() for key, t in w.state_dict().items()}
        for name, beside in self.beside.items():
            found |= {f"{name}.beside.{key}": tensor for key, tensor in beside.state_dict().items()}
        return found | {name: parameter.detach() for name, parameter in self.norms.items()}

    @torch.no_grad()
    def load_values(self, values: Mapping[str, Tensor]) -> None:
        """Comes back to what `values` gave; raises CalibrationError where names differ."""
        own = self.values()
        if own.keys() != values.keys():
            raise CalibrationError("these are the values of another tuning: names differ")
        for name, tensor in own.items():
            tensor.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """`values` and the optimizer's moments, as tensors by name."""
        names = self._parameter_names()
        found = {f"values/{name}": tensor for name, tensor in self.values().items()}
        for parameter, state in self.optimizer.state.items():
            for key, tensor in state.items():
                found[f"{key}/{names[id(parameter)]}"] = tensor
        return found

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Comes back to what `state_dict` gave."""
        own = {name.removeprefix("values/"): t for name, t in state.items() if name.startswith("values/")}
        self.load_values(own)
        names = self._parameter_names()
        parameters = {names[id(parameter)]: parameter for parameter in self.parameters()}
        self.optimizer.state.clear()
        for full, tensor in state.items():
            key, _, name = full.partition("/")
            if key != "values":
                parameter = parameters[name]  # fused optimizers take a moment to lie as its parameter does
                kept = tensor.clone() if tensor.dim() == 0 else torch.empty_like(parameter).copy_(tensor)
                self.optimizer.state.setdefault(parameter, {})[key] = kept.detach()

    def merge(self) -> dict[str, Matrix | Tensor]:
        """Puts finished weights back into the model, packed as they were, and returns them, and tuned norms,
        by the names of the parameters."""
        self.checkpoint_gradients(False)
        matrices = {name: self._formats[name].finish(weight) for name, weight in self.weights.items()}
        matrices |= {name: beside.join(matrices[name]) for name, beside in self.beside.items()}
        norms = remove_norms(self.model, self.norms)  # first: among them are biases of these layers
        remove_weights(self.model, matrices)
        return {f"{name}.weight": matrix for name, matrix in matrices.items()} | dict(norms)

    # --- making ---

    def _check(self) -> None:
        if not self.losses:
            raise MethodError("there is no loss to tune by")
        needy = [one.name for one, _ in self.losses if one.needs_teacher]
        if needy and self.teacher is None:
            raise MethodError(f"the loss {needy[0]} needs a teacher: the dense model")
        if self.teacher is None or self.teacher_head is None or not needy:
            return
        ours, theirs = self.head.weight.shape[0], self.teacher_head.weight.shape[0]
        if ours != theirs:
            raise MethodError(f"the model knows {ours} tokens, and its teacher {theirs}: another vocabulary")
        blocks = len(find_parts(self.model).blocks), len(find_parts(self.teacher).blocks)
        states = [one.name for one, _ in self.losses if isinstance(one, StateLoss)]
        if states and blocks[0] != blocks[1]:
            raise MethodError(
                f"the loss {states[0]} pairs blocks, but the model has {blocks[0]}, its teacher {blocks[1]}"
            )

    def _before(self, method: str, model: PreTrainedModel | None) -> Iterator[tuple[str, Tensor]]:
        """Names of layers, and their weights ``(out, in)`` in the dense ``model``, for a ``method`` that
        brings back what was pruned. Raises MethodError where they are not known."""
        if model is None:
            raise MethodError(f"{method} brings back dense weights: give the dense model as the teacher")
        ours, theirs = len(find_parts(self.model).blocks), len(find_parts(model).blocks)
        if ours != theirs:
            raise MethodError(
                f"{method} brings back dense weights by the names of layers, but the model has {ours} "
                f"blocks, its teacher {theirs}"
            )
        layers = dict(model.named_modules())
        for name, weight in self.weights.items():
            layer = layers.get(name)
            dense = None if layer is None else dense_weight(layer)
            if dense is None or dense.shape != weight.latent.shape:
                raise MethodError(f"{method} brings back dense weights, and the teacher has none of {name}")
            yield name, dense

    def _optimizer(self, rate: float | None, scale_rate: float, decay: float) -> torch.optim.AdamW:
        weights, norms = self.weights.values(), list(self.norms.values())
        if rate is None:  # norms are about 1
            shares = [weight.share() for weight in weights]
            own = [
                group
                for weight, share in zip(weights, shares, strict=True)
                for group in weight.groups(share, scale_rate, decay)
            ]
            own += [
                {"params": list(beside.parameters()), "lr": FLOAT_SHARE * self.weights[name].size()}
                for name, beside in self.beside.items()
            ]
            return adamw([*own, {"params": norms, "lr": min(shares) * scale_rate}])
        trained = [p for weight in weights for p in weight.trained()]
        trained += [p for beside in self.beside.values() for p in beside.parameters()]
        scales = [weight.scales for weight in weights if weight.scales is not None]
        return adamw(
            [
                {"params": trained, "lr": rate, "weight_decay": decay},
                {"params": scales, "lr": rate * scale_rate},
                {"params": norms, "lr": rate},
            ]
        )

    def _parameter_names(self) -> dict[int, str]:
        named = {id(p): f"{n}.{key}" for n, w in self.weights.items() for key, p in w.named_parameters()}
        for name, beside in self.beside.items():
            named |= {id(p): f"{name}.beside.{key}" for key, p in beside.named_parameters()}
        return named | {id(parameter): name for name, parameter in self.norms.items()}


def _weighed(losses: Losses) -> list[tuple[Loss, float]]:
    """Losses whose weight is above 0, with it; raises MethodError."""
    if isinstance(losses, Mapping):
        pairs = [(loss(name), weight) for name, weight in losses.items()]
    elif all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], Loss) for pair in losses):
        pairs = list(losses)
    else:
        raise MethodError(f"losses are weights by name, such as {{'kl': 1}}, not {losses!r}")
    for one, weight in pairs:
        if not 0 <= weight < math.inf:
            raise MethodError(f"the weight of the loss {one.name} is at least 0, got {weight}")
    return [(one, weight) for one, weight in pairs if weight > 0]
