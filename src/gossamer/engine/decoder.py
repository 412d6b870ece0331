"""A transformers decoder as a native one: what it must be like, and its parts handed over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor, nn

from gossamer import kernels
from gossamer.engine.caches import CacheKind, Shape, new_cache
from gossamer.engine.gates import ActivationGate, NativeGates
from gossamer.engine.policy import Looks, new_policy
from gossamer.errors import MatrixError, ModelError
from gossamer.kernels.native import native
from gossamer.matrices import Matrix, Packed, compile_matrix, stages_of
from gossamer.models.session import context_length
from gossamer.nn import StructuredEmbedding, StructuredLinear, replace_module
from gossamer.nn.experts import Experts, experts_of, share_of_tokens, take_apart

FAMILIES = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "smollm3")
ROTATIONS = ("default", "linear", "dynamic", "llama3", "yarn")  # frequencies do not change inside the context
_WINDOWED = ("mistral", "mixtral", "qwen3_moe")  # all layers have the window of the configuration
_BY_LAYER = ("qwen2", "qwen3", "smollm3")  # those have it that `layer_types` says
# a layer's weights, by the part of a token that multiplies them
_LINEARS = dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), "attention_products")
_LINEARS |= dict.fromkeys(("gate_proj", "up_proj", "down_proj"), "mlp")


class Decoder:
    """A model of one of the `FAMILIES` in native code: same weights, same logits within rounding.

    Packed weights, and sums and products of them, are used in place; plain ones are packed in their own dtype
    (float16 as float32), which keeps every number. Norms, attention and what lies between layers is float32.
    ``context``: positions that the model knows; ``weights``: each, and the share of tokens that read it, by
    the part of `append`'s times that does; ``windows``: positions that each layer sees, its own among them
    (0: all). ``gates``: of activations, by the names of modules: linear layers of the blocks (what they
    read), ``act_fn`` of MLPs (what they give), those of experts not among them; they act on every token.
    Raises ModelError where `why_not` has a reason, and for gates of another model.
    """

    def __init__(self, model: nn.Module, gates: Mapping[str, ActivationGate] | None = None) -> None:
        reason = why_not(model)
        if reason is not None:
            raise ModelError(f"the native decoder cannot run this model: {reason}")
        self.model = model
        config: Any = model.config
        body: Any = model.model
        self.context: int | None = context_length(config)
        self.weights: dict[str, list[tuple[Matrix, float]]] = {}
        self.windows = _windows(config)
        self._alive: list[Any] = []
        rows = _matrix(body.embed_tokens)
        embedding = self._handle(rows)
        tied = _source(body.embed_tokens) is _source(model.lm_head)
        head = self._handle(self._read("head", rows if tied else _matrix(model.lm_head)))
        attention, rotary = body.layers[0].self_attn, body.rotary_emb
        self.vocabulary = head.out_features
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = attention.head_dim
        sizes = [
            config.hidden_size,
            _inner(body.layers),
            self.heads,
            self.kv_heads,
            self.head_dim,
            self.vocabulary,
        ]
        numbers = [
            body.norm.variance_epsilon,
            attention.scaling,
            float(rotary.attention_scaling),
            float(getattr(body.embed_tokens, "scale", 1.0)),
        ]
        self._native = native().DecoderModel(
            sizes,
            numbers,
            self._array(rotary.inv_freq),
            self._array(body.norm.weight),
            embedding.packed,
            head.packed,
            self._array(getattr(model.lm_head, "bias", None)),
        )
        for layer, window in zip(body.layers, self.windows, strict=True):
            self._add(layer, window)
        fault = self._native.check()
        if fault:
            raise ModelError(f"the native decoder cannot run this model: {fault}")
        self._gates = None if gates is None else NativeGates(gates, self._sites())

    def gated(self, gates: Mapping[str, ActivationGate] | None) -> Decoder:
        """This decoder with other gates (None: dense), over the same weights; its caches fit too."""
        other = copy(self)
        other._gates = None if gates is None else NativeGates(gates, self._sites())
        return other

    def achieved(self) -> dict[str, float]:
        """The share of activations that its gates have dropped so far, by site, of those that have run."""
        return {} if self._gates is None else self._gates.achieved()

    def new_cache(self, kind: CacheKind = torch.bfloat16) -> Any:
        """An empty cache of keys and values: see `new_cache`."""
        body: Any = self.model.model
        frequencies, scale = body.rotary_emb.inv_freq.tolist(), float(body.rotary_emb.attention_scaling)
        rotates = [bool(getattr(layer.self_attn, "use_rope", True)) for layer in body.layers]
        return new_cache(
            kind, Shape(len(body.layers), self.kv_heads, self.head_dim, frequencies, scale, rotates)
        )

    def new_policy(self, looks: Looks) -> Any:
        """What the attention of one sequence looks at, for `append`. Raises ModelError."""
        policy = new_policy(looks, len(self.windows), self.heads, self.kv_heads, self.head_dim)
        if max(
            (channel for of_layer in looks for look in of_layer for channel in look.labels), default=0
        ) >= (self.head_dim):
            raise ModelError(f"the attention policy is wrong: heads have {self.head_dim} channels")
        return policy

    def check(self, cache: Any, tokens: Tensor) -> None:
        """Raises ModelError where ``tokens``, int64 ``(n,)``, cannot be appended to ``cache``: none, one that
        the model does not have, or past its context."""
        numbers = tokens.numpy()  # torch would start threads for many, which a forked child has not
        if not len(numbers) or numbers.min() < 0 or numbers.max() >= self.vocabulary:
            raise ModelError(f"tokens must be at least one, from 0 to {self.vocabulary - 1}")
        if self.context is not None and cache.length + len(numbers) > self.context:
            raise ModelError(
                f"{cache.length + len(numbers)} tokens are more than the {self.context} positions that the "
                "model knows"
            )

    def append(
        self,
        cache: Any,
        tokens: Tensor,
        *,
        every: bool = False,
        timed: bool = False,
        policy: Any = None,
        step: bool | None = None,
        out: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, float]]:
        """Appends ``tokens``, int64 ``(n,)``, and gives float32 logits of the last one ``(vocab,)``, or with
        ``every`` of all ``(n, vocab)``; and seconds of the parts by name (zeros unless ``timed``):
        ``attention_products`` (q, k, v, o), ``attention``, ``mlp``, ``head``, ``rest``. ``policy``: what
        attention looks at, the same one for all of a cache (None: everything); ``step``: whether this is a
        token that comes by itself (None: where it is one), not what is left of a prompt. ``out``: where
        logits go, contiguous.

        Raises ModelError as `check`.
        """
        tokens = tokens.to(torch.int64).contiguous()
        self.check(cache, tokens)
        logits = self.new_logits(tokens.numel(), every) if out is None else out
        seconds = self._native.decode(
            cache,
            kernels.native.tier(None),
            tokens.data_ptr(),
            tokens.numel(),
            every,
            logits.data_ptr(),
            torch.get_num_threads(),
            timed,
            None if self._gates is None else self._gates.handle,
            policy,
            tokens.numel() == 1 if step is None else step,
        )
        return logits, seconds

    def append_each(self, caches: Sequence[Any], tokens: Tensor) -> Tensor:
        """Appends one token to each of ``caches``, all different and of one kind; float32 logits
        ``(n, vocab)`` with the bits of as many calls of `append`: weights are read once for up to 16 of them.

        Raises ModelError as `check`, before anything is appended.
        """
        tokens = tokens.to(torch.int64).contiguous()
        if len(tokens) != len(caches):
            raise ModelError(f"{len(caches)} caches take as many tokens, not {len(tokens)}")
        for i, cache in enumerate(caches):
            self.check(cache, tokens[i : i + 1])
        logits = self.new_logits(len(tokens), every=True)
        self._native.decode_each(
            list(caches),
            kernels.native.tier(None),
            tokens.data_ptr(),
            logits.data_ptr(),
            torch.get_num_threads(),
            None if self._gates is None else self._gates.handle,
        )
        return logits

    def new_logits(self, count: int, every: bool) -> Tensor:
        """Room for the logits of ``count`` tokens, see `append`."""
        return torch.empty((count, self.vocabulary) if every else (self.vocabulary,))

    def _add(self, layer: Any, window: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        norms = [
            self._array(layer.input_layernorm.weight),
            self._array(layer.post_attention_layernorm.weight),
            self._array(getattr(getattr(attention, "q_norm", None), "weight", None)),
            self._array(getattr(getattr(attention, "k_norm", None), "weight", None)),
        ]
        linears = [self._linear(_LINEARS[name], module) for name, module in _linears(layer).items()]
        self._native.add_layer(
            norms,
            [program for program, _ in linears],
            [bias for _, bias in linears],
            window,
            bool(getattr(attention, "use_rope", True)),
            self._mixture(mlp) if _is_mixture(mlp) else None,
        )

    def _mixture(self, mlp: Any) -> Any:
        # which experts a token goes to may hang on the last bits of scores: these are not rounded
        router = Packed.pack(mlp.gate.weight.detach(), values="float32", layout="dense")
        normalised = bool(getattr(mlp.gate, "norm_topk_prob", True))
        mixture = native().Mixture(self._program("mlp", router), 0, mlp.gate.top_k, normalised)
        share = share_of_tokens(mlp.experts, self.model.config)
        for pair in experts_of(mlp.experts):
            inner, down = (self._linear("mlp", linear, share) for linear in pair)
            mixture.add(*inner, *down)
        return mixture

    def _sites(self) -> list[dict[str, int]]:
        """Names of each layer's sites and their activations, in the order of csrc/gates.h."""
        config: Any = self.model.config
        body: Any = self.model.model
        widths = dict.fromkeys(_LINEARS, config.hidden_size)
        widths |= {"o_proj": self.heads * self.head_dim}
        widths |= dict.fromkeys(("down_proj", "act_fn"), _inner(body.layers))
        parts = {name: "mlp" if part == "mlp" else "self_attn" for name, part in _LINEARS.items()}
        parts |= {"act_fn": "mlp"}
        return [
            {
                f"model.layers.{i}.{part}.{name}": widths[name]
                for name, part in parts.items()
                if part != "mlp" or not _is_mixture(layer.mlp)
            }
            for i, layer in enumerate(body.layers)
        ]

    def _array(self, tensor: Tensor | None) -> int:
        """The address of a float32 copy that lives as long as the decoder; 0 for None."""
        if tensor is None:
            return 0
        kept = tensor.detach().to(torch.float32, copy=True).contiguous()
        self._alive.append(kept)
        return kept.data_ptr()

    def _linear(self, part: str, module: Any, share: float = 1.0) -> tuple[Any, int]:
        return self._program(part, _matrix(module), share), self._array(module.bias)

    def _program(self, part: str, matrix: Matrix, share: float = 1.0) -> Any:
        program: Any = compile_matrix(self._read(part, matrix, share))
        self._alive.append(program)
        return program.program

    def _read(self, part: str, matrix: Matrix, share: float = 1.0) -> Matrix:
        self.weights.setdefault(part, []).append((matrix, share))
        return matrix

    def _handle(self, matrix: Matrix) -> Any:
        """Of one packed weight."""
        ((leaf, _, _),) = stages_of(matrix)[0]
        self._alive.append(leaf)
        return leaf


