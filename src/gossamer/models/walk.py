"""A decoder as a list of blocks, whatever its architecture: found, fed and run one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gossamer.errors import ModelError
from gossamer.nn.views import is_conv1d

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# decoders whose one list of blocks mixes classes (attention beside state space or convolution)
MIXED_BLOCKS = frozenset({"bamba", "jamba", "nemotron_h", "zamba", "zamba2"})
# modules that choose experts: a few outputs steer everything after them
_ROUTERS = frozenset({"gate", "router", "shared_expert_gate"})


@dataclass(frozen=True)
class Block:
    """One decoder block; ``name`` is its full name in the model, such as ``model.layers.3``."""

    name: str
    module: nn.Module


@dataclass(frozen=True)
class ModelParts:
    """The modules of a decoder by what they do; names are full names in the model.

    ``blocks_name``: the list of blocks. ``tied``: the head's weight is that of an embedding. ``norms`` and
    ``others``: what is neither block, embedding nor head (the last norm; rotary angles, projections).
    """

    blocks_name: str
    blocks: tuple[Block, ...]
    embeddings: tuple[str, ...]
    head: str | None
    tied: bool
    norms: tuple[str, ...]
    others: tuple[str, ...]


def find_parts(model: nn.Module) -> ModelParts:
    """Finds the repeated blocks of ``model`` (its weights may be on the meta device) and what surrounds them.

    The blocks are the ``ModuleList`` with the most parameters; its members are of one class, and hold at
    least half of what is neither embedding nor head. Raises ModelError where there is no such list.
    """
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ModelError(_unknown(model, "it has no list of blocks"))
    blocks_name, blocks = max(lists, key=lambda item: _size(item[1]))
    mixed = len({type(block) for block in blocks}) > 1
    if mixed and getattr(getattr(model, "config", None), "model_type", None) not in MIXED_BLOCKS:
        raise ModelError(_unknown(model, f"the members of {blocks_name} are of several classes"))

    inside = f"{blocks_name}."
    outside = [(n, m) for n, m in model.named_modules() if n != blocks_name and not n.startswith(inside)]
    head = _find_head(model)
    embeddings = [(name, m) for name, m in outside if isinstance(m, nn.Embedding)]
    edge = {id(p): p.numel() for _, m in embeddings for p in m.parameters()}
    if head is not None:
        edge.update({id(p): p.numel() for p in model.get_submodule(head).parameters()})
    if 2 * _size(blocks) < _size(model) - sum(edge.values()):
        raise ModelError(
            _unknown(model, f"its largest list, {blocks_name}, holds less than half of its weights")
        )

    norms: list[str] = []
    others: list[str] = []
    for name, module in outside:
        owns = next(module.parameters(recurse=False), None) is not None
        owns = owns or next(module.buffers(recurse=False), None) is not None
        if not owns or name == head or isinstance(module, nn.Embedding):
            continue
        (norms if "norm" in type(module).__name__.lower() else others).append(name)
    head_weight = getattr(model.get_submodule(head), "weight", None) if head is not None else None
    return ModelParts(
        blocks_name=blocks_name,
        blocks=tuple(Block(f"{blocks_name}.{i}", block) for i, block in enumerate(blocks)),
        embeddings=tuple(name for name, _ in embeddings),
        head=head,
        tied=any(m.weight is head_weight for _, m in embeddings),
        norms=tuple(norms),
        others=tuple(others),
    )


def _find_head(model: nn.Module) -> str | None:
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return next((name for name, module in model.named_modules() if module is output), None)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _unknown(model: nn.Module, why: str) -> str:
    return f"{type(model).__name__} cannot be walked block by block: {why}"


def prunable(block: Block | nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a block that may be pruned, by their names within it.

    ``nn.Linear`` and the transposed ``Conv1D`` of GPT-2 (read them by `weight_of`); never norms, nor the
    routers of mixtures of experts. Experts that a model keeps fused in one three-dimensional parameter are
    no linear layers (`gossamer.nn.experts` takes them apart). Raises ModelError where there is none.
    """
    module = block.module if isinstance(block, Block) else block
    found = {
        name: layer
        for name, layer in module.named_modules()
        if (isinstance(layer, nn.Linear) or is_conv1d(layer)) and not is_router(name)
    }
    if not found:
        where = block.name if isinstance(block, Block) else type(module).__name__
        raise ModelError(f"{where} has no linear layer that could be pruned")
    return found


def is_router(name: str) -> bool:
    """Whether a linear layer of this name within its block is one that chooses experts, or a part of one."""
    return not _ROUTERS.isdisjoint(name.split("."))


