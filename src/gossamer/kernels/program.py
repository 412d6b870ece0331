"""Sums and products of packed weights as one operand: a call multiplies by all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from gossamer.errors import MatrixError
from gossamer.kernels.handle import Handle, Operand
from gossamer.kernels.native import native


class Term(NamedTuple):
    """One packed weight of a program, and what it multiplies.

    ``source``: the number of an earlier stage, whose sum it multiplies, or -1: the activations. ``blocks``:
    1, or how many blocks a block-diagonal matrix has whose blocks the weight holds below each other: a weight
    ``(out, in)`` then stands for ``(out, blocks * in)``, and ``out / blocks`` is a multiple of 16.
    """

    weight: Handle
    blocks: int = 1
    source: int = -1


class Program(Operand):
    """A validated program; made by ``make_program``, opaque to callers."""

    __slots__ = ("stages",)

    def __init__(self, program: Any, stages: Sequence[Sequence[Term]]) -> None:
        super().__init__(program)
        self.stages = stages  # keeps the weights alive

    def __repr__(self) -> str:
        weights = sum(len(stage) for stage in self.stages)
        return f"Program({weights} weights, {self.out_features} x {self.in_features})"


def make_program(stages: Sequence[Sequence[Term]]) -> Program:
    """A program from its stages, in an order in which they can run.

    A stage is the sum of its terms, added in order in float32; the last stage's is the result. Stages keep
    float32 numbers for those that follow; the result is rounded to the activations' dtype once. For example
    ``A B + C`` is ``[[Term(B)], [Term(A, source=0), Term(C)]]``.

    Raises MatrixError saying which term does not fit: inputs that are not what its source gives, outputs
    that differ from those it is added to, a source that comes later.
    """
    program = native().Program()
    for stage in stages:
        program.begin_stage()
        for weight, blocks, source in stage:
            program.add_term(weight.packed, blocks, source)
    fault = program.check()
    if fault:
        raise MatrixError(f"these packed weights make no program: {fault}")
    return Program(program, [list(stage) for stage in stages])
