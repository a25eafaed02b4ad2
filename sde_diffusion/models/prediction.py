r"""Predictions: a model's estimate of the clean data and the noise in a noisy batch.

Convention: x = alpha x0 + sigma eps. All other quantities are linear combinations of x0 and eps:

    score = -eps / sigma,    v = alpha eps - sigma x0,    velocity = eps - x0.

A parameterization defines how x0 and eps follow from the network's output. They are linear in
(x, out), so a prediction stores only this pair and the coefficients. Each quantity is computed when
it is used, in two fused operations.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sde_diffusion.processes.level import Level, Scalar, readable, wide
from sde_diffusion.validate import shown

__all__ = ["Parameterization", "Prediction", "from_network", "truth"]

Row = tuple[Scalar, Scalar]  # (a, b) stands for  a first + b second


class Parameterization(Protocol):
    """Interface of the meaning of a network's output. Implementations are frozen dataclasses."""

    def input_scale(self, level: Level) -> Scalar:
        """The factor of x in the network's input; 1 by default."""
        return 1.0

    def x0(self, level: Level) -> Row:
        """The coefficients of x0 as a combination of (x, out)."""
        ...

    def eps(self, level: Level) -> Row:
        """The coefficients of eps as a combination of (x, out)."""
        ...

    def target(self, prediction: "Prediction") -> Tensor:
        """The network's regression target if `prediction` is exact."""
        ...


class Prediction:
    """x0, eps, score, v and velocity of a batch, each computed at every access.

    Each access returns a new tensor, which a sampler may change in place.

    Args:
        first, second: two tensors (B, ...) of which all quantities are linear combinations,
            usually x and the network's output.
        level: the noise level of the batch.
        meaning: the coefficients of x0 and eps in these combinations.
        extra: further output of the network (B, ...), such as the interpolation of the variance.
    """

    __slots__ = ("extra", "first", "level", "meaning", "second")

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        level: Level,
        meaning: Parameterization,
        extra: Tensor | None = None,
    ) -> None:
        self.first, self.second, self.level, self.meaning = first, second, level, meaning
        self.extra = extra

    def combine(self, of_x0: Scalar, of_eps: Scalar) -> Tensor:
        """Return of_x0 * x0 + of_eps * eps, without computing x0 and eps themselves."""
        a, b = 0.0, 0.0
        if not is_zero(of_x0):
            c, d = self.meaning.x0(self.level)
            a, b = of_x0 * c, of_x0 * d
        if not is_zero(of_eps):
            c, d = self.meaning.eps(self.level)
            a, b = a + of_eps * c, b + of_eps * d
        first, second = wide(self.first), wide(self.second)
        if isinstance(a, float) and isinstance(b, float):
            check_overflow(max(abs(a), abs(b)), first.dtype, self.level)
        if is_zero(a):
            made = second * b
        elif is_zero(b):
            made = first * a
        elif isinstance(b, float):
            made = torch.add(first * a, second, alpha=b)
        else:
            made = first * a + second * b
        return made if first is self.first else made.to(self.first.dtype)

    @property
    def x0(self) -> Tensor:
        """The clean data: E[x0 | x] for an exact model."""
        return self.combine(1.0, 0.0)

    @property
    def eps(self) -> Tensor:
        """The noise: E[eps | x] for an exact model."""
        return self.combine(0.0, 1.0)

    @property
    def score(self) -> Tensor:
        """grad log p_t(x) = -eps / sigma; a ValueError at sigma = 0."""
        return self.combine(0.0, -1.0 / nonzero(self.level.sigma, "the score", "sigma"))

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0 (Salimans & Ho 2022)."""
        return self.combine(-self.level.sigma, self.level.alpha)

    @property
    def velocity(self) -> Tensor:
        """eps - x0 = dy/du, the slope of the probability flow in the straight frame."""
        return self.combine(-1.0, 1.0)


@dataclass(frozen=True)
class Pair(Parameterization):
    """Meaning of a prediction whose two tensors are x0 and eps themselves."""

    def x0(self, level: Level) -> Row:
        return 1.0, 0.0

    def eps(self, level: Level) -> Row:
        return 0.0, 1.0

    def target(self, prediction: Prediction) -> Tensor:
        raise TypeError("a pair (x0, eps) is not the output of one network")


def truth(x0: Tensor, eps: Tensor, level: Level) -> Prediction:
    """Return the prediction with this x0 and eps, e.g. those that a noisy batch was made of."""
    return Prediction(x0, eps, level, Pair())


def from_network(x: Tensor, out: Any, level: Level, meaning: Parameterization) -> Prediction:
    """Return the prediction of a network with output `out` for x (B, C, ...).

    Args:
        out: a tensor shaped like x, or (B, 2 C, ...) with `extra` as second half; or a tuple that
            has such a tensor first, or an object that has it as `sample`.
    """
    out = out[0] if isinstance(out, tuple) else getattr(out, "sample", out)
    if not isinstance(out, Tensor) or not out.is_floating_point():
        raise TypeError(f"the output of the network must be a tensor of floats; got {shown(out)}")
    out = out.to(x.dtype)
    if out.shape == x.shape:
        return Prediction(x, out, level, meaning)
    if x.ndim < 2 or out.shape != (len(x), 2 * x.shape[1], *x.shape[2:]):
        wanted = f"shaped like x, {tuple(x.shape)}, or have twice the channels"
        raise ValueError(f"the output of the network must be {wanted}; got {tuple(out.shape)}")
    out, extra = out.chunk(2, dim=1)
    return Prediction(x, out, level, meaning, extra)


def is_zero(scalar: Scalar) -> bool:
    """Return True for the float 0; tensors are not read, as this would synchronize a GPU."""
    return isinstance(scalar, float) and scalar == 0.0


def check_overflow(coefficient: float, dtype: torch.dtype, level: Level) -> None:
    """Refuse a coefficient that overflows the dtype of the batch, such as 1 / alpha."""
    if not coefficient <= torch.finfo(dtype).max:
        at = f"alpha = {level.alpha:.2g}, sigma = {level.sigma:.2g}"
        raise ValueError(f"the prediction overflows {dtype} at {at}; use V, X0 or Velocity")


def nonzero(scalar: Scalar, what: str, name: str) -> Scalar:
    """Return the scalar `name` if it is not 0, as `what` needs; a tensor on a GPU is not read."""
    if isinstance(scalar, Tensor):
        least = 1 / torch.finfo(scalar.dtype).max  # below it 1 / scalar overflows
        zero = readable(scalar) and bool((scalar.abs() <= least).any())
    else:
        zero = scalar == 0
    if zero:
        raise ValueError(f"{what} is not defined at {name} = 0")
    return scalar
