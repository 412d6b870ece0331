"""What other figures are held against: the clock that cycles are counted by, and plain reading of memory."""

from __future__ import annotations

import pytest
import torch

from gossamer import kernels
from gossamer.kernels.native import native

pytestmark = pytest.mark.skipif(not kernels.native_available(), reason="the native kernels are not built")


def test_a_cycle_takes_what_cycles_take() -> None:
    # a chain that the compiler adds up by itself would seem to run at thousands of gigahertz
    assert 1e8 < native().cycles_per_second() < 1e10


@pytest.mark.parametrize("words", [0, 1, 9, 131071, 131075, 1 << 20])
@pytest.mark.parametrize("threads", [1, 3])
def test_plain_reading_reads_every_word_once(words: int, threads: int) -> None:
    numbers = torch.randint(-(2**62), 2**62, (words + 1,))[1:]  # not aligned to more than a word
    assert native().sum_words(numbers.data_ptr(), words, threads) == int(numbers.sum()) % 2**64