def weight_of(module: nn.Module) -> Tensor:
    """The weight ``(out_features, in_features)`` of a prunable layer: a view, never a copy."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.detach().T if is_conv1d(module) else weight.detach()


def set_weight(module: nn.Module, weight: Tensor) -> None:
    """Writes ``weight`` (out_features, in_features) into a prunable layer, in the layer's own dtype."""
    target = weight_of(module)
    if target.shape != weight.shape:
        raise ModelError(
            f"a weight of shape {tuple(weight.shape)} is written to one of {tuple(target.shape)}"
        )
    target.copy_(weight)


@dataclass(frozen=True)
class BlockInputs:
    """What the first block of a model gets: ``hidden`` (windows, seqlen, hidden), and for each block the
    keyword arguments that it is called with (rotary angles, masks, positions)."""

    hidden: Tensor
    kwargs: tuple[dict[str, Any], ...]


def each_block_inputs(
    model: PreTrainedModel, windows: Tensor, *, batch: int = 1, parts: ModelParts | None = None
) -> Iterator[BlockInputs]:
    """Runs ``model`` on token ids ``windows`` (n, seqlen), ``batch`` of them at a time, without running its
    blocks.

    Everything before the blocks must be in memory; blocks, last norm and head may be on the meta device.
    The keyword arguments are those of the first batch (all architectures but those with ALiBi biases, such as
    Bloom, broadcast them over a batch of any size), and depend on the length of the windows, not on their
    tokens: where another batch has others, or a model changes hidden states between blocks, ModelError says
    so. Float32 products run in full precision, whatever PyTorch is set to, so that rotary angles are right.
    Not to be called from two threads on one model.
    """
    parts = parts or find_parts(model)
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 1:
        raise ModelError(f"windows are token ids (n, seqlen), got shape {tuple(windows.shape)}")
    first: tuple[dict[str, Any], ...] = ()
    for ids in torch.split(windows, batch):
        with torch.no_grad(), _full_precision():
            hidden, kwargs = _capture(model, parts, ids)
        first = first or kwargs
        differ = {name for a, b in zip(first, kwargs, strict=True) for name in _differing(a, b)}
        if differ and len(ids) == batch:
            names = ", ".join(sorted(differ))
            raise ModelError(
                _unknown(model, f"what its blocks get besides hidden states depends on the text ({names})")
            )
        yield BlockInputs(hidden, first)


def capture_block_inputs(
    model: PreTrainedModel, windows: Tensor, *, batch: int = 1, parts: ModelParts | None = None
) -> BlockInputs:
    """What `each_block_inputs` gives, all windows in one: hidden states, and the arguments of a batch."""
    found = list(each_block_inputs(model, windows, batch=batch, parts=parts))
    return BlockInputs(torch.cat([one.hidden for one in found]), found[0].kwargs)