def why_not(model: nn.Module) -> str | None:
    """Why the native decoder cannot run ``model``, as part of a sentence; None where it can."""
    if not kernels.native_available():
        return "the native kernels are not built"
    config: Any = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        return f"it is of the family {family!r}, not one of: {', '.join(FAMILIES)}"
    body: Any = getattr(model, "model", None)
    if body is None or not hasattr(model, "lm_head") or not len(getattr(body, "layers", ())):
        return "it is no causal language model with layers and a head"
    if getattr(config, "hidden_act", "silu") != "silu":
        return f"its activation is {config.hidden_act}, not silu"
    rotary = getattr(body.rotary_emb, "rope_type", "default")
    if rotary not in ROTATIONS:
        return f"its rotary embeddings are of the kind {rotary!r}"
    head_dim = body.layers[0].self_attn.head_dim
    if 2 * body.rotary_emb.inv_freq.numel() != head_dim:
        return "it rotates a part of each head only"
    if not bool(body.rotary_emb.inv_freq.isfinite().all()):
        return "its rotary frequencies are not finite"
    epsilon = getattr(body.norm, "variance_epsilon", None)
    if epsilon is None or not isinstance(getattr(body.norm, "weight", None), Tensor):
        return f"its last norm is a {type(body.norm).__name__}"
    if not 0 <= epsilon < float("inf"):
        return f"its norms would add {epsilon} to a mean of squares"
    for name, norm in _norms(body.layers):
        if type(norm) is not type(body.norm):
            return f"{name} is a {type(norm).__name__}, not a {type(body.norm).__name__} as the last norm is"
        if norm.variance_epsilon != epsilon:
            return f"{name} adds {norm.variance_epsilon} to a mean of squares, not {epsilon} as the last norm"
    if min(_windows(config)) < 0:
        return f"its layers would see {min(_windows(config))} positions"
    for name, module in _weights(model):
        matrix = getattr(module, "matrix", None)
        if matrix is None:
            if not isinstance(module, (nn.Linear, nn.Embedding)):
                return f"{name} is a {type(module).__name__}"
        elif not isinstance(matrix, Packed) and name in ("the embedding", "the head"):
            return f"{name} is a {type(matrix).__name__}, not one packed weight"
        elif not matrix.is_packed:
            return f"{name} is a {type(matrix).__name__} that kernels cannot run in one call"
        elif len(stages := stages_of(matrix)) > 1 and name.startswith("an expert"):
            return f"{name} holds a product of matrices"
        elif any(blocks > 1 for stage in stages for _, blocks, _ in stage):
            return f"{name} is a {type(matrix).__name__} with blocks along its diagonal"
        elif isinstance(module, StructuredEmbedding) and matrix.layout != "dense":
            return f"{name} has the layout {matrix.layout}"
    return None


