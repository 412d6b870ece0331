"""Weights of any module as matrices ``(out, in)``, and what each of them multiplies while a model runs.

Linear layers (GPT-2's transposed ones too), convolutions (a kernel's patches are its inputs), recurrent
layers (of every layer and direction the weights of its inputs and those of its states) and PyTorch's fused
attention (its three projections as one matrix, and that of its outputs).
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from gossamer.errors import CalibrationError, ModelError

Inputs = Callable[[nn.Module, tuple[Any, ...]], Tensor]


@dataclass(frozen=True)
class WeightView:
    """The parameter ``parameter`` of ``module`` as a matrix; ``name`` is that of the parameter in the model
    without a last ``.weight``.

    ``inputs``: what the matrix multiplies when the module is called with arguments, float ``(tokens, in)``,
    ``in`` the matrix's own, tokens in the order of the first argument's. Views that ``read`` alike read the
    same of the same tensor. ``sequence_first``: that argument is known to be ``(seqlen, batch, ...)``.
    ``tied``: views, of the same name, of other modules that hold the same parameter: it multiplies what they
    read, too.
    """

    name: str
    module: nn.Module
    parameter: str
    inputs: Inputs
    reads: tuple[Any, ...]
    turned: bool = False
    sequence_first: bool = False
    tied: tuple[WeightView, ...] = ()

    @property
    def weight(self) -> nn.Parameter:
        return self.module.get_parameter(self.parameter)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix."""
        out, features = self.matrix_of(self.weight).shape
        return out, features

    @property
    def kernel_shape(self) -> tuple[int, ...]:
        """That of the weight itself, (out, in) or (out, in, ..kernel)."""
        return self.shape if self.turned else tuple(self.weight.shape)

    def matrix_of(self, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape, its gradient for one, as a matrix."""
        return weight.T if self.turned else weight.flatten(1)

    def tensor_of(self, matrix: Tensor) -> Tensor:
        """A matrix ``(out, in)`` in the weight's own shape."""
        return matrix.T if self.turned else matrix.reshape(self.weight.shape)

    def matrix(self) -> Tensor:
        """float32 ``(out, in)``, a copy."""
        return self.matrix_of(self.weight.detach()).float().clone(memory_format=torch.contiguous_format)

    @torch.no_grad()
    def replace(self, matrix: Tensor) -> None:
        """Puts ``matrix`` ``(out, in)`` into the parameter, rounded to its dtype."""
        if tuple(matrix.shape) != self.shape:
            raise ModelError(f"{self.name}: a matrix {tuple(matrix.shape)} in place of one {self.shape}")
        self.weight.copy_(self.tensor_of(matrix))


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' ``Conv1D``: a linear layer that stores its weight as (in, out)."""
    kind = parametrize.type_before_parametrizations(module)
    return kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils"


def linear_view(name: str, module: nn.Module) -> WeightView:
    """The weight of a linear layer."""
    return WeightView(name, module, "weight", _rows, ("rows",), turned=is_conv1d(module))


def weight_views(model: nn.Module) -> tuple[list[WeightView], dict[str, str]]:
    """All weights of ``model`` that are matrices, in the order of its modules, shared ones once; and the
    names of modules, and of matrices among a module's own parameters, that have weights of the kind but are
    left as they are, with the reason."""
    found: dict[int, WeightView] = {}  # by the parameter's id
    left: dict[str, str] = {}
    loose: dict[str, nn.Parameter] = {}
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    sequence_first = _sequence_first(model)
    for name, module in model.named_modules():
        views = list(_views(name, module))
        why = _why_not(module, views)
        if id(getattr(module, "weight", None)) in looked_up and not isinstance(module, nn.Embedding):
            why = "its weight is an embedding's too"
        if why:
            left[name] = why
            continue
        for view in views:
            view = replace(view, sequence_first=module in sequence_first)
            first = found.setdefault(id(view.weight), view)
            if first is view:
                continue
            if view.turned == first.turned:
                tied = (*first.tied, replace(view, name=first.name))
                found[id(view.weight)] = replace(first, tied=tied)
                left[view.name] = "its weight is another layer's too, which stands for both"
            else:
                left[view.name] = (
                    "its weight is another layer's too, transposed, and pruned on what that reads"
                )
        loose |= _loose(name, module, views)
    for name, parameter in loose.items():
        if id(parameter) not in found and id(parameter) not in looked_up:
            left[name] = "a parameter by itself, of no known kind of layer"
    return list(found.values()), left


def _sequence_first(model: nn.Module) -> set[nn.Module]:
    """Modules that are known to read ``(seqlen, batch, ...)``, those inside PyTorch's transformer among
    them."""
    found: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and not module.batch_first:
            found.add(module)
        layer = isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        if layer and not getattr(module.self_attn, "batch_first", True):
            found |= set(module.modules())
    return found


# look their parameters up, scale by them, or are seen with the module around them
_NO_LOOSE = (
    nn.Embedding,
    nn.EmbeddingBag,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.modules.linear.NonDynamicallyQuantizableLinear,
    parametrize.ParametrizationList,
)


def _loose(name: str, module: nn.Module, views: list[WeightView]) -> dict[str, nn.Parameter]:
    """Matrices among a module's own parameters that none of its ``views`` is of, by their names."""
    if isinstance(module, _NO_LOOSE):
        return {}
    viewed = {view.parameter for view in views}
    own = {one: p for one, p in module._parameters.items() if p is not None and one not in viewed}
    full = {f"{name}.{one}" if name else one: p for one, p in own.items()}
    return {one.removesuffix(".weight"): p for one, p in full.items() if p.dim() == 2 and min(p.shape) > 1}


def _why_not(module: nn.Module, views: list[WeightView]) -> str:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return "its weight has no shape yet: run the model once"
    own = dict(module.named_parameters(remove_duplicate=False)) if views else {}
    if any(view.parameter not in own for view in views):
        return "its weight is computed from other parameters: make it one of its own first"
    if any(_is_expanded(own[view.parameter]) for view in views):
        return "its weight is expanded, many places over one number: make it contiguous first"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1:
        return "a convolution in groups: each group has a few inputs of its own"
    if isinstance(module, nn.modules.conv._ConvNd) and (module.transposed or len(module.kernel_size) > 2):
        return "a transposed or three-dimensional convolution"
    if isinstance(module, nn.RNNCellBase):
        return "a recurrent cell: nn.LSTM, nn.GRU and nn.RNN, which hold their steps, are pruned"
    if isinstance(module, nn.RNNBase) and module.proj_size:
        return "recurrent with projected states"
    if isinstance(module, nn.MultiheadAttention) and not module._qkv_same_embed_dim:
        return "attention whose keys or values have a width of their own"
    stacks = [
        one for one in module._parameters.values() if one is not None and one.dim() == 3 and len(one) > 1
    ]
    if stacks and not isinstance(module, nn.modules.conv._ConvNd):
        return (
            "its weights are stacks of matrices: those of fused experts become linear layers by "
            "gossamer.nn.experts.take_apart"
        )
    return ""


def _is_expanded(weight: Tensor) -> bool:
    return any(step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True))


