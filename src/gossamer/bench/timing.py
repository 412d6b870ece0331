"""How long products with one packed weight take in several layouts, as they would within the whole model.

While a model writes a token it reads every weight once, so a layer's weight comes from wherever a working set
of the model's size lies: memory, or a cache. That is what is timed: of each form as many copies as there are
weights of its kind in a model of that size, walked in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor

from gossamer import kernels
from gossamer.bench.machine import PAST_CACHE, last_level_cache
from gossamer.bench.memory import usable_memory
from gossamer.kernels.native import native
from gossamer.matrices import Packed

SECONDS = 0.4  # of timing one kind at one number of rows
ROUNDS = (3, 25)  # at least and at most
TORCH = "torch bfloat16"  # what a user without packed weights would run
_UNKNOWN_CACHE = 32 << 20

Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Times:
    """Products with one form of a weight: a layout, or `TORCH`.

    ``nbytes``: of the weight; ``walked``: of all copies that were walked in turn; ``decode_seconds``: with
    one row of activations; ``prompt_seconds``: with those of a prompt; ``read``: the share of the weight's
    bytes that one row reads.
    """

    form: str
    nbytes: int
    walked: int
    decode_seconds: float
    prompt_seconds: float
    read: float = 1.0

    @property
    def gb_per_second(self) -> float:
        """How fast a token's product reads what it reads of the weight, in 1e9 bytes a second."""
        return self.read * self.nbytes / self.decode_seconds / 1e9

    def cost(self, decode: int) -> float:
        """Seconds of the prompt and ``decode`` tokens after it."""
        return self.prompt_seconds + decode * self.decode_seconds


def time_forms(forms: Sequence[Packed], rows: int, copies: int, zeros: float = 0.0) -> list[Times]:
    """Times of ``forms``, packed forms of one weight, and of `TORCH` last, in turn in one run.

    ``rows``: of activations (bfloat16) in a prompt, 0 for none; ``copies``: how many weights like the first
    form would make up the whole model; ``zeros``: the share of activations that are zero, at random. Raises
    KernelError where the native kernels are missing.
    """
    weight = forms[0].to_dense().bfloat16()
    names = [*(form.layout for form in forms), TORCH]
    sizes = [*(form.nbytes for form in forms), weight.nbytes]
    counts = _counts(sizes, copies)
    rivals = [_packed_copies(form, count) for form, count in zip(forms, counts, strict=False)]
    rivals.append(_plain_copies(weight, counts[-1]))
    with torch.inference_mode():
        x = activations(max(rows, 1), weight.shape[1], zeros)
        decode = seconds_in_turn(rivals, x[:1], walk=True)
        prompt = seconds_in_turn(rivals, x, walk=False) if rows > 1 else [rows * one for one in decode]
    walked = [size * count for size, count in zip(sizes, counts, strict=True)]
    reads = [*(read_share(form, x[0]) for form in forms), 1.0]
    return [Times(*times) for times in zip(names, sizes, walked, decode, prompt, reads, strict=True)]


def token_seconds(forms: Sequence[Packed], copies: int) -> list[float]:
    """Seconds of one row's product with each of ``forms``, weights of one shape, in turn in one run;
    ``copies``: how many of them a model has. Raises KernelError where the native kernels are missing."""
    counts = _counts([form.nbytes for form in forms], copies)
    rivals = [_packed_copies(form, count) for form, count in zip(forms, counts, strict=True)]
    with torch.inference_mode():
        return seconds_in_turn(rivals, activations(1, forms[0].shape[1], 0.0), walk=True)


def _counts(sizes: Sequence[int], copies: int) -> list[int]:
    """How many copies are walked of weights of so many bytes: no more than no cache holds, and so that most
    of the free memory stays free."""
    room = usable_memory().available // 4 // len(sizes)
    return [max(1, min(copies, past_cache(size), room // size)) for size in sizes]


def activations(rows: int, width: int, zeros: float, seed: int = 0) -> Tensor:
    """Random bfloat16 activations ``(rows, width)``, about the share ``zeros`` of each row zero."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width, generator=generator)
    return (x * (torch.rand(x.shape, generator=generator) >= zeros)).bfloat16()


def read_share(packed: Packed, row: Tensor) -> float:
    """The share of a weight's bytes that its product with one row of activations ``(in,)`` reads: all, but
    for the layout columns, which reads the values of inputs that are not zero where there are few of them."""
    active = float((row != 0).double().mean())
    if packed.layout != "columns" or active > native().most_active:
        return 1.0
    values = packed.tensors()["values"].nbytes
    return (active * values + packed.nbytes - values) / packed.nbytes


def past_cache(nbytes: int) -> int:
    """How many copies of ``nbytes`` no cache holds."""
    return int(PAST_CACHE * cache_size()) // nbytes + 1


def cache_size() -> int:
    """Bytes of the last-level cache, or a usual size where the system does not say."""
    return last_level_cache() or _UNKNOWN_CACHE


def seconds_in_turn(rivals: Sequence[Sequence[Product]], x: Tensor, *, walk: bool) -> list[float]:
    """Median seconds of one product of each rival with ``x`` ``(rows, in)``.

    Each round takes every rival once, in an order that shifts, so that drift of the machine hits all alike.
    With ``walk`` a rival's turn is a pass over all its copies, after one that is not timed and leaves caches
    as its own passes leave them; else one product with the next copy, after one with the copy before.
    """
    taken: list[list[float]] = [[] for _ in rivals]
    least, most = ROUNDS
    end = time.perf_counter() + SECONDS
    for turn in range(most):
        if turn >= least and time.perf_counter() >= end:
            break
        for place in range(len(rivals)):
            index = (turn + place) % len(rivals)
            copies = rivals[index]
            before = copies if walk else [copies[turn % len(copies)]]
            timed = copies if walk else [copies[(turn + 1) % len(copies)]]
            for product in before:
                product(x)
            start = time.perf_counter()
            for product in timed:
                product(x)
            taken[index].append((time.perf_counter() - start) / len(timed))
    return [median(times) for times in taken]


def call_seconds() -> float:
    """What a product costs whose weight is next to nothing: the call itself."""
    weight = Packed.pack(torch.ones(16, 64), "int4", "dense")
    with torch.inference_mode():
        return seconds_in_turn([_packed_copies(weight, 100)], torch.ones(1, 64).bfloat16(), walk=True)[0]


def _packed_copies(packed: Packed, count: int) -> list[Product]:
    """Products with ``count`` copies of a weight that lie one after the other, as in a checkpoint."""
    sections = packed.tensors()
    whole = torch.cat([section.view(torch.uint8) for section in sections.values()])
    sizes = [section.nbytes for section in sections.values()]
    products: list[Product] = []
    for copy in whole.expand(count, -1).contiguous():
        parts = zip(sections.items(), copy.split(sizes), strict=True)
        same = {name: part.view(section.dtype) for (name, section), part in parts}
        handle = kernels.make_handle(packed.layout, packed.values_name, *packed.shape, packed.group, same)
        products.append(partial(kernels.matmul, handle))
    return products


def _plain_copies(weight: Tensor, count: int) -> list[Product]:
    copies = weight.expand(count, -1, -1).contiguous()
    return [partial(torch.nn.functional.linear, weight=copy) for copy in copies]
