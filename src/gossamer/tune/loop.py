"""The training loop: a budget, held-out losses, the best state kept, and a killed run that goes on."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from gossamer.errors import CalibrationError, MethodError
from gossamer.progress import Progress, silent
from gossamer.tune.saves import Saves
from gossamer.tune.sparse import SparseTuning
from gossamer.tune.windows import Windows


@dataclass(frozen=True)
class Loop:
    """``tokens``, ``minutes``: the budget, of which one at least is given; the run ends with the first that
    is spent. ``batch`` windows make a step, ``micro`` of them at once (squarehead, a ratio, is then the mean
    over such parts). ``evaluations``: how often, evenly over the run, the held-out loss is measured and the
    state saved, and the best state is the result; after ``patience`` of them without a better loss the run
    ends (None: never, since losses that rise while the rate is high fall again with it). ``seed``: of the
    order of the windows. Raises MethodError for a budget of nothing and counts below 1."""

    tokens: int | None = None
    minutes: float | None = None
    batch: int = 8
    micro: int = 1
    evaluations: int = 10
    patience: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "minutes"):
            given = getattr(self, name)
            if given is not None and not given > 0:
                raise MethodError(f"a budget in {name} is above 0, got {given}")
        for name in ("batch", "micro", "evaluations", "patience"):
            given = getattr(self, name)
            if given is not None and given < 1:
                raise MethodError(f"{name} is at least 1, got {given}")


@dataclass
class Outcome:
    """``tokens``: tuned on, counted each time they were seen; ``before`` and ``after``: held-out losses by
    name, ``total`` their weighted sum; ``after`` is that of the best state, at ``best_step``; ``held_out``:
    the step and the total of every evaluation; ``ended``: "tokens", "minutes", "patience", or "a loss that is
    not finite", where an earlier state was better than the start."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    best_step: int = 0
    held_out: list[tuple[int, float]] = field(default_factory=list)
    ended: str = ""

    def stale(self) -> int:
        """Evaluations since the best one."""
        return sum(step > self.best_step for step, _ in self.held_out)


def train(
    tuning: SparseTuning,
    windows: Tensor | Windows,
    held_out: Tensor | Windows,
    loop: Loop,
    saves: Saves | None = None,
    progress: Progress = silent,
    before: dict[str, float] | None = None,
) -> Outcome:
    """Tunes on ``windows`` ``(n, seqlen)`` of token ids, each once in random order, then all again, until the
    budget is spent (tokens that no loss counts are spent too); ends in the state of the least loss on
    ``held_out``, the start among them.

    ``before``: held-out losses to tell as those before (None: of the state to begin with). With ``saves`` a
    run that was killed goes on at the last evaluation, to the same bits where the budget is in tokens. Raises
    CalibrationError where a loss is not finite and no state was better than the start, and MethodError
    without a budget.
    """
    if loop.tokens is None and loop.minutes is None:
        raise MethodError("a run needs a budget: tokens, minutes or both")
    return _Run(tuning, _windows(windows), _windows(held_out), loop, saves, progress, before).run()


@torch.no_grad()
def held_out_losses(tuning: SparseTuning, windows: Tensor | Windows, micro: int) -> dict[str, float]:
    """Means over the tokens of ``windows`` that count, by name; ``total``: their weighted sum."""
    sums = {"total": 0.0}
    for part, share in _windows(windows).parts(micro):
        total = float(tuning.loss(part.batch))
        for name, value in {"total": total, **tuning.parts}.items():
            sums[name] = sums.get(name, 0.0) + share * value
    return sums


def _windows(given: Tensor | Windows) -> Windows:
    return given if isinstance(given, Windows) else Windows.of(given)