def run_block(block: Block | nn.Module, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """The hidden states (batch, seqlen, hidden) after one block."""
    module = block.module if isinstance(block, Block) else block
    out = module(hidden, **kwargs)
    return out[0] if isinstance(out, tuple) else out  # type: ignore[no-any-return]


def finish(
    model: PreTrainedModel, hidden: Tensor, *, parts: ModelParts | None = None, gradients: bool = False
) -> Tensor:
    """The logits (batch, seqlen, vocabulary) of hidden states that the last block gave: the model's own last
    norm, projections, head and scaling. Blocks may be on the meta device, and so may embeddings that
    are not tied to the head. All of it works position by position, so pieces of a sequence may be
    finished apart where the logits of a whole one are too large. With ``gradients`` autograd sees it."""
    parts = parts or find_parts(model)

    def visit(index: int, given: Tensor, _: dict[str, Any]) -> Tensor:
        if index == 0:
            return hidden
        if given.shape != hidden.shape:
            raise _StyleError
        return given

    ids = torch.zeros(hidden.shape[:2], dtype=torch.int64)
    with torch.set_grad_enabled(gradients), _blind_embeddings(model, parts, hidden):
        logits: Tensor = _run_stubbed(model, parts, ids, visit, hidden.shape)
    return logits


def head_inputs(model: PreTrainedModel, hidden: Tensor, *, parts: ModelParts | None = None) -> Tensor:
    """What the head multiplies (batch, seqlen, width) of hidden states that the last block gave: behind the
    model's own last norm and projections. Blocks, embeddings and the head may be on the meta device."""
    parts = parts or find_parts(model)
    if parts.head is None:
        raise ModelError(_unknown(model, "it has no head"))
    seen: list[Tensor] = []

    def see(_: nn.Module, args: tuple[Any, ...]) -> None:
        if args[0].shape[:2] != hidden.shape[:2]:
            raise _StyleError
        seen.append(args[0])
        raise _StopError

    handle = model.get_submodule(parts.head).register_forward_pre_hook(see)
    try:
        finish(model, hidden, parts=parts)
    finally:
        handle.remove()
    if not seen:
        raise ModelError(_unknown(model, "its head does not run as a module"))
    return seen[0]


class _StopError(Exception):
    """The walk has seen what it wanted."""


class _StyleError(Exception):
    """Blocks of this model return the other of tensor and tuple."""


_Visit = Callable[[int, Tensor, dict[str, Any]], Tensor]


class _Stub(nn.Module):
    """Stands in a block's place: shows ``visit`` the call, and gives on what it returns. Attributes that the
    model reads from its blocks are the block's own."""

    def __init__(self, block: nn.Module, index: int, visit: _Visit, as_tuple: bool) -> None:
        super().__init__()
        # past nn.Module's bookkeeping: the block must not become a child
        self.__dict__["_block"] = block
        self._index, self._visit, self._as_tuple = index, visit, as_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_block"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden, rest = _bind_call(self.__dict__["_block"], args, kwargs)
        if not isinstance(hidden, Tensor):
            raise _StyleError
        given = self._visit(self._index, hidden, rest)
        return (given, None) if self._as_tuple else given


def _bind_call(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Hidden states, and all other arguments by name."""
    names = [
        p.name
        for p in inspect.signature(block.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    if len(args) > len(names):
        raise ModelError(f"{type(block).__name__} gets arguments that have no names")
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    return named.pop(names[0], None), named


def _run_stubbed(
    model: PreTrainedModel, parts: ModelParts, ids: Tensor, visit: _Visit, shape: torch.Size | None = None
) -> Any:
    """Runs ``model`` with every block replaced by a stub; gives its logits, or None where ``visit`` stopped.

    Whether blocks return a tensor or a tuple is not written anywhere: the one is tried, then the other.
    """
    trouble: Exception | None = None
    for as_tuple in (False, True):
        try:
            with _replaced(model, parts, visit, as_tuple):
                logits = model(input_ids=ids, use_cache=False).logits
        except _StopError:
            return None
        except _StyleError as error:
            trouble = trouble or error
        except ModelError:
            raise
        except Exception as error:  # the wrong style may break a model anywhere
            trouble = error
        else:
            if shape is None or logits.shape[:2] == shape[:2]:
                return logits
    raise ModelError(_unknown(model, f"its forward fails without them: {trouble!r}")) from trouble


@contextmanager
def _replaced(model: nn.Module, parts: ModelParts, visit: _Visit, as_tuple: bool) -> Iterator[None]:
    blocks = model.get_submodule(parts.blocks_name)
    assert isinstance(blocks, nn.ModuleList)
    for i, block in enumerate(parts.blocks):
        blocks[i] = _Stub(block.module, i, visit, as_tuple).train(block.module.training)
    try:
        yield
    finally:
        for i, block in enumerate(parts.blocks):
            blocks[i] = block.module


def _capture(
    model: PreTrainedModel, parts: ModelParts, ids: Tensor
) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
    seen: list[dict[str, Any]] = []
    states: list[Tensor] = []

    def visit(index: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        if index == 0:
            seen.clear()
            states[:] = [hidden]
        if index != len(seen):
            raise ModelError(_unknown(model, "its blocks do not run once each, in order"))
        if hidden.shape != states[0].shape:
            raise _StyleError
        if hidden is not states[0] and not torch.equal(hidden, states[0]):
            raise ModelError(_unknown(model, "it changes hidden states between blocks"))
        seen.append(kwargs)
        if len(seen) == len(parts.blocks):
            raise _StopError
        return hidden

    _run_stubbed(model, parts, ids, visit)
    if len(seen) != len(parts.blocks):
        raise ModelError(_unknown(model, f"only {len(seen)} of its {len(parts.blocks)} blocks run"))
    return states[0], tuple(seen)


class _Blind(nn.Module):
    """Stands in an embedding's place where its weights are not in memory and its result does not matter."""

    def __init__(self, width: int, like: Tensor) -> None:
        super().__init__()
        self.width = width
        self.__dict__["_like"] = like

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        like: Tensor = self.__dict__["_like"]
        return like.new_zeros(*like.shape[:2], self.width)


@contextmanager
def _blind_embeddings(model: nn.Module, parts: ModelParts, like: Tensor) -> Iterator[None]:
    found = [(name, model.get_submodule(name)) for name in parts.embeddings]
    absent = [(n, m) for n, m in found if isinstance(m, nn.Embedding) and m.weight.device.type == "meta"]
    for name, module in absent:
        model.set_submodule(name, _Blind(module.embedding_dim, like))
    try:
        yield
    finally:
        for name, module in absent:
            model.set_submodule(name, module)


@contextmanager
def _full_precision() -> Iterator[None]:
    """Float32 products in float32: a lowered precision would turn rotary angles by whole radians."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def _differing(a: dict[str, Any], b: dict[str, Any]) -> set[str]:
    """Names of arguments that are not the same in two calls."""
    return {name for name in a.keys() | b.keys() if not (name in a and name in b and _same(a[name], b[name]))}


def _same(a: Any, b: Any) -> bool:
    """Whether two nests of arguments are equal, tensors by value."""
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
