"""Rules for arguments: declared once, on a field or a parameter, and checked where a user comes in.

    @dataclass(frozen=True)
    class Adams(Checked):
        k: Annotated[int, Integer(1, 5)] = 3

    @arguments
    def kid(real: Tensor, made: Tensor, subsets: Annotated[int, Integer(2)] = 10) -> Figure: ...

A message reads `<argument> must <rule>; got <value>`. Code inside the package trusts its arguments.
"""

import functools
import inspect
import math
import os
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, ParamSpec, Protocol, TypeVar, Union

import torch
from torch import Tensor

IMPORTED_BY = os.getpid()
INSIDE = (os.path.dirname(__file__), os.path.dirname(torch.__file__))
T = TypeVar("T")
P = ParamSpec("P")
Cond = Tensor | Mapping[str, Tensor]  # a condition, (B, ...), or several by name

# ---- rules as functions ------------------------------------------------------------------------


def integer(
    name: str, value: Any, at_least: int = 1, at_most: int | None = None, multiple_of: int = 1
) -> int:
    """Return `value` if it is an integer in the range; bools and floats are not integers."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    value = int(value)
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be at most {at_most}; got {value}")
    if value % multiple_of:
        raise ValueError(f"{name} must be a multiple of {multiple_of}; got {value}")
    return value


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, strict: bool = False
) -> float:
    """Return `value` if it is a finite number in [low, high], or in (low, high] where `strict`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number; got {value!r}")
    value = float(value)
    if not math.isfinite(value) or not (low < value <= high or (value == low and not strict)):
        if not (math.isfinite(low) or math.isfinite(high)):
            raise ValueError(f"{name} must be finite; got {value}")
        start, end = "(" if strict else "[", "]" if math.isfinite(high) else ")"
        raise ValueError(f"{name} must lie in {start}{low}, {high}{end}; got {value}")
    return value


def choice(name: str, value: Any, allowed: Iterable[Any]) -> Any:
    """Return `value` if it is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
    return value


def kind(name: str, value: T, what: str, *attributes: str) -> T:
    """Return `value` if it has the attributes that make it `what`; structural, as protocols are."""
    if isinstance(value, type):
        made = value.__name__
        raise TypeError(f"{name} must be {what}; got the class {made}; make one: {made}(...)")
    if not all(hasattr(value, attribute) for attribute in attributes):
        raise TypeError(f"{name} must be {what}; got {shown(value)}")
    return value


def shown(value: Any) -> str:
    """Return a value for a message: its repr where it is one short line, or its type."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}, {value.dtype}"
    text = repr(value)
    short = len(text) <= 80 and "\n" not in text and " at 0x" not in text
    return text if short else getattr(value, "__name__", f"{type(value).__name__}(...)")


def batch(name: str, value: Any) -> Any:
    """Return `value` if it is a tensor of floats (B, ...)."""
    if not hasattr(value, "is_floating_point"):
        raise TypeError(f"{name} must be a tensor (B, ...); got {shown(value)}")
    if value.ndim == 0 or not value.is_floating_point():
        got = f"shape {tuple(value.shape)}, {value.dtype}"
        raise ValueError(f"{name} must be a floating-point batch (B, ...); got {got}")
    return value


def cond(name: str, value: Any, count: int) -> Any:
    """Return `value` if it is a tensor with one entry per sample, or one for all."""
    if not isinstance(value, Tensor) or not value.ndim or len(value) not in (1, count):
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{name} must be a tensor of first axis {count} or 1; got {got}")
    return value


def shape(name: str, value: Any) -> tuple[int, ...]:
    """Return `value` as a tuple if it is a sequence of sizes (B, ...)."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of integers (B, ...); got {value!r}")
    return tuple(integer(f"each entry of {name}", size, 0) for size in value)


def check_threads() -> None:
    """Warn in a process that was forked: the threads of torch in its parent are not in it."""
    if os.getpid() != IMPORTED_BY and torch.get_num_threads() > 1:
        advice = "start it by spawn, or call torch.set_num_threads(1) in it"
        message = f"a forked process may wait forever for torch's threads, which it lacks; {advice}"
        warn(message, RuntimeWarning)


def warn(text: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called this package: a filter shows a warning once for each line."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level)


# ---- rules as values, for annotations ----------------------------------------------------------


class Rule(Protocol):
    """A condition on one argument."""

    def __call__(self, name: str, value: Any) -> Any:
        """Raise a TypeError or ValueError with the argument's name unless the value is allowed."""
        ...


