"""One sequence in progress in the native decoder, with the methods of `models.generate.Session`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import ExitStack
from copy import copy
from typing import Any

import torch
from torch import Tensor

from gossamer.engine.caches import CacheKind, PackedCache, cache_of
from gossamer.engine.decoder import Decoder
from gossamer.engine.policy import Looks
from gossamer.errors import ModelError

ROWS = 512  # tokens of a prompt between two looks at what the user wants


class NativeSession:
    """Tokens so far, and their keys and values in ``cache``: a dtype, a name, or a `PackedCache`.

    ``prompt`` appends many tokens and ``step`` one; both give the float32 logits ``(vocab,)`` of the token
    that comes next. ``logits`` gives those of every position. Calls from several threads take turns. What
    cannot be appended changes nothing. A call that is interrupted (Ctrl-C) leaves the tokens before it; a
    packed cache goes on as `truncate` says, with what compression left of the last blocks.

    ``looks``: what attention looks at (None: everything). Where all heads are of the kinds ``all`` and
    ``static``, a token's logits have the same bits however the tokens were cut into calls. ``labels`` choose
    for calls of one token, and all others look at everything. Other kinds
    estimate for a call's rows within 512 positions (from a multiple of 512 on): cuts at multiples of 512 give
    the same bits, others another estimate.
    """

    def __init__(
        self, decoder: Decoder, cache: CacheKind = torch.bfloat16, looks: Looks | None = None
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self._cache = decoder.new_cache(cache)
        self._policy = None if looks is None else decoder.new_policy(looks)
        # whether `truncate` leaves what the first tokens alone would have left: not numbers in few bits from
        # further back, nor what attention looked at by an estimate of a call's rows together
        exact = all(look.kind in ("all", "static") for of_layer in looks or () for look in of_layer)
        self.rewinds = exact and not isinstance(cache_of(cache), PackedCache)
        self._turn = threading.RLock()

    @property
    def length(self) -> int:
        """Positions in the cache."""
        return int(self._cache.length)

    @property
    def nbytes(self) -> int:
        """Bytes of the cache, and of labels beside it."""
        return int(self._cache.nbytes) + (0 if self._policy is None else int(self._policy.nbytes))

    @property
    def looked(self) -> float:
        """Of the blocks of keys that dense attention looks at, the share that was looked at so far."""
        if self._policy is None or not self._policy.there:
            return 1.0
        return float(self._policy.looked / self._policy.there)

    def prompt(self, ids: Tensor) -> Tensor:
        """Append the tokens ``ids``, int64 ``(n,)`` with n >= 1."""
        return self._append(ids.reshape(-1), every=False)

    def step(self, token: int) -> Tensor:
        """Append one token."""
        return self._append(torch.tensor([token]), every=False)

    @staticmethod
    def step_each(sessions: Sequence[NativeSession], tokens: Sequence[int]) -> Tensor:
        """Append a token to each of ``sessions``; float32 logits ``(n, vocab)`` with the bits of as many
        calls of `step`. Those of one decoder and one kind of cache, without a policy, go through the layers
        together, up to 16 in little more time than one. Raises ModelError for a sequence that is named twice,
        and for what cannot be appended, after which all are as they were."""
        if len(tokens) != len(sessions):
            raise ModelError(f"{len(sessions)} sequences take as many tokens, not {len(tokens)}")
        if len({id(session._cache) for session in sessions}) < len(sessions):
            raise ModelError("a sequence takes one token at a time: one of them is named twice")
        if len({session.decoder.vocabulary for session in sessions}) > 1:
            raise ModelError("the sequences are those of models with several vocabularies")
        logits = torch.empty((len(sessions), sessions[0].decoder.vocabulary if sessions else 0))
        with ExitStack() as stack:
            # in one order, whoever else asks; views of a sequence share its turn
            for turn in sorted((session._turn for session in sessions), key=id):
                stack.enter_context(turn)
            groups: dict[Any, list[int]] = {}
            for i, session in enumerate(sessions):
                together = (id(session.decoder), session.cache)
                groups.setdefault(together if session._policy is None else i, []).append(i)
            before = [session.length for session in sessions]
            try:
                for places in groups.values():
                    some = [sessions[i] for i in places]
                    if some[0]._policy is None:
                        caches, ids = [one._cache for one in some], [tokens[i] for i in places]
                        found = some[0].decoder.append_each(caches, torch.tensor(ids))
                    else:
                        found = some[0].step(tokens[places[0]])
                    # numpy: torch would start threads for many numbers, which a forked child has not
                    logits.numpy()[places] = found.numpy()
            except BaseException:  # as in `_append`
                for session, length in zip(sessions, before, strict=True):
                    session._cache.truncate(length)
                raise
        return logits

    def logits(self, ids: Tensor) -> Tensor:
        """Append the tokens ``ids`` and give the logits after each, float32 ``(n, vocab)``."""
        return self._append(ids.reshape(-1), every=True)

    def truncate(self, length: int) -> None:
        """Forget all but the first ``length`` positions. A packed cache goes back up to 64 positions, and to
        0, as if the others had never come; from further back it goes on with what compression left."""
        with self._turn:
            self._cache.truncate(length)

    def beside(self, decoder: Decoder) -> NativeSession:
        """The same sequence, over the same cache, as ``decoder`` runs it (`Decoder.gated`)."""
        other = copy(self)
        other.decoder = decoder
        return other

    def _append(self, ids: Tensor, every: bool) -> Tensor:
        ids = ids.to(torch.int64)
        with self._turn:
            self.decoder.check(self._cache, ids)
            logits = self.decoder.new_logits(len(ids), every)
            before, done = self._cache.length, 0
            try:
                while done < len(ids):
                    some = ids[done : done + ROWS - self._cache.length % ROWS]
                    out = logits[done : done + len(some)] if every else logits
                    asked: dict[str, Any] = {"policy": self._policy, "step": len(ids) == 1}
                    self.decoder.append(self._cache, some, every=every, out=out, **asked)
                    done += len(some)
            except BaseException:  # Ctrl-C too: as if nothing had been appended
                self._cache.truncate(before)
                raise
            return logits
