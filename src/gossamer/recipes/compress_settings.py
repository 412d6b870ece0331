"""What `compress` is asked for, checked as a whole before any work starts."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gossamer.calibrate import Gradient, Statistic
from gossamer.errors import MethodError
from gossamer.matrices.values import value_type, value_types
from gossamer.prune import Combination, check_combination
from gossamer.prune.method import pattern_asked
from gossamer.prune.outliers import OutlierColumns, needs_of, outlier_columns
from gossamer.recipes.layer_shares import allocation_needs
from gossamer.tune import Tuner, tuner


class QuantizeSettings(BaseModel):
    """How a checkpoint that was tuned in floats comes to integers, its zeros kept: settings of `compress`,
    whose method is ``zeros`` then."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    values: str = "int4"
    head_values: str = "int8"
    group: int = 64
    seqlen: int = Field(default=1024, ge=1)
    windows: int = Field(default=128, ge=1)
    seed: int = 0
    tune: str | None = None
    tune_options: dict[str, Any] = Field(default_factory=dict)

    def compress(self) -> CompressSettings:
        """What `compress` is asked for."""
        return CompressSettings(method="zeros", **self.model_dump())


class CompressSettings(BaseModel):
    """What to make of a model. ``pattern`` and ``sparsity`` both None mean ``32:64``, of the method ``zeros``
    what is zero already; a sparsity alone means
    unstructured in the comparison group of the method's paper; sparsity 0 means dense.

    ``budget``: bytes of the weight file (``60MB``), bits a weight of the linears (``3.5bits``) or a token's
    time in the linears (``2.5ms``), in place of a sparsity; it needs the allocation ``sensitivity``, and N:M
    patterns then have dense layers beside them. ``values``: of the pruned linears, or several (``nl4,nl3``),
    of which a budget of bytes or bits chooses one for each layer, all dense; ``head_values``: of embeddings
    and head, which are never pruned; ``group``: inputs a scale (64 or 32); ``outliers``: inputs with an
    activation of this size or more keep their columns in bfloat16, at most a share ``outlier_share`` of a
    layer's (None: all that are so large; alone it takes the largest); ``seqlen`` and ``windows``: of
    calibration; ``seed``: of those and of methods that draw; ``options``: of the method,
    ``allocation_options`` of the allocation (of ``owl``: ``outlier`` and ``spread``, the paper's M and λ);
    ``tune``: a tuning method that wins quality back block by block, with ``tune_options``.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = "obs"
    sparsity: float | None = None
    pattern: str | None = None
    allocation: str = "uniform"
    allocation_options: dict[str, Any] = Field(default_factory=dict)
    budget: str | None = None
    values: str = "int4"
    head_values: str = "int8"
    group: int = 64
    outliers: float | None = None
    outlier_share: float | None = None
    seqlen: int = Field(default=1024, ge=1)
    windows: int = Field(default=128, ge=1)
    seed: int = 0
    options: dict[str, Any] = Field(default_factory=dict)
    tune: str | None = None
    tune_options: dict[str, Any] = Field(default_factory=dict)

    def combination(self) -> Combination:
        """Checked as a whole; raises a GossamerError with a sentence before any work starts."""
        value_type(self.head_values)
        found = check_combination(
            self.method,
            pattern=pattern_asked(self.method, self.pattern, self.sparsity, self.budget),
            sparsity=self.sparsity,
            allocation_name=self.allocation,
            allocation_options=self.allocation_options,
            values=self.values,
            group=self.group,
            options=self.options,
            budget=self.budget,
            seed=self.seed,
        )
        if self.outlier_columns() is not None:
            if self.budget is not None:
                raise MethodError("a budget does not know what outliers apart take: leave one of both out")
            if self.tune is not None:
                raise MethodError(f"layers with outliers apart cannot be tuned yet: leave {self.tune} out")
        if self.seqlen < 2 and Gradient in (*found.method.needs, *allocation_needs(found)):
            raise MethodError(
                f"{self.method} with allocation {self.allocation} needs gradients, and they need windows "
                "of at least 2 tokens"
            )
        return found

    def outlier_columns(self) -> OutlierColumns | None:
        """Which inputs are kept apart; raises MethodError as `prune.outliers` does."""
        return outlier_columns(self.outliers, self.outlier_share, value_types(self.values)[0])

    def layer_needs(self) -> tuple[type[Statistic], ...]:
        """What must be known of a layer to prune, round and pack it."""
        return needs_of(self.combination().method, self.outlier_columns())

    def tuner(self) -> Tuner | None:
        """The tuning method; raises MethodError for an unknown name or option."""
        if self.tune is None:
            if self.tune_options:
                raise MethodError("there are options of a tuning method, and none is named")
            return None
        return tuner(self.tune, **self.tune_options)