def pack_in_place(model: nn.Module) -> None:
    """Plain linear layers, embedding and head of a model that `why_not` knows no reason against become packed
    modules of the same numbers, one after the other: the decoder then needs no copy of them. Fused experts
    are taken apart for it. Raises ModelError, which names the weight, where numbers are not finite."""
    take_apart(model)
    whole: Any = model
    tied = _source(whole.model.embed_tokens) is _source(whole.lm_head)
    places = {module: name for name, module in model.named_modules()}
    names = [(label, places[module]) for label, module in _weights(model)]
    del places  # each plain weight goes when its packed one is there
    for label, name in names:
        plain: Any = model.get_submodule(name)
        if not isinstance(plain, (nn.Linear, nn.Embedding)):
            continue
        try:
            shared = tied and plain is whole.lm_head
            matrix = whole.model.embed_tokens.matrix if shared else _matrix(plain)
        except MatrixError as error:
            raise ModelError(f"the model's weights are damaged: {label}: {error}") from error
        if isinstance(plain, nn.Embedding):
            replace_module(model, name, StructuredEmbedding.from_embedding(plain, matrix))
        else:
            replace_module(model, name, StructuredLinear(matrix, plain.bias))


def _windows(config: Any) -> list[int]:
    """Positions that each layer sees, its own among them; 0: all. What a family does not look at in its
    configuration changes nothing."""
    window = int(getattr(config, "sliding_window", None) or 0)
    if config.model_type in _BY_LAYER:
        return [window if kind == "sliding_attention" else 0 for kind in config.layer_types]
    return [window if config.model_type in _WINDOWED else 0] * config.num_hidden_layers