class _Run:
    def __init__(
        self,
        tuning: SparseTuning,
        windows: Windows,
        held_out: Windows,
        loop: Loop,
        saves: Saves | None,
        progress: Progress,
        before: dict[str, float] | None,
    ) -> None:
        self.tuning, self.windows, self.held_out, self.loop = tuning, windows, held_out, loop
        self.saves, self.progress, self.before = saves, progress, before
        self.now = Outcome()
        self.best: dict[str, Tensor] = {}  # where there are no saves

    def run(self) -> Outcome:
        self._resume()
        start = time.monotonic() - self.now.seconds
        while not self.now.ended:
            fraction = self._fraction()
            if not self._step():
                self._give_up()
                break
            self.now.seconds = time.monotonic() - start
            after, every = self._fraction(), self.loop.evaluations
            self._report()
            if after >= 1 or math.floor(after * every) > math.floor(fraction * every):
                self._evaluate()
                if not math.isfinite(self.now.held_out[-1][1]):
                    self._give_up()
                elif after >= 1:
                    self.now.ended = "tokens" if self._token_share() >= 1 else "minutes"
                elif self.loop.patience is not None and self.now.stale() >= self.loop.patience:
                    self.now.ended = "patience"
                self._save()
        self.tuning.load_values(self.saves.tensors("best") if self.saves else self.best)
        self.progress("tuning", 1, 1)
        return self.now

    def _resume(self) -> None:
        numbers = None if self.saves is None else self.saves.numbers()
        if self.saves is not None and numbers is not None:
            self.now = Outcome(**numbers)
            self.now.held_out = [(step, total) for step, total in numbers["held_out"]]
            if not self.now.ended:
                self.tuning.load_state_dict(self.saves.tensors("state"))
            return
        self._evaluate()
        self._save()

    def _give_up(self) -> None:
        """Ends a run that went wrong at the best state, where one was better than the start."""
        self.now.held_out = [(step, total) for step, total in self.now.held_out if math.isfinite(total)]
        if not self.now.best_step:
            raise CalibrationError(
                f"the loss is not finite at step {self.now.step}: NaN in a model, or a rate too high"
            )
        self.now.ended = "a loss that is not finite"

    def _step(self) -> bool:
        """One step; False where a loss is not finite."""
        batch = self._batch()
        tokens, inside = batch.ids.numel(), 0
        middle = self._fraction(tokens / 2)
        for part, share in batch.parts(self.loop.micro):
            value = self.tuning.loss(part.batch)
            if not bool(value.isfinite()):
                return False
            (value * share).backward()  # type: ignore[no-untyped-call]
            inside += part.ids.numel()
            self._report(inside)
        self.tuning.step(middle)
        self.now.step += 1
        self.now.tokens += tokens
        return True

    def _batch(self) -> Windows:
        """The next windows: every pass over them has an order of its own, drawn from the seed."""
        count, need = len(self.windows), self.loop.batch
        places = range(self.now.step * need, (self.now.step + 1) * need)
        orders = {turn: _order(count, self.loop.seed, turn) for turn in {place // count for place in places}}
        return self.windows[torch.tensor([orders[place // count][place % count] for place in places])]

    def _token_share(self, more: float = 0) -> float:
        """Of the budget in tokens, which whole steps spend."""
        if self.loop.tokens is None:
            return 0.0
        a_step = self.loop.batch * self.windows.ids.shape[1]
        return (self.now.tokens + more) / (math.ceil(self.loop.tokens / a_step) * a_step)

    def _fraction(self, more: float = 0) -> float:
        """How much of the budget is spent, ``more`` tokens from now."""
        minutes = 0.0 if self.loop.minutes is None else self.now.seconds / 60 / self.loop.minutes
        return max(self._token_share(more), minutes)

    def _report(self, inside: int = 0) -> None:
        total = self.loop.tokens or round(60 * (self.loop.minutes or 0))  # or seconds
        self.progress("tuning", min(int(self._fraction(inside) * total), total - 1), max(total, 1))

    def _evaluate(self) -> None:
        sums = held_out_losses(self.tuning, self.held_out, self.loop.micro)
        if not self.now.held_out:
            if not math.isfinite(sums["total"]):
                raise CalibrationError("the loss of the untuned model is not finite: NaN in a model")
            self.now.before = self.before or sums
        if not self.now.held_out or sums["total"] < self.now.after["total"]:  # and not where it is NaN
            self.now.after, self.now.best_step = sums, self.now.step
            if self.saves is None:
                self.best = {name: tensor.clone() for name, tensor in self.tuning.values().items()}
        self.now.held_out.append((self.now.step, sums["total"]))

    def _save(self) -> None:
        if self.saves is None:
            return
        best = (self.now.step, self.tuning.values()) if self.now.best_step == self.now.step else None
        self.saves.save(self.now.step, asdict(self.now), self.tuning.state_dict(), best)


def _order(count: int, seed: int, turn: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn)
    order: list[int] = torch.randperm(count, generator=generator).tolist()
    return order