@dataclass(frozen=True)
class Integer:
    """An integer in [at_least, at_most]."""

    at_least: int = 1
    at_most: int | None = None
    multiple_of: int = 1

    def __call__(self, name: str, value: Any) -> int:
        return integer(name, value, self.at_least, self.at_most, self.multiple_of)


@dataclass(frozen=True)
class Number:
    """A finite number in [low, high], or in (low, high] where `strict`."""

    low: float = -math.inf
    high: float = math.inf
    strict: bool = False

    def __call__(self, name: str, value: Any) -> float:
        return number(name, value, self.low, self.high, strict=self.strict)


@dataclass(frozen=True)
class Each:
    """A sequence of `shortest` to `longest` values, each of which keeps the rule."""

    rule: "Rule"
    longest: int
    shortest: int = 0

    def __call__(self, name: str, value: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise TypeError(f"{name} must be a sequence; got {shown(value)}")
        integer(f"len({name})", len(value), self.shortest, self.longest)
        for k, entry in enumerate(value):
            self.rule(f"{name}[{k}]", entry)
        return value


class Choice:
    """One of the values given."""

    def __init__(self, *allowed: Any) -> None:
        self.allowed = allowed

    def __repr__(self) -> str:
        return f"Choice{self.allowed}"

    def __call__(self, name: str, value: Any) -> Any:
        return choice(name, value, self.allowed)


class Kind:
    """An object with the attributes that make it `what`."""

    def __init__(self, what: str, *attributes: str) -> None:
        self.what, self.attributes = what, attributes

    def __repr__(self) -> str:
        return f"Kind({self.what!r})"

    def __call__(self, name: str, value: T) -> T:
        return kind(name, value, self.what, *self.attributes)


Count = Annotated[int, Integer(1)]
Positive = Annotated[float, Number(0, strict=True)]
NonNegative = Annotated[float, Number(0)]
Share = Annotated[float, Number(0, 1)]
FloatBatch = Annotated[Tensor, batch]


def rules_of(hint: Any) -> tuple[Rule, ...]:
    """Return the rules in an annotation; those of `X | None` hold unless the value is None."""
    if typing.get_origin(hint) is Literal:
        return (Choice(*typing.get_args(hint)),)
    if typing.get_origin(hint) is Annotated:
        return tuple(rule for rule in hint.__metadata__ if callable(rule))
    parts = typing.get_args(hint) if typing.get_origin(hint) in (Union, UnionType) else ()
    return next((rules_of(part) for part in parts if rules_of(part)), ())


def optional(hint: Any) -> bool:
    """Return True if the annotation is `X | None`."""
    return NoneType in typing.get_args(hint)


@functools.cache
def table(owner: Any) -> dict[str, tuple[bool, tuple[Rule, ...]]]:
    """The rules of a class's fields or of a function's parameters, by name."""
    hints: dict[str, Any] = {}  # as written: this package's annotations are objects, not strings
    for place in reversed(getattr(owner, "__mro__", (owner,))):
        hints |= getattr(place, "__annotations__", {})
    found = {name: (optional(hint), rules_of(hint)) for name, hint in hints.items()}
    return {name: entry for name, entry in found.items() if entry[1]}


def check(owner: Any, values: Callable[[str], Any]) -> None:
    """Apply the rules of a class or function to its values by name."""
    for name, (none_allowed, rules) in table(owner).items():
        value = values(name)
        if not (value is None and none_allowed):
            for rule in rules:
                rule(name, value)


class Checked:
    """Base of dataclasses whose annotated fields are checked when an instance is made."""

    def __post_init__(self) -> None:
        check(type(self), functools.partial(getattr, self))


def arguments(function: Callable[P, T]) -> Callable[P, T]:
    """Check the annotated parameters of a public function at each call."""
    signature = inspect.signature(function)

    @functools.wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        check(function, bound.arguments.__getitem__)
        return function(*args, **kwargs)

    return checked
