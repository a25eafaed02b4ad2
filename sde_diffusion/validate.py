"""The words in which this package refuses: what was given, what is allowed.

Every public boundary checks its arguments with these, so that a bad value is named where it comes
in and not by a stack of tensor code.
"""

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeVar

__all__ = ["batch", "choice", "integer", "kind", "number", "shape"]

T = TypeVar("T")


def integer(name: str, value: Any, at_least: int = 1, at_most: int | None = None) -> int:
    """`value`, if it is an integer in the range; bools and floats are not integers."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer; got {value!r}")
    value = int(value)
    if value < at_least:
        raise ValueError(f"{name} must be at least {at_least}; got {value}")
    if at_most is not None and value > at_most:
        raise ValueError(f"{name} must be at most {at_most}; got {value}")
    return value


def number(
    name: str, value: Any, low: float = -math.inf, high: float = math.inf, *, strict: bool = False
) -> float:
    """`value`, if it is a finite number in [low, high], or in (low, high] where `strict`."""
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
    """`value`, if it is one of `allowed`."""
    allowed = list(allowed)
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(map(str, allowed))}; got {value!r}")
    return value


def kind(name: str, value: T, what: str, *attributes: str) -> T:
    """`value`, if it has the attributes that make it `what`; structural, as the protocols are."""
    if isinstance(value, type) or not all(hasattr(value, attribute) for attribute in attributes):
        raise TypeError(f"{name} must be {what}; got {value!r:.80}")
    return value


def batch(name: str, value: T) -> T:
    """`value`, if it is a tensor of floats (B, ...)."""
    if not hasattr(value, "is_floating_point"):
        raise TypeError(f"{name} must be a tensor (B, ...); got {value!r:.80}")
    tensor: Any = value
    if tensor.ndim == 0 or not tensor.is_floating_point():
        raise ValueError(
            f"{name} must be a floating-point batch (B, ...); "
            f"got shape {tuple(tensor.shape)}, {tensor.dtype}"
        )
    return value


def shape(name: str, value: Any) -> tuple[int, ...]:
    """`value`, if it is a sequence of sizes (B, ...)."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be a sequence of integers (B, ...); got {value!r}")
    return tuple(integer(f"each entry of {name}", size, 0) for size in value)
