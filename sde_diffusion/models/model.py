"""Models: all that a sampler sees, and what wrappers of models share.

Convention: a model is called as model(x, level) or model(x, level, cond) and returns a Prediction;
x is (B, ...); cond is a tensor or a mapping of tensors whose first axis is B or 1.
"""

import copy
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from sde_diffusion.models.parameterizations import X0
from sde_diffusion.models.prediction import Prediction
from sde_diffusion.processes import Level, Process, double
from sde_diffusion.validate import Cond, Kind

__all__ = [
    "EVERYWHERE",
    "IS_MODEL",
    "Bound",
    "HeldBelow",
    "LogSNRRange",
    "Model",
    "evaluate",
    "expanded",
    "level_of",
    "null_of",
    "per_sample_field",
    "select",
    "takes_cond",
    "trained_range",
]

IS_MODEL = Kind("a model such as Denoiser(network, process)", "process", "__call__")


class LogSNRRange(NamedTuple):
    """The log-SNRs at which a model was trained: the support of its law of t.

    Attributes:
        low: at the noisiest level.
        high: at the cleanest level.
        only: True if the model does not exist outside, as a table's network does not.
    """

    low: float = -math.inf
    high: float = math.inf
    only: bool = False

    def __and__(self, other: "LogSNRRange") -> "LogSNRRange":
        """The range of two models that are evaluated together."""
        low, high = max(self.low, other.low), min(self.high, other.high)
        return LogSNRRange(low, high, self.only or other.only)


EVERYWHERE = LogSNRRange()


class Model(Protocol):
    """All that a sampler ever sees.

    A model may also have `trained`, a LogSNRRange, and take a third argument `cond`.
    """

    @property
    def process(self) -> Process:
        """The process of whose levels the model has predictions."""
        ...

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        """The prediction for the batch x (B, ...) at this level."""
        ...


def evaluate(model: Any, x: Tensor, level: Level, cond: Cond | None) -> Prediction:
    """model(x, level), or model(x, level, cond) if there is a condition."""
    return model(x, level) if cond is None else model(x, level, cond)


def level_of(process: Process, level: Any, x: Tensor) -> Level:
    """The level itself, or that of a time in [0, 1]: a number, or a tensor () or (B,)."""
    if isinstance(level, Level):
        return level
    t = double(level)
    return process.level(t, x) if t.ndim else process.levels(t[None])[0]


def takes_cond(model: Any) -> bool:
    """True for a model that can be called as model(x, level, cond)."""
    called = inspect.signature(getattr(model, "forward", model.__call__))
    try:
        called.bind(None, None, None)
    except TypeError:
        return False
    return True


def trained_range(model: Any) -> LogSNRRange:
    """The range of a model; everywhere, if it states none."""
    return getattr(model, "trained", None) or EVERYWHERE


def expanded(cond: Cond, count: int) -> Cond:
    """A condition with one entry per sample: entries for all (first axis 1) are repeated."""
    if isinstance(cond, Mapping):
        return {name: value.expand(count, *value.shape[1:]) if len(value) == 1 else value
                for name, value in cond.items()}  # fmt: skip
    return cond.expand(count, *cond.shape[1:]) if len(cond) == 1 else cond


def null_of(model: Any, cond: Cond) -> Cond:
    """The condition that stands for none, shaped like cond: the model's own, or zeros.

    Raises:
        ValueError: if the model has none and cond is not a float vector (B, width).
    """
    own = getattr(model, "null_like", None)
    if own is not None:
        return own(cond)
    if isinstance(cond, Mapping):
        return {name: zero_null(name, value) for name, value in cond.items()}
    return zero_null("cond", cond)


def zero_null(name: str, cond: Tensor) -> Tensor:
    """Zeros for a float vector (B, width): the usual null."""
    if not (cond.is_floating_point() and cond.ndim == 2):
        raise ValueError(
            f"null must be given for {name} of shape {tuple(cond.shape)}, {cond.dtype}; got None; "
            f"e.g. Denoiser(..., null=torch.tensor(10)) for labels"
        )
    return torch.zeros_like(cond)


# ---- parts of a batch --------------------------------------------------------------------------


def per_sample_field(*, full_rank: bool = False, **options: Any) -> Any:
    """A dataclass field that holds one entry per sample, or one for all (first axis 1).

    Args:
        full_rank: it does so only if it has the rank of the batch, and broadcasts otherwise.
        options: of dataclasses.field.
    """
    return field(metadata={"per_sample": "full rank" if full_rank else "always"}, **options)


def select(value: Any, index: Tensor, ndim: int) -> Any:
    """The same object for the samples `index` of a batch of rank `ndim`.

    Fields marked by `per_sample_field` are indexed, those that are dataclasses are searched.
    """
    if not is_dataclass(value) or isinstance(value, type):
        return value
    changed: dict[str, Any] = {}
    for each in fields(value):
        old = getattr(value, each.name)
        mark = each.metadata.get("per_sample")
        if mark == "full rank":
            new = rows_of(old, index) if old.ndim == ndim else old
        else:
            new = rows_of(old, index) if mark else select(old, index, ndim)
        if new is not old:
            changed[each.name] = new
    if not changed:
        return value
    made = copy.copy(value)  # not made anew: a part of a batch need not pass its checks
    for name, new in changed.items():
        object.__setattr__(made, name, new)
    return made


def rows_of(value: Any, index: Tensor) -> Any:
    """The entries `index` of a tensor, or of each in a mapping; one entry for all stays."""
    if isinstance(value, Mapping):
        return {name: rows_of(part, index) for name, part in value.items()}
    if not isinstance(value, Tensor) or not value.ndim or len(value) == 1:
        return value
    return value[index.to(value.device)]


@dataclass(frozen=True, eq=False)
class Bound:
    """A model with the condition of a batch: what a sampler sees of a conditional model."""

    model: Any
    cond: Cond = per_sample_field()

    @property
    def process(self) -> Process:
        return self.model.process

    @property
    def trained(self) -> LogSNRRange:
        return trained_range(self.model)

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        return self.model(x, level, expanded(self.cond, len(x)))


# ---- below the trained range -------------------------------------------------------------------


@dataclass(eq=False)
class HeldBelow:
    """A model whose x0, below time `end`, stays what it was at `end`.

    For solvers that evaluate the model where they choose to: of a run with a node at `end` it keeps
    the x0 of the call there, and gives that x0 at every lower level, so that the path goes straight
    to it. One object serves one run.
    """

    model: Model
    end: float
    x0: Tensor | None = per_sample_field(default=None)

    @property
    def process(self) -> Process:
        return self.model.process

    def __call__(self, x: Tensor, level: Level) -> Prediction:
        at_end = isinstance(level.t, float) and abs(level.t - self.end) <= 1e-9 * self.end
        if at_end or self.x0 is None:
            found = self.model(x, level)
            self.x0 = found.x0 if at_end else None
            return found
        return Prediction(x, self.x0, level, X0())
