"""The protocol of a model, and the functions that wrappers of models share.

Convention: a model is called as model(x, level) or model(x, level, cond) and returns a Prediction;
x is (B, ...); cond is a tensor or a mapping of tensors whose first axis is B or 1.
"""

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

from torch import Tensor

from sde_diffusion.models import conditions
from sde_diffusion.models.parameterizations import X0
from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import Level, Process, double
from sde_diffusion.validate import Cond, Kind, shown

__all__ = ["Bound", "LogSNRRange", "Model", "level_of", "per_sample_field", "select"]

T = TypeVar("T")

IS_MODEL = Kind("a model such as Denoiser(network, process)", "process", "__call__")


def finite(name: str, value: T) -> T:
    """Return `value` if it is a tensor without nan and infinity; a rule for annotations."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor; got {shown(value)}")
    if not bool(value.isfinite().all()):
        raise ValueError(f"{name} must be finite; got nan or infinity")
    return value


class LogSNRRange(NamedTuple):
    """Range of log-SNRs at which a model was trained: the support of its distribution of t.

    Attributes:
        low: the log-SNR of the noisiest level.
        high: the log-SNR of the cleanest level.
        only: True if the model is not defined outside, e.g. a network with a table of timesteps.
    """

    low: float = -math.inf
    high: float = math.inf
    only: bool = False

    def __and__(self, other: "LogSNRRange") -> "LogSNRRange":
        """The intersection: the range of two models that are evaluated together."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return LogSNRRange(low, high, self.only or other.only)


EVERYWHERE = LogSNRRange()


class Model(Protocol):
    """Interface of a model; samplers use nothing else.

    A model may also have `trained`, a LogSNRRange, and accept a third argument `cond`.
    """

    @property
    def process(self) -> Process:
        """The process to which the levels of `__call__` belong."""
        ...

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        """Return the prediction for the batch x (B, ...) at this level."""
        ...


def level_of(process: Process, level: Any, x: Tensor) -> Level:
    """Return `level`, or the level of a time in [0, 1]: a number, or a tensor () or (B,)."""
    if isinstance(level, Level):
        return level
    t = double(level)
    return process.level(t, x) if t.ndim else process.levels(t[None])[0]


def trained_range(model: Any) -> LogSNRRange:
    """Return `model.trained`, or EVERYWHERE for a model without one."""
    trained = getattr(model, "trained", None) or EVERYWHERE
    if not trained.low < trained.high:
        raise ValueError(f"trained must have low < high; got {trained.low:g}, {trained.high:g}")
    return trained


# ---- parts of a batch --------------------------------------------------------------------------


def per_sample_field(*, full_rank: bool = False, **options: Any) -> Any:
    """Return a dataclass field that holds one entry per sample, or one for all (first axis 1).

    Args:
        full_rank: only a tensor with the rank of the batch has one entry per sample; a tensor of
            lower rank broadcasts.
        options: those of `dataclasses.field`.
    """
    return field(metadata={"per_sample": "full rank" if full_rank else "always"}, **options)


def select(value: Any, index: Tensor, ndim: int) -> Any:
    """Return `value` restricted to the samples `index` of a batch of rank `ndim`.

    Fields marked by `per_sample_field` are indexed; fields that are dataclasses are searched.
    """
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for each in fields(value):
        old = getattr(value, each.name)
        mark = each.metadata.get("per_sample")
        indexed = mark == "always" or (mark and old.ndim == ndim)
        new = rows_of(old, index) if indexed else select(old, index, ndim)
        if new is not old:
            changed[each.name] = new
    if not changed:
        return value
    made = copy.copy(value)  # without __post_init__: a part of a batch need not pass the checks
    vars(made).update(changed)
    return made


def rows_of(value: Any, index: Tensor) -> Any:
    """Return the entries `index` of a tensor, or of each tensor in a mapping.

    A tensor of first axis 1 is one entry for all samples, and is returned unchanged.
    """
    if isinstance(value, Mapping):
        return {name: rows_of(part, index) for name, part in value.items()}
    if not isinstance(value, Tensor) or not value.ndim or len(value) == 1:
        return value
    return value[index.to(value.device)]


def parts(value: Any) -> Iterator[Any]:
    """Yield the dataclasses among the fields of `value`, and in theirs, and `value` last.

    Of a bound method, such as the cost of a measurement, its object is yielded.
    """
    value = getattr(value, "__self__", value)
    if is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from parts(getattr(value, each.name, None))
    yield value


# ---- models around another model ---------------------------------------------------------------


class Wrapper:
    """Base of models around another model, with the process, range and null of that model."""

    model: Any

    @property
    def process(self) -> Process:
        return self.model.process

    @property
    def trained(self) -> LogSNRRange:
        """The range of the inner model."""
        return trained_range(self.model)

    @property
    def takes_cond(self) -> bool:
        """True if the inner model takes a condition."""
        return conditions.takes_cond(self.model)

    def null_like(self, cond: Cond) -> Cond:
        """The null condition of the inner model."""
        return conditions.null_of(self.model, cond)


@dataclass(frozen=True, eq=False)
class Bound(Wrapper):
    """A conditional model with the condition of a batch; samplers call it as model(x, level)."""

    model: Any
    cond: Cond = per_sample_field()

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        return self.model(x, level, conditions.expanded(self.cond, len(x)))


@dataclass(eq=False)
class HeldBelow(Wrapper):
    """A model whose x0 below time `end` is its x0 at `end`.

    For solvers that choose their own times, on a path with a node at `end`. The call there stores
    x0, and every call at a lower level returns this x0, so the path ends in it. Make a new object
    for each run.
    """

    model: Any
    end: float
    x0: Tensor | None = per_sample_field(default=None)

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        beyond = level.t / self.end - 1 if isinstance(level.t, float) else -1.0
        if abs(beyond) <= 1e-9:
            found = self.model(x, level)
            self.x0 = found.x0
            return found
        if beyond > 0 or self.x0 is None:
            return self.model(x, level)
        return Prediction(x, self.x0, level, X0())
