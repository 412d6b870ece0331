"""One sequence in progress in the native decoder, with the methods of `models.generate.Session`."""

from __future__ import annotations

import threading
from copy import copy

import torch
from torch import Tensor

from gossamer.engine.caches import CacheKind
from gossamer.engine.decoder import Decoder
from gossamer.engine.policy import Looks

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

    rewinds = True  # `truncate` can go anywhere

    def __init__(
        self, decoder: Decoder, cache: CacheKind = torch.bfloat16, looks: Looks | None = None
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self._cache = decoder.new_cache(cache)
        self._policy = None if looks is None else decoder.new_policy(looks)
        self._turn = threading.Lock()

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
                    self.decoder.append(self._cache, some, every=every, policy=self._policy, out=out)
                    done += len(some)
            except BaseException:  # Ctrl-C too: as if nothing had been appended
                self._cache.truncate(before)
                raise
            return logits
