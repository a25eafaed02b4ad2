r"""Predictions: what a model says of the clean data and the noise in a noisy batch.

Convention: x = alpha x0 + sigma eps. Every quantity in use is a combination of x0 and eps:

    score = -eps / sigma,    v = alpha eps - sigma x0,    velocity = eps - x0.

A parameterization says how x0 and eps follow from what the network puts out. They are linear in
(x, out), so a prediction keeps only that pair and the coefficients: any quantity costs two fused
operations, and none is computed that is not asked for.
"""

from dataclasses import dataclass
from typing import Any, Protocol, overload

import torch
from torch import Tensor

from sde_diffusion import errors
from sde_diffusion.processes import Level, Scalar

__all__ = [
    "X0",
    "Eps",
    "Karras",
    "Parameterization",
    "Prediction",
    "Score",
    "V",
    "Velocity",
    "coordinates",
    "per_sample",
    "read",
    "truth",
]

Row = tuple[Scalar, Scalar]  # (a, b) stands for  a first + b second


class Parameterization(Protocol):
    """What the network's output means. Implementations are frozen dataclasses."""

    def input_scale(self, level: Level) -> Scalar:
        """The network sees this times x; 1 unless the parameterization says otherwise."""
        return 1.0

    def x0(self, level: Level) -> Row:
        """x0 as a combination of (x, out)."""
        ...

    def eps(self, level: Level) -> Row:
        """eps as a combination of (x, out)."""
        ...

    def target(self, prediction: "Prediction") -> Tensor:
        """What the network should have put out, were `prediction` the truth."""
        ...


class Prediction:
    """x0, eps, score, v and velocity of a batch, each computed when asked for.

    Every one is a fresh tensor, which a sampler may work on in place.

    Args:
        first, second: two tensors (B, ...) that span the prediction, usually x and the output.
        level: where the batch stands.
        meaning: how x0 and eps are combined from them.
        extra: what else the network put out (B, ...), such as the variance's interpolation.
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
        """of_x0 * x0 + of_eps * eps, without forming either."""
        a, b = 0.0, 0.0
        if not is_zero(of_x0):
            c, d = self.meaning.x0(self.level)
            a, b = of_x0 * c, of_x0 * d
        if not is_zero(of_eps):
            c, d = self.meaning.eps(self.level)
            a, b = a + of_eps * c, b + of_eps * d
        if is_zero(a):
            return self.second * b
        if is_zero(b):
            return self.first * a
        if isinstance(b, float):
            return torch.add(self.first * a, self.second, alpha=b)
        return self.first * a + self.second * b

    @property
    def x0(self) -> Tensor:
        """The clean data: E[x0 | x] for the best model."""
        return self.combine(1.0, 0.0)

    @property
    def eps(self) -> Tensor:
        """The noise: E[eps | x]."""
        return self.combine(0.0, 1.0)

    @property
    def score(self) -> Tensor:
        """grad log p_t(x) = -eps / sigma; refused at sigma = 0."""
        return self.combine(0.0, -1.0 / nonzero(self.level.sigma, "the score", "sigma"))

    @property
    def v(self) -> Tensor:
        """alpha eps - sigma x0 (Salimans & Ho 2022)."""
        return self.combine(-self.level.sigma, self.level.alpha)

    @property
    def velocity(self) -> Tensor:
        """eps - x0 = dy/du, the flow's slope in the straight frame."""
        return self.combine(-1.0, 1.0)


@dataclass(frozen=True)
class Eps(Parameterization):
    """out = eps (Ho et al. 2020). Says nothing of x0 where alpha = 0."""

    def x0(self, level: Level) -> Row:
        alpha = nonzero(level.alpha, "x0 from eps (use V, X0, Velocity or Karras)", "alpha")
        return 1 / alpha, -level.sigma / alpha

    def eps(self, level: Level) -> Row:
        return 0.0, 1.0

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.eps


@dataclass(frozen=True)
class X0(Parameterization):
    """out = x0. Where sigma = 0 its eps is 0, the limit for data that have a density."""

    def x0(self, level: Level) -> Row:
        return 0.0, 1.0

    def eps(self, level: Level) -> Row:
        if isinstance(level.sigma, Tensor):
            inverse: Scalar = torch.where(level.sigma == 0, 0, 1 / level.sigma)
        else:
            inverse = 1 / level.sigma if level.sigma else 0.0
        return inverse, -level.alpha * inverse

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.x0


@dataclass(frozen=True)
class V(Parameterization):
    """out = v = alpha eps - sigma x0 (Salimans & Ho 2022), well posed at both ends."""

    def x0(self, level: Level) -> Row:
        power = level.alpha**2 + level.sigma**2  # 1 for variance-preserving processes only
        return level.alpha / power, -level.sigma / power

    def eps(self, level: Level) -> Row:
        power = level.alpha**2 + level.sigma**2
        return level.sigma / power, level.alpha / power

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.v


