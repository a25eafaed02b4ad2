"""The protocol of a model, and the functions that wrappers of models share.

Convention: a model is called as model(x, level) or model(x, level, cond) and returns a Prediction;
x is (B, ...); cond is a tensor or a mapping of tensors whose first axis is B or 1.
"""

import copy
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MethodType,
    ModuleType,
    NoneType,
)
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

from sde_diffusion.models import conditions
from sde_diffusion.models.parameterizations import X0
from sde_diffusion.models.prediction import Prediction, truth
from sde_diffusion.processes import Level, Process, double
from sde_diffusion.validate import Cond, Kind, shown

__all__ = [
    "Bound", "LogSNRRange", "Model", "evaluating", "level_of", "modules_of", "per_sample_field",
    "select",
]  # fmt: skip

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
EMPTY = CellType()  # of a variable that is not set yet
PLAIN = NoneType, Tensor, str, float, int, type, ModuleType, BuiltinFunctionType


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


# ---- networks in eval mode ---------------------------------------------------------------------


def modules_of(*values: Any) -> list[nn.Module]:
    """Return the torch modules in models, samplers and functions, submodules included.

    Attributes, entries of containers, methods' objects, and the variables that functions use are
    searched.
    """
    return [value for value in reached(values, PLAIN) if isinstance(value, nn.Module)]


def parts(*values: Any) -> list[Any]:
    """Return the values and the objects that they consist of; functions are not entered."""
    return list(reached(values, (*PLAIN, FunctionType)))


def reached(values: Iterable[Any], left_out: tuple[type, ...]) -> Iterator[Any]:
    """Yield the values and the objects that they consist of or use, each once."""
    waiting, seen = list(values), set[int]()
    while waiting:
        value = waiting.pop()
        if id(value) not in seen and not isinstance(value, left_out):
            seen.add(id(value))
            waiting.extend(parts_of(value))
            yield value


def parts_of(value: Any) -> Iterable[Any]:
    """Return the objects that an object consists of or uses."""
    if isinstance(value, nn.Module):
        own = (part for name, part in vars(value).items() if not name.startswith("_"))
        return *value.children(), *own
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, list | tuple | set | frozenset):
        return () if value and isinstance(next(iter(value)), float) else value  # a table
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, MethodType):
        return value.__self__, value.__func__
    if isinstance(value, FunctionType):
        cells = (cell.cell_contents for cell in value.__closure__ or () if cell != EMPTY)
        used = (value.__globals__.get(name) for name in value.__code__.co_names)
        return () if (value.__module__ or "").startswith("torch.") else (*cells, *used)
    of_torch = type(value).__module__.startswith("torch.")
    return () if of_torch else getattr(value, "__dict__", {}).values()


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put modules in eval mode: no dropout, and the stored statistics of BatchNorm.

    Afterwards each has the mode that it had before, exceptions included. The flags alone are set:
    `train` and `eval` may be overridden.
    """
    changed = [module for module in modules if module.training]
    for module in changed:
        module.training = False
    try:
        yield
    finally:
        for module in changed:
            module.training = True


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


@dataclass(eq=False)
class KnownBelow(Wrapper):
    """A model of a batch whose data are known: at t = 0 and below time `end`.

    For paths that start from data. There x0 is the batch itself and E[eps | x_0] = 0, so the path
    is  x = alpha x0  up to `end`, and the network is not called where it was not trained.
    """

    model: Any
    x0: Tensor
    end: float

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        if level.sigma == 0 or level.t < self.end * (1 - 1e-9):
            return truth(self.x0.to(x), torch.zeros_like(x), level)
        return self.model(x, level)