def _views(name: str, module: nn.Module) -> Iterator[WeightView]:
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return  # inside nn.MultiheadAttention, which never calls it, and has its view
    if isinstance(module, nn.Linear) or is_conv1d(module):
        yield linear_view(name, module)
    elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
        places = (module.kernel_size, module.stride, module.padding, module.dilation, module.padding_mode)
        yield WeightView(name, module, "weight", _patches, ("patches", *places))
    elif isinstance(module, nn.RNNBase):
        for layer in range(module.num_layers):
            for suffix in _suffixes(module):
                at = (layer, suffix)
                for kind in ("ih", "hh"):
                    parameter = f"weight_{kind}_l{layer}{suffix}"
                    full = f"{name}.{parameter}" if name else parameter
                    yield WeightView(full, module, parameter, _Recurrent(at, kind), (full,))

    elif isinstance(module, nn.MultiheadAttention) and module._qkv_same_embed_dim:
        of = f"{name}." if name else ""
        yield WeightView(f"{of}in_proj_weight", module, "in_proj_weight", _attending, ("rows",))
        yield WeightView(f"{of}out_proj", module, "out_proj.weight", _attended, (f"{of}out_proj",))


def positional(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The arguments of a call as positional ones, for `WeightView.inputs`."""
    if not kwargs:
        return args
    bound = inspect.signature(module.forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return tuple(bound.arguments.values())


def _rows(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    x: Tensor = args[0]
    return x.reshape(-1, x.shape[-1])


def _patches(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """The patches that a convolution's kernel lies on, ``(batch x places, channels x kernel)``."""
    assert isinstance(module, (nn.Conv1d, nn.Conv2d))
    x: Tensor = args[0]
    axes = len(module.kernel_size)
    x = x if x.dim() == axes + 2 else x[None]
    # ``_reversed_padding_repeated_twice`` holds what every mode of padding comes to, the last axis first
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = nn.functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    each = zip(module.kernel_size, module.stride, module.dilation, strict=True)
    for axis, (size, step, apart) in enumerate(each, start=2):
        x = x.unfold(axis, apart * (size - 1) + 1, step)[..., ::apart]
    # (batch, channels, ..places, ..kernel), all of it a view, becomes the one copy
    return x.movedim(1, axes + 1).flatten(axes + 1).flatten(0, axes)


def _attending(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """What the projections of self-attention read, all the same."""
    if any(other is not args[0] for other in args[1:3]):
        raise CalibrationError(
            "attention whose queries, keys and values are not one tensor has three matrices in one weight: "
            "name it in `skip`"
        )
    return _rows(module, args)


def _attended(module: nn.Module, args: tuple[Any, ...]) -> Tensor:
    """What attention gives to its last projection: its outputs where that is the identity."""
    assert isinstance(module, nn.MultiheadAttention)
    alone = copy.copy(module)  # without whoever listens to the module
    for hooks in ("_forward_pre_hooks", "_forward_hooks"):
        setattr(alone, hooks, OrderedDict())
    plain = {"out_proj.weight": torch.eye(module.embed_dim, dtype=args[0].dtype, device=args[0].device)}
    if module.out_proj.bias is not None:
        plain["out_proj.bias"] = torch.zeros_like(module.out_proj.bias)
    out: Tensor = torch.func.functional_call(alone, plain, args)[0]
    return out.reshape(-1, out.shape[-1])


@dataclass(frozen=True)
class _Recurrent:
    """What one layer and direction of a recurrent module reads: its inputs (``ih``), or its states one step
    before (``hh``)."""

    at: tuple[int, str]
    kind: str

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> Tensor:
        assert isinstance(module, nn.RNNBase)
        x = args[0]
        if not isinstance(x, Tensor):
            raise CalibrationError("a recurrent layer is calibrated on plain tensors, not packed sequences")
        x = x if x.dim() == 3 else x.unsqueeze(0 if module.batch_first else 1)
        x = x if module.batch_first else x.transpose(0, 1)
        given = args[1] if len(args) > 1 else None
        first = given[0] if isinstance(given, tuple) else given
        for layer in range(module.num_layers):
            outs = []
            for direction, suffix in enumerate(_suffixes(module)):
                if (layer, suffix) == self.at and self.kind == "ih":
                    return self._rows(module, x)
                read = x.flip(1) if suffix else x
                index = layer * len(_suffixes(module)) + direction
                states = _run(module, layer, suffix, read, given, index)
                if (layer, suffix) == self.at:
                    start = torch.zeros_like(states[:, :1])
                    if first is not None:
                        start = first[index].reshape(-1, 1, states.shape[2]).to(states.dtype)
                    before = torch.cat([start, states[:, :-1]], dim=1)
                    return self._rows(module, before.flip(1) if suffix else before)
                outs.append(states.flip(1) if suffix else states)
            x = torch.cat(outs, dim=2)
        raise AssertionError(self.at)

    @staticmethod
    def _rows(module: nn.RNNBase, read: Tensor) -> Tensor:
        """``read`` ``(batch, steps, features)`` in the order of what the module is given."""
        return (read if module.batch_first else read.transpose(0, 1)).reshape(-1, read.shape[2])


def _suffixes(module: nn.RNNBase) -> tuple[str, ...]:
    return ("", "_reverse") if module.bidirectional else ("",)


def _run(module: nn.RNNBase, layer: int, suffix: str, x: Tensor, given: Any, index: int) -> Tensor:
    """The states ``(batch, steps, hidden)`` of one layer and direction by itself."""
    options: dict[str, Any] = {"bias": module.bias, "batch_first": True, "device": "meta", "dtype": x.dtype}
    if type(module) is nn.RNN:
        options["nonlinearity"] = module.nonlinearity
    kind: Any = type(module)
    alone: Any = kind(x.shape[2], module.hidden_size, **options)
    own = dict(module.named_parameters())
    names = [name for name, _ in alone.named_parameters()]
    weights: dict[str, Tensor] = {name: own[f"{name}{suffix}".replace("_l0", f"_l{layer}")] for name in names}

    def state(tensor: Tensor) -> Tensor:
        return tensor[index : index + 1].reshape(1, x.shape[0], -1).contiguous()

    start: Any = None
    if given is not None:
        start = tuple(map(state, given)) if isinstance(given, tuple) else state(given)
    out: Tensor = torch.func.functional_call(alone, weights, (x,) if start is None else (x, start))[0]
    return out