def _norms(layers: Any) -> list[tuple[str, Any]]:
    names = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
    return [
        (f"{name.rpartition('.')[2]} of layer {i}", norm)
        for i, layer in enumerate(layers)
        for name, norm in layer.named_modules()
        if name in names
    ]


def _weights(model: Any) -> list[tuple[str, Any]]:
    found = [("the embedding", model.model.embed_tokens), ("the head", model.lm_head)]
    for i, layer in enumerate(model.model.layers):
        found += [(f"{name} of layer {i}", module) for name, module in _linears(layer).items()]
        experts = getattr(layer.mlp, "experts", None)
        if isinstance(experts, Experts):  # fused ones are plain tensors
            found += [(f"an expert of layer {i}", module) for pair in experts_of(experts) for module in pair]
    return found


def _linears(layer: Any) -> dict[str, Any]:
    """The linear layers that every token reads."""
    return {
        name: getattr(layer.self_attn if part != "mlp" else layer.mlp, name)
        for name, part in _LINEARS.items()
        if part != "mlp" or not _is_mixture(layer.mlp)
    }


def _is_mixture(mlp: Any) -> bool:
    return hasattr(mlp, "experts")


def _inner(layers: Any) -> int:
    """Numbers between the products of an MLP; 0 where all layers are mixtures."""
    dense = [layer.mlp.gate_proj.out_features for layer in layers if not _is_mixture(layer.mlp)]
    return dense[0] if dense else 0


def _source(module: Any) -> Any:
    """What a module multiplies by: the same object for a tied embedding and head."""
    return module.matrix if hasattr(module, "matrix") else module.weight


def _matrix(module: Any) -> Matrix:
    """The packed matrix of a linear layer or an embedding, its own or one that is made."""
    if isinstance(module, (StructuredLinear, StructuredEmbedding)):
        return module.matrix
    values = "bfloat16" if module.weight.dtype == torch.bfloat16 else "float32"
    return Packed.pack(module.weight.detach(), values=values, layout="dense")