@dataclass(frozen=True)
class Score(Parameterization):
    """out = grad log p_t(x) = -eps / sigma (Song et al. 2021)."""

    def x0(self, level: Level) -> Row:
        alpha = nonzero(level.alpha, "x0 from the score (use V, X0, Velocity or Karras)", "alpha")
        return 1 / alpha, level.sigma**2 / alpha

    def eps(self, level: Level) -> Row:
        return 0.0, -level.sigma

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.score


@dataclass(frozen=True)
class Velocity(Parameterization):
    """out = eps - x0, the slope in the straight frame; what flow matching trains on its path.

    Lipman et al. 2023; Liu et al. 2023. Well posed at both ends, on every process.
    """

    def x0(self, level: Level) -> Row:
        total = level.alpha + level.sigma
        return 1 / total, -level.sigma / total

    def eps(self, level: Level) -> Row:
        total = level.alpha + level.sigma
        return 1 / total, level.alpha / total

    def target(self, prediction: Prediction) -> Tensor:
        return prediction.velocity


@dataclass(frozen=True)
class Karras(Parameterization):
    r"""The preconditioning of Karras et al. 2022, eq. 7 and Table 1, for any process.

    With s = sigma_data and power = alpha^2 s^2 + sigma^2, the variance of x:

        x0 = alpha s^2 / power x + sigma s / sqrt(power) out,    network input x / sqrt(power)

    For alpha = 1 these are their c_skip, c_out and c_in. Input and target have unit variance at
    every level, and both ends are well posed. On a variance-preserving process with s = 1 it is -V.

    Args:
        sigma_data: standard deviation of the data.
    """

    sigma_data: float = 0.5

    def __post_init__(self) -> None:
        errors.number("sigma_data", self.sigma_data, 0, strict=True)

    def power(self, level: Level) -> Scalar:
        """Variance of x_t for data of variance sigma_data^2."""
        return level.alpha**2 * self.sigma_data**2 + level.sigma**2

    def input_scale(self, level: Level) -> Scalar:
        return self.power(level) ** -0.5

    def x0(self, level: Level) -> Row:
        power = self.power(level)
        return level.alpha * self.sigma_data**2 / power, level.sigma * self.sigma_data / power**0.5

    def eps(self, level: Level) -> Row:
        power = self.power(level)
        return level.sigma / power, -level.alpha * self.sigma_data / power**0.5

    def target(self, prediction: Prediction) -> Tensor:
        level = prediction.level
        root = self.power(level) ** 0.5
        return prediction.combine(
            level.sigma / (self.sigma_data * root), -level.alpha * self.sigma_data / root
        )


@dataclass(frozen=True)
class Pair(Parameterization):
    """The span is (x0, eps) itself: what is known in closed form, or known because it was drawn."""

    def x0(self, level: Level) -> Row:
        return 1.0, 0.0

    def eps(self, level: Level) -> Row:
        return 0.0, 1.0

    def target(self, prediction: Prediction) -> Tensor:
        raise TypeError("a pair (x0, eps) is not the output of one network")


def truth(x0: Tensor, eps: Tensor, level: Level) -> Prediction:
    """The prediction that is right: the x0 and eps a noisy batch was made from."""
    return Prediction(x0, eps, level, Pair())


def read(x: Tensor, out: Any, level: Level, meaning: Parameterization) -> Prediction:
    """The prediction of a network that answered `out` for x (B, C, ...).

    Args:
        out: shaped like x; or (B, 2 C, ...), whose second half is then `extra`.
    """
    if not isinstance(out, Tensor):
        raise TypeError(f"what the network answers must be a tensor; got {out!r:.80}")
    out = out.to(x.dtype)
    if out.shape == x.shape:
        return Prediction(x, out, level, meaning)
    if x.ndim < 2 or out.shape != (len(x), 2 * x.shape[1], *x.shape[2:]):
        raise ValueError(
            f"the network answered with shape {tuple(out.shape)} for x of shape {tuple(x.shape)}"
        )
    out, extra = out.chunk(2, dim=1)
    return Prediction(x, out, level, meaning, extra)


def coordinates(x: Tensor) -> Tensor:
    """A batch (B, ...) as (B, d), any rank from 1, any size from 0."""
    return x.reshape(len(x), x.shape[1:].numel())


@overload
def per_sample(values: Tensor, like: Tensor) -> Tensor: ...
@overload
def per_sample(values: Scalar, like: Tensor) -> Scalar: ...
def per_sample(values: Scalar, like: Tensor) -> Scalar:
    """(B,) as (B, 1, ..., 1) on the device of `like`; a single value as it is."""
    if not isinstance(values, Tensor):
        return values
    shape = (-1, *[1] * (like.ndim - 1)) if values.ndim else ()
    return values.reshape(shape).to(like.device)


def is_zero(scalar: Scalar) -> bool:
    """True for the float 0; a tensor is never inspected, which on a GPU would wait for it."""
    return isinstance(scalar, float) and scalar == 0.0


def nonzero(scalar: Scalar, what: str, name: str) -> Scalar:
    """The scalar, or a named refusal where it is 0."""
    if isinstance(scalar, Tensor):
        zero = scalar.device.type == "cpu" and bool((scalar == 0).any())
    else:
        zero = scalar == 0
    if zero:
        raise ValueError(f"{what} is not defined at {name} = 0")
    return scalar
